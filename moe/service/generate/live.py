"""The live service of tokens: sequences run together, step by step, in real time.

At every step waiting requests are admitted while fewer than `batch_size` run and the cache has room for all
of one's tokens; prompts go in as rows beside those of the answers under way. The host launches a few steps
ahead of the device and reads what they found behind it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moe.lm.adapt import HeadCounters
from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.lm.engine.step import Step, Work
from moe.service.generate.lengths import TokenLengths, row_of
from moe.service.generate.lesson_budget import LessonBudget
from moe.service.generate.sequences import Counts, Request, Sequences, Texts
from moe.service.generate.tally import Tally
from moe.service.queueing import arrival_time, arrived_by, expire, oldest_arrival, slot_of
from moe.service.traffic import RequestStream, TrafficConfig, draw_stream
from moe.workload import KnobRefusedError, Knobs, WorkStats

POLL_S = 2e-4
"""Time between looks at a device at work, and at a queue in which nobody may run."""
LEAST_PAUSE_S = 2e-3
"""Idle time is gathered up to this: shorter sleeps take longer than asked for."""


class Promises(Protocol):
    """Terms of service per class (interactive, deferrable), in seconds."""

    @property
    def ttft_s(self) -> tuple[float, float]:
        """Time to first token, from arrival, above which an answer is late."""
        ...

    @property
    def tpot_s(self) -> tuple[float, float]:
        """Time per output token above which it is late."""
        ...

    @property
    def deadline_s(self) -> tuple[float, float]:
        """Time to the last token, from arrival, above which it is late."""
        ...

    @property
    def expire_after_s(self) -> tuple[float, float]:
        """Age at which a request that does not run yet is given up."""
        ...


@dataclass(frozen=True)
class _InFlight:
    step: Step
    rows: Rows
    lesson: Work | None
    """Adaptation behind the step."""

    def done(self) -> bool:
        """Whether the device is behind all of it."""
        return self.step.done() if self.lesson is None else self.lesson.done()


class GenerateWorkload:
    """`Workload` (see `moe.workload`) that decodes every request with the model."""

    def __init__(
        self,
        engine: Engine,
        texts: Texts,
        domain: np.ndarray,
        lengths: TokenLengths,
        traffic: TrafficConfig,
        capacity_rps: float,
        episode_s: float,
        promises: Promises,
        *,
        budget: LessonBudget | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Build a service over an engine that is captured.

        Args:
            engine: what answers; its documents are those of `texts`.
            texts: documents and what the standard service has right of them.
            domain: of each document; the traffic's shifts are numbers of domains.  # [N]
            lengths: of requests.
            traffic: arrival process.
            capacity_rps: requests per second that load 1.0 stands for.
            episode_s: length of the request stream.
            promises: terms of service.
            budget: pays for lessons; None: they are unlimited.
            clock: seconds that only grow; the engine's.
            sleep: waits for seconds of `clock`.

        Raises:
            ValueError: a domain of the traffic has no documents, or a request is longer than a document. So
                each finds room some time: the engine has cache for at least one whole document.
        """
        self._of_domain = {shift: np.flatnonzero(domain == shift) for shift in set(traffic.shifts)}
        if empty := [shift for shift, documents in self._of_domain.items() if not len(documents)]:
            raise ValueError(f"traffic.shifts name domains without documents: {empty}")
        longest = int((lengths.prompt + lengths.output).max())
        if longest > texts.reference.shape[1]:
            raise ValueError(
                f"requests of {longest} tokens do not fit documents of {texts.reference.shape[1]}: fit the "
                "lengths to the model's context"
            )
        self.engine, self.lengths = engine, lengths
        self._traffic, self._capacity_rps, self._episode_s = traffic, capacity_rps, math.ceil(episode_s)
        self._promises = np.array([promises.ttft_s, promises.tpot_s, promises.deadline_s])  # [3, 2]
        self._expire_after_s = promises.expire_after_s
        self._clock, self._sleep, self.texts, self._budget = clock, sleep, texts, budget
        self._stream: RequestStream | None = None

    def warm_up(self) -> None:
        """Load all compiled functions of the queue and run a step, so that no episode pays for it."""
        self.reset(0)
        arrivals = self._arrivals
        if arrivals[:, -1].any():
            c = int(arrivals[1, -1] > 0)
            slot = slot_of(arrivals, c, 0, self._head[c])
            self._start(c, arrival_time(arrivals, c, 0, slot))
            self._launch(Knobs(batch_size=1, expert_count=1), Tally(Knobs(), self._promises))
        for c in range(2):
            oldest_arrival(arrivals, c, self._next[c], self._head[c], 1.0)
            expire(arrivals, c, self._next[c], self._head[c], 0.0, self._expire_after_s[c])
        self.engine.reset()
        self._stream = None

    def reset(self, seed: int) -> None:
        """Start with an empty queue and cache, and the request stream that belongs to `seed`."""
        self.engine.reset()
        self._seed = np.uint64(seed)
        self._stream = draw_stream(self._traffic, seed, self._episode_s, self._capacity_rps)
        self._sequences = Sequences(self.texts, self.engine.blocks.slots)
        self._next = np.zeros(2, np.int64)  # number of the next request to admit
        self._head = np.zeros(2, np.int64)  # a slot of arrivals not later than its
        self._arrived = np.zeros(2, np.int64)
        self._in_flight: deque[_InFlight] = deque()
        self._adapted = HeadCounters()
        if self._budget is not None:
            self._budget.reset()
        self._time_s = self._end_s = self._pause_s = 0.0

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        """Serve in real time until the interval is over and the steps under way are done.

        Args:
            knobs: of the interval.
            duration_s: its length.
            open_classes: how many classes may be begun, see `Workload.run`.
            promised_tpot_s: see `Workload.run`; None: what the service was made with.

        Raises:
            KnobRefusedError: a knob cannot be applied here.
            RuntimeError: the workload was not reset, or is closed.
        """
        if self._stream is None:
            raise RuntimeError("the live workload has no request stream; call reset(seed) first")
        self._refuse(knobs)
        promises = self._promises.copy()
        if promised_tpot_s is not None:
            promises[1, 0] = promised_tpot_s
        tally = Tally(knobs, promises)
        shift = self._shift_at(self._end_s)
        self._end_s += duration_s
        self.engine.synchronize()
        mark, began = self.engine.mark(), self._time_s
        self._resumed = self._clock() - began
        while (now := self._now) < self._end_s:
            self._collect(tally, mark, began, wait=False)
            self._expire(now, tally)
            self._admit(now, knobs, open_classes)
            if self._sequences.has_work:
                self._launch(knobs, tally)
                if self._pause_s > LEAST_PAUSE_S:  # only where the pace asks for it
                    self._collect(tally, mark, began, wait=True)
                    self._sleep(self._pause_s)
                    self._pause_s = 0.0
            elif self._in_flight:
                self._collect(tally, mark, began, wait=True)
            else:
                self._sleep(max(min(self._next_arrival(now), self._end_s) - now, POLL_S))
        self._collect(tally, mark, began, wait=True)
        self._time_s = self._now
        return self._stats(shift, tally)

    def close(self) -> None:
        """End the episode. May be called twice."""
        self._stream = None

    def _launch(self, knobs: Knobs, tally: Tally) -> None:
        """Start the next step. One that reads prompts needs all experts anyway, so all may be chosen."""
        rows, prompts = self._sequences.next_rows(self.engine.max_rows)
        n_experts = self.engine.model.config.n_experts
        bias = 0.0 if prompts else knobs.routing_bias
        readable = readable_experts(bias, n_experts, knobs.expert_count)
        step = self.engine.launch(rows, knobs.expert_count, readable)
        if self._budget is not None:
            self._budget.serve(rows, prompts, knobs.expert_count, readable)
        lesson = self._learn(step, rows, knobs.ttt_steps, tally) if prompts and knobs.ttt_steps else None
        self._in_flight.append(_InFlight(step, rows, lesson))
        tally.steps += 1
        tally.fill += min(1.0, self._sequences.running / knobs.batch_size)

    def _learn(self, step: Step, rows: Rows, steps: int, tally: Tally) -> Work | None:
        """Keep what prompts teach, and adapt once that makes a lesson that can be paid."""
        adapter = self.engine.adapter
        assert adapter is not None
        read = self._sequences.inside_prompts(rows)
        document = rows.document[read]
        target = self.texts.tokens[document, rows.position[read] + 1]
        if not adapter.collect(step.stream, read, document, target):
            return None
        whole = adapter.whole
        if whole and self._budget is not None and not self._budget.pay(self._now, steps * whole):
            tally.refused += steps * adapter.skip()
            return None
        return self.engine.learn(steps)

    def _collect(self, tally: Tally, mark: Any, mark_s: float, *, wait: bool) -> None:
        """Account for the steps that are done, or for all; `mark_s` is the service's time at `mark`."""
        while self._in_flight and (wait or self._in_flight[0].done()):
            flight = self._in_flight.popleft()
            answers = flight.step.answers()
            ended_s = mark_s + flight.step.seconds_since(mark)
            busy_s = flight.step.duration_s
            if flight.lesson is not None:
                flight.lesson.wait()
                tally.lessons += 1
                tally.ttt_busy_s += flight.lesson.duration_s
                busy_s += flight.lesson.duration_s
            tally.busy_s += busy_s
            self._pause_s += busy_s * (1.0 / tally.knobs.pace - 1.0)
            finished = self._sequences.collect(flight.rows, answers, ended_s)
            if finished is not None:
                tally.add(finished)
                for slot in finished.slot.tolist():
                    self.engine.release(slot)

    def _admit(self, now: float, knobs: Knobs, open_classes: int) -> None:
        """Let waiting requests of the open classes run, interactive ones first, while there is room."""
        places = math.floor(knobs.admission * knobs.batch_size)
        for c, most in enumerate((knobs.batch_size, places)[:open_classes]):
            waiting = arrived_by(self._arrivals, c, now) - int(self._next[c])
            while (
                waiting and self._sequences.running < knobs.batch_size and self._sequences.n_running[c] < most
            ):
                if not self._start(c, now):
                    return
                waiting -= 1

    def _start(self, c: int, now: float) -> bool:
        """Admit the next request of a class; returns whether the cache had room for all its tokens."""
        number = int(self._next[c])
        row = row_of(self._seed, c, number, len(self.lengths.prompt))
        prompt, output = int(self.lengths.prompt[row]), int(self.lengths.output[row])
        if not self.engine.blocks.has_room(prompt + output - 1):
            return False
        documents = self._of_domain[self._shift_at(now)]
        document = documents[row_of(self._seed, 2 + c, number, len(documents))]
        self._head[c] = slot_of(self._arrivals, c, number, self._head[c])
        arrived_s = arrival_time(self._arrivals, c, number, self._head[c])
        slot = self.engine.reserve(prompt + output - 1)
        self._sequences.admit(Request(slot, c, arrived_s, int(document), prompt, output))
        self._next[c] = number + 1
        return True

    def _expire(self, now: float, tally: Tally) -> None:
        for c in range(2):
            self._next[c], self._head[c], expired = expire(
                self._arrivals, c, self._next[c], self._head[c], now, self._expire_after_s[c]
            )
            tally.expired[c] += expired

    def _next_arrival(self, now: float) -> float:
        """When the next request of any class comes, infinity if none does."""
        times = [math.inf]
        for c in range(2):
            number = arrived_by(self._arrivals, c, now)
            if number < self._arrivals[c, -1]:
                slot = slot_of(self._arrivals, c, number, self._head[c])
                times.append(arrival_time(self._arrivals, c, number, slot))
        return min(times)

    def _stats(self, shift: int, tally: Tally) -> WorkStats:
        now = self._time_s
        arrived = np.array([arrived_by(self._arrivals, c, now) for c in range(2)], np.int64)
        new, self._arrived = arrived - self._arrived, arrived
        waiting = arrived - self._next + self._sequences.n_running
        oldest = [
            max(0.0, now - oldest_arrival(self._arrivals, c, self._next[c], self._head[c], now))
            for c in range(2)
        ]
        blocks = self.engine.blocks
        counts, self._sequences.counts = self._sequences.counts, Counts()
        if tally.lessons:
            assert self.engine.adapter is not None
            before, self._adapted = self._adapted, self.engine.adapter.counters
            tally.adapted = self._adapted - before
        return WorkStats(
            arrived=tuple(new.astype(float).tolist()),
            waiting=tuple(waiting.astype(float).tolist()),
            oldest_s=tuple(oldest),
            shift_id=float(shift),
            budget_share=1.0 if self._budget is None else self._budget.share(now),
            cache_share=1.0 - blocks.free_blocks / blocks.n_blocks,
            **tally.stats(counts, self.engine.usage()[0]),
        )

    def _refuse(self, knobs: Knobs) -> None:
        trained, slots = self.engine.model.config.top_k, self.engine.blocks.slots
        if knobs.sm_clock != 1.0:
            refused = f"sm_clock={knobs.sm_clock}: the live service sets no clocks; leave it at 1.0"
        elif knobs.expert_count > trained:
            refused = f"expert_count={knobs.expert_count}: the model has {trained} per token; ask for fewer"
        elif knobs.batch_size > slots:
            refused = f"batch_size={knobs.batch_size}: the engine has places for {slots}; ask for fewer"
        elif knobs.ttt_steps and self.engine.adapter is None:
            refused = f"ttt_steps={knobs.ttt_steps}: this engine does not adapt; set it to 0"
        else:
            return
        raise KnobRefusedError(refused)

    @property
    def _now(self) -> float:
        """Seconds of service since the episode began."""
        return self._clock() - self._resumed

    @property
    def _arrivals(self) -> np.ndarray:
        assert self._stream is not None
        return self._stream.arrivals

    def _shift_at(self, now: float) -> int:
        assert self._stream is not None
        return int(self._stream.shift_id[min(int(now + 1e-9), len(self._stream.shift_id) - 1)])
