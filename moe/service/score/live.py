"""The live service: real micro-batches of a real model, in real time, from the queue of `queueing`.

The service's clock runs only inside `LiveWorkload.run` and stands still between calls. An interval ends at a
whole multiple of its length on that clock; one that had to wait for a batch makes the next one shorter.

On CUDA a full batch is launched shortly before the one before it is expected to end, so that the device is
never without work at full load, and no earlier, so that its requests are chosen as late as possible. A
partial batch waits until the device is free. On a CPU a launch returns when the batch is done.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from moe.service.budget import StepBudget
from moe.service.queueing import (
    SLOT_S,
    arrived_by,
    expire,
    late_count,
    next_launch,
    oldest_arrival,
    oldest_in_slot,
    record_latencies,
    slot_of,
)
from moe.service.score.runner import Runner
from moe.service.score.tally import InFlight, Tally
from moe.service.traffic import RequestStream, TrafficConfig, draw_stream
from moe.workload import KnobRefusedError, Knobs, WorkStats

POLL_S = 2e-4
"""Time between looks at a device at work."""
LAUNCH_AHEAD_S = 10e-3
"""A full batch is launched this long before the running one should end: launching takes milliseconds."""
REPLAY_AHEAD_S = 1e-3
"""The same of a batch that a CUDA graph answers, whose launch takes less than looking at the device does."""


class Service(Protocol):
    """Terms of service per class (interactive, deferrable), in seconds."""

    @property
    def deadline_s(self) -> tuple[float, float]:
        """Latency above which an answer is late."""
        ...

    @property
    def max_wait_s(self) -> tuple[float, float]:
        """Age of the oldest request at which a partial batch is launched; above 0."""
        ...

    @property
    def expire_after_s(self) -> tuple[float, float]:
        """Age at which a waiting request is given up."""
        ...


class LiveWorkload:
    """`Workload` (see `moe.workload`) that answers every request with the model."""

    def __init__(
        self,
        runner: Runner,
        traffic: TrafficConfig,
        capacity_rps: float,
        episode_s: float,
        service: Service,
        *,
        budget: StepBudget | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Build a service; call `warm_up` before the first episode.

        Args:
            runner: what answers, and what the requests ask.
            traffic: arrival process; its shifts index `runner.samples.shifts`.
            capacity_rps: requests per second that load 1.0 stands for.
            episode_s: length of the request stream.
            service: terms of service.
            budget: pays for adaptation steps; None: they are unlimited. What a step costs is what a profile
                measured: a card's counter ticks too slowly to charge single ones.
            clock: seconds that only grow; the runner's.
            sleep: waits for seconds of `clock`.

        Raises:
            ValueError: the traffic names a shift that the samples lack.
        """
        shifts = runner.samples.shifts
        if max(traffic.shifts) >= len(shifts):
            raise ValueError(f"traffic.shifts {traffic.shifts} exceed the samples' shifts {shifts}")
        self.runner = runner
        self._traffic, self._capacity_rps, self._episode_s = traffic, capacity_rps, math.ceil(episode_s)
        self._deadline_s = np.array(service.deadline_s, np.float64)  # [2]
        self._max_wait_s = np.array(service.max_wait_s, np.float64)  # [2]
        self._expire_after_s = np.array(service.expire_after_s, np.float64)  # [2]
        self._budget, self._clock, self._sleep = budget, clock, sleep
        self._resumed = 0.0  # reading of `clock` at which the service's clock was 0
        self._stream: RequestStream | None = None

    def warm_up(self, batch_sizes: Sequence[int], expert_counts: Sequence[int], ttt: int) -> None:
        """Run every shape once, largest first, so that no episode pays for compiling, loading or allocating.

        What is served by CUDA graphs is captured here, for partial batches of every size too.

        Args:
            batch_sizes: batch sizes to come; partial batches are stood for by powers of two.
            expert_counts: experts per token to come.
            ttt: most adaptation steps per batch to come.
        """
        largest = max(batch_sizes)
        self.runner.capture(largest, expert_counts)
        sizes = sorted(
            {*batch_sizes, *(2**i for i in range(largest.bit_length()) if 2**i <= largest)}, reverse=True
        )
        for k in expert_counts:
            for n in sizes:
                steps = (
                    min(ttt, 1)
                    if self.runner.adapts and (n <= self.runner.adapt_batch or n == largest)
                    else 0
                )
                self.runner.launch([(0, n), (0, 0)], 0, Knobs(batch_size=n, expert_count=k, ttt_steps=steps))
                self.runner.synchronize()
        self._compile_queue()
        self._stream = None
        self.runner.reset(0)

    def reset(self, seed: int) -> None:
        """Start an empty queue, an unadapted model and the request stream that belongs to `seed`."""
        self.runner.reset(seed)
        self._stream = draw_stream(self._traffic, seed, self._episode_s, self._capacity_rps)
        self._next = np.zeros(2, np.int64)  # number of the next request to launch
        self._head = np.zeros(2, np.int64)
        self._arrived = np.zeros(2, np.int64)
        self._in_flight: deque[InFlight] = deque()
        self._expected_s: dict[Knobs, float] = {}  # device time of the last full batch
        self._started_s = self._free_at_s = 0.0
        self._time_s = self._end_s = 0.0
        self._paid_until = 0.0  # time that the budget has let pass
        if self._budget is not None:
            self._budget.energy.reset()

    def run(
        self, knobs: Knobs, duration_s: float, open_classes: int = 2, promised_tpot_s: float | None = None
    ) -> WorkStats:
        """Serve in real time; a batch still under way at the end counts as waiting.

        Raises:
            KnobRefusedError: a knob cannot be applied here.
            NonFiniteAnswersError: the model answered with numbers that are not finite.
            RuntimeError: the workload was not reset, or is closed.
        """
        if self._stream is None:
            raise RuntimeError("the live workload has no request stream; call reset(seed) first")
        self._refuse(knobs)
        tally = Tally()
        shift = self._shift_at(self._end_s)
        self._end_s += duration_s
        self._resumed = self._clock() - self._time_s
        while True:
            now = self._now()
            self._collect(tally)
            if now >= self._end_s:
                break
            self._expire(now, tally)
            wake = self._serve(now, knobs, open_classes, tally)
            if wake > now:
                self._sleep(max(min(wake, self._end_s) - now, POLL_S))
        self._time_s = now
        return self._stats(now, shift, tally)

    def close(self) -> None:
        """End the episode; the model stays as adapted until the next `reset`. May be called twice."""
        self._stream = None

    def _serve(self, now: float, knobs: Knobs, open_classes: int, tally: Tally) -> float:
        """Launch a batch if one is due; returns when to look again, `now` after a launch."""
        arrivals = self._arrivals
        if self._in_flight:
            full = sum(self._waiting(c, now) for c in range(open_classes)) >= knobs.batch_size
            if not (full and self._may_launch_ahead(now, knobs)):
                return now + POLL_S
        elif now < self._free_at_s:
            return self._free_at_s
        else:
            slot = math.floor(now / SLOT_S + 1e-9)
            due = slot * SLOT_S + self._due(slot, now, knobs.batch_size, open_classes)
            if due > now:
                return min(due, (slot + 1) * SLOT_S)
        ranges, heads, room = [], [], knobs.batch_size
        for c in range(2):
            taken = min(self._waiting(c, now), room) if c < open_classes else 0
            first, last = int(self._next[c]), int(self._next[c]) + taken
            ranges.append((first, last))
            heads.append(int(self._head[c]))
            if taken:
                self._head[c] = slot_of(arrivals, c, last - 1, self._head[c])
                self._next[c] = last
                room -= taken
        if room == knobs.batch_size:  # rounding: the request that is due arrives a moment later
            return now + POLL_S
        if not self._in_flight:
            self._started_s = now
        afforded = self._affordable(now, knobs.batch_size - room, knobs, tally)
        batch = self.runner.launch(ranges, self._shift_at(now), afforded)
        self._in_flight.append(InFlight(batch, ranges, heads, knobs))
        return now

    def _due(self, slot: int, now: float, batch_size: int, open_classes: int) -> float:
        """When a batch is due, in seconds into the slot that `now` lies in; infinity if later."""
        queued, in_slot, arrived, due = 0, 0, 0, math.inf
        for c in range(open_classes):
            arrivals = self._arrivals
            queued += int(arrivals[c, slot]) - int(self._next[c])
            in_slot += int(arrivals[c, slot + 1] - arrivals[c, slot])
            arrived += arrived_by(arrivals, c, now) - int(arrivals[c, slot])
            oldest, self._head[c] = oldest_in_slot(arrivals, c, self._next[c], self._head[c], slot)
            due = min(due, oldest + self._max_wait_s[c])
        return next_launch(now - slot * SLOT_S, batch_size, queued, in_slot, arrived, due)

    def _collect(self, tally: Tally) -> None:
        """Account for the batches that are done."""
        while self._in_flight and self._in_flight[0].batch.done():
            flight = self._in_flight.popleft()
            result = flight.batch.result()
            completion = flight.batch.answered_at - self._resumed
            busy_s = result.answer_s + result.ttt_s
            freed = flight.batch.freed_at - self._resumed
            self._free_at_s = freed + busy_s * (1.0 / flight.knobs.pace - 1.0)
            self._started_s = freed
            if flight.size == flight.knobs.batch_size:
                self._expected_s[flight.knobs] = busy_s
            tally.add(flight, result, completion, self._arrivals, self._deadline_s)

    def _expire(self, now: float, tally: Tally) -> None:
        for c in range(2):
            self._next[c], self._head[c], expired = expire(
                self._arrivals, c, self._next[c], self._head[c], now, self._expire_after_s[c]
            )
            tally.expired[c] += expired

    def _stats(self, now: float, shift: int, tally: Tally) -> WorkStats:
        arrived = np.array([arrived_by(self._arrivals, c, now) for c in range(2)], np.int64)
        new, self._arrived = arrived - self._arrived, arrived
        waiting = arrived - self._next
        for flight in self._in_flight:
            waiting += [last - first for first, last in flight.ranges]
        oldest = [
            max(0.0, now - oldest_arrival(self._arrivals, c, self._next[c], self._head[c], now))
            for c in range(2)
        ]
        return WorkStats(
            arrived=tuple(new.astype(float).tolist()),
            waiting=tuple(waiting.astype(float).tolist()),
            oldest_s=tuple(oldest),
            shift_id=float(shift),
            budget_share=self._budget_share(now),
            **tally.stats(),
        )

    def _affordable(self, now: float, size: int, knobs: Knobs, tally: Tally) -> Knobs:
        """The knobs for a batch, less the adaptation steps that the budget cannot pay."""
        if self._budget is None:
            return knobs
        serving_j, step_j = self._budget.batch_energy_j(size, knobs)
        adapter = self.runner.adapter
        # A batch too small to adapt to is left out by the adapter, and costs nothing.
        asked = 0 if adapter is None or size < adapter.smallest_batch else knobs.ttt_steps
        refused = asked - self._budget.energy.pay_steps(now - self._paid_until, serving_j, step_j, asked)
        self._paid_until = now
        tally.ttt_refused += refused
        return replace(knobs, ttt_steps=knobs.ttt_steps - refused) if refused else knobs

    def _budget_share(self, now: float) -> float:
        """Let the budget's time pass until now; returns its share of a full bank."""
        if self._budget is None:
            return 1.0
        self._budget.energy.earn(now - self._paid_until)
        self._paid_until = now
        return self._budget.energy.share

    def _refuse(self, knobs: Knobs) -> None:
        if knobs.admission != 1.0:
            raise KnobRefusedError(
                f"admission={knobs.admission}: requests of one pass hold no places; leave it at 1.0"
            )
        if knobs.sm_clock != 1.0:
            raise KnobRefusedError(
                f"sm_clock={knobs.sm_clock}: the live service sets no clocks; leave sm_clock at 1.0 and "
                "lower the load with pace, batch_size or expert_count"
            )
        n_experts = self.runner.n_experts
        if knobs.expert_count > n_experts:
            raise KnobRefusedError(
                f"expert_count={knobs.expert_count}: the model has {n_experts} experts; ask for fewer"
            )
        if knobs.ttt_steps and not self.runner.adapts:
            raise KnobRefusedError(
                f"ttt_steps={knobs.ttt_steps}: the {self.runner.samples.task} model has no batch norms to "
                "adapt; set ttt_steps to 0, or serve the vision model"
            )

    def _now(self) -> float:
        return self._clock() - self._resumed

    @property
    def _arrivals(self) -> np.ndarray:
        assert self._stream is not None
        return self._stream.arrivals

    def _waiting(self, c: int, now: float) -> int:
        return arrived_by(self._arrivals, c, now) - int(self._next[c])

    def _shift_at(self, now: float) -> int:
        assert self._stream is not None
        return int(self._stream.shift_id[min(int(now + 1e-9), len(self._stream.shift_id) - 1)])

    def _may_launch_ahead(self, now: float, knobs: Knobs) -> bool:
        """Whether it is time for the batch after the running one, should it be full."""
        # An adaptation step makes the host wait, which would hide when the running batch is done.
        if len(self._in_flight) > 1 or knobs.ttt_steps:
            return False
        running = self._in_flight[0].knobs
        replayed = self.runner.replays(knobs.batch_size, knobs.expert_count)
        ahead_s = REPLAY_AHEAD_S if replayed else LAUNCH_AHEAD_S
        expected_end = self._started_s + self._expected_s.get(running, 0.0)
        return running.pace == knobs.pace == 1.0 and now >= expected_end - ahead_s

    def _compile_queue(self) -> None:
        """Have the compiled queue functions loaded before the clock runs."""
        self.reset(0)
        arrivals = np.array([[0, 1], [0, 1]], np.int32)
        self._due(0, 0.0, 1, 2)
        oldest_arrival(arrivals, 0, self._next[0], self._head[0], SLOT_S)
        expire(arrivals, 0, self._next[0], self._head[0], 0.0, self._expire_after_s[0])
        late_count(arrivals, 0, 0, 1, SLOT_S, self._deadline_s[0])
        record_latencies(arrivals, 0, 0, 1, 0, SLOT_S, Tally().histogram)
        slot_of(arrivals, 0, 0, self._head[0])
