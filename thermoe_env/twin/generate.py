"""Tokens, compiled: continuous batching at measured cost, a slot of the queue at a time.

Steps are far shorter than a slot, so what runs is told by means: sequences that decode, prompts that wait to
be read, and how long a step lasts, which all follow from each other and from what arrives. In a slot of h
seconds with steps of period T, rows that decode leave after o steps on the mean and P requests enter, so with
z = h / (o T) their number goes from N to N exp(-z) + P (1 - exp(-z)) / z. P is what arrives, what the places
and the cache leave room for, or what prompts the rows of a step can read, whichever is least. Whole requests
are counted by flooring sums, so none is lost. The batching that is meant: Sarathi-Serve, arXiv 2403.02310.

Several devices share the experts as in `moe.lm.engine.parallel`. A step lasts as long as its slowest device:
all that is not the experts' at the device's own clock, and its share of what is
(`thermoe_env.problem.token_tables`). That the experts of a layer are never in quite equal demand is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from moe.compiled import copy_row, inlined, inner
from moe.lm.config import BLOCK, FIRST_TRUST
from moe.lm.engine.blocks import blocks_for
from moe.memory import as_record
from moe.randomness import derive, integer
from moe.service.adaptation import start_unadapted
from moe.service.budget import earn, share_of
from moe.service.queueing import SLOT_S, arrival_time, latency_bin, slot_of
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.token_tables import TokenWork, token_work
from thermoe_env.twin.score import drop_expired
from thermoe_env.twin.service import Service, implement, slowest
from thermoe_env.twin.token_lessons import (
    Learning,
    Lessons,
    add_learned,
    lesson_time,
    take_lessons,
)
from thermoe_env.twin.token_slots import TRANSIT, mean_slot, times_of
from thermoe_env.twin.token_steps import add_answers, fill_energy

KNOBS_READ = ("routing_bias", "batch_size", "expert_count", "ttt_steps", "pace", "sm_clock", "admission")
"""Those that move something here."""

SERVER_DTYPE = np.dtype(
    [
        ("next", np.int64, (2,)),  # per class, the first request that does not run
        ("head", np.int64, (2,)),  # and a slot not later than its
        ("begun", np.float64, (2,)),  # requests that were let run since the episode began, or expired
        ("ended", np.float64, (2,)),  # that were answered, or expired
        ("prompts", np.float64, (2,)),  # that run and whose prompt waits to be read
        ("decoding", np.float64, (2,)),  # whose answers are under way
        ("late", np.float64, (2,)),  # of these and the prompts: late already
        ("draw", np.int64),  # of what steps cost in this episode
        ("period_s", np.float64),  # of a step, the pause of the pace included
        ("unlearned", np.float64),  # rows of prompts that wait for a lesson
        ("lessons", np.int64),  # that were paid and wait until each head has one
        ("trust", np.float64),  # share of a whole step that lessons take
    ]
)
"""What runs and what waits between two intervals."""

_STREAM = np.uint64(9)
"""Of an episode's seed, from which the draw of what steps cost comes."""
_RANKS = 64
_GOLDEN = 0.6180339887498949
"""Multiples of it, less their whole parts, lie evenly however many there are."""


class Terms(NamedTuple):
    """What compiled code knows of requests and promises."""

    ttft_s: np.ndarray  # [2]
    deferrable_tpot_s: float
    """Promised time per output token; that of interactive requests may change."""
    deadline_s: np.ndarray  # [2]
    expire_after_s: np.ndarray  # [2]
    prompt: float
    """Mean tokens of a prompt."""
    decoded: float
    """Mean rows of an answer: one less than its tokens."""
    decoded_harmonic: float
    """Their harmonic mean, at least one each: times per token of short answers vary most."""
    decoded_ranked: np.ndarray
    """Theirs from shortest to longest, [_RANKS]."""
    prompt_variance: float
    """Of the tokens of a prompt, over the square of their mean."""
    places: float
    """Most sequences that the engine and its cache hold."""
    cache_share: float
    """Of a sequence that runs."""
    max_rows: float
    slots: int
    """Per interval."""


class Generate(NamedTuple):
    """What does not change: the fields of `TokenTables`, and the terms."""

    pure: np.ndarray
    mixed: np.ndarray
    answers: np.ndarray
    reference: np.ndarray
    terms: np.ndarray
    """`Terms`, an array of one record."""
    learning: Learning
    fresh_purse: np.ndarray
    """What adaptation may spend at an episode's start, see `moe.service.budget`."""


class GenerateState(NamedTuple):
    """What is carried from interval to interval."""

    server: np.ndarray
    """Records of `SERVER_DTYPE` [n]."""
    weights: np.ndarray
    """[n, S + 1] of the pure states of the head."""
    purse: np.ndarray
    """[n, P] what adaptation may spend."""


def generate_service(problem: Problem) -> Service:
    """The service of a problem of task `generate`."""
    work, scenario = token_work(problem), problem.scenario
    promised, service = scenario.generate, scenario.service
    assert promised is not None
    prompt, output = work.lengths.prompt.astype(float), work.lengths.output.astype(float)
    held = [blocks_for(n) for n in (work.lengths.prompt + work.lengths.output - 1).tolist()]
    blocks = sum(held) / len(held)
    places = float(work.slots)
    context_blocks = blocks_for(work.profile.cost.config["context"])
    n_blocks = work.slots * context_blocks
    if promised.cache_positions is not None:
        n_blocks = promised.cache_positions // BLOCK
        places = min(places, n_blocks / blocks)
    terms = Terms(
        np.array(promised.ttft_s), promised.tpot_s[1], np.array(service.deadline_s),
        np.array(service.expire_after_s), float(prompt.mean()), max(1e-3, float(output.mean()) - 1.0),
        float(1.0 / (1.0 / np.maximum(1.0, output - 1.0)).mean()),
        np.quantile(np.maximum(1.0, output - 1.0), (np.arange(_RANKS) + 0.5) / _RANKS),
        float(prompt.var() / prompt.mean() ** 2), places, blocks / n_blocks, float(work.max_rows),
        round(scenario.interval_s / SLOT_S),
    )  # fmt: skip

    purse = problem.purse

    def new_state(n: int) -> GenerateState:
        states = len(work.tables.reference) + 1
        return GenerateState(np.zeros(n, SERVER_DTYPE), np.zeros((n, states)), np.zeros((n, len(purse))))

    fixed = Generate(*work.tables, as_record(terms), _learning(problem, work), purse)
    return Service(fixed, KNOBS_READ, new_state, histograms=3)


def _learning(problem: Problem, work: TokenWork) -> Learning:
    """How the head learns; where the profile did not let it, no lesson is ever asked for."""
    assert problem.tokens is not None
    measured, fit, domains = problem.tokens.adaptation, work.lessons, len(problem.profile.shifts)
    if measured is None or fit is None:
        none = np.zeros((domains, domains + 1, 4))
        return Learning(as_record(Lessons(1.0, 0.0, 0.0, 0.0)), np.zeros(domains), none, none[..., 3].copy())
    joules = measured.energy_j(problem.serving_power_w)
    lessons = Lessons(float(measured.lesson_rows), measured.lesson_s, joules, measured.margin)
    order = [fit.domains.index(name) for name in problem.profile.shifts]
    states = [0, *(1 + d for d in order)]
    changed = np.ascontiguousarray(fit.changed[np.ix_(order, states)])
    return Learning(as_record(lessons), fit.rate[order], changed, np.ascontiguousarray(changed[..., 3]))


@inlined
def _let_run(terms, arrivals, number, server, c, enter, wanted, times, histogram):
    """Let requests of class `c` run in slot `number`.

    Returns:
        (whole requests, the sum of their times to the first token)
    """
    first = server.next[c]
    server.begun[c] += enter
    last = min(int(server.begun[c] + 1e-9), arrivals[c, number + 1])
    if last <= first:
        return 0, 0.0
    server.head[c] = slot_of(arrivals, c, first, server.head[c])
    waited = max(0.0, number * SLOT_S - arrival_time(arrivals, c, first, server.head[c]))
    waits = 0.0
    if wanted - enter > 0.5:
        end = slot_of(arrivals, c, last - 1, server.head[c])
        waits = max(0.0, (number + 1) * SLOT_S - arrival_time(arrivals, c, last - 1, end))
    allowed = min(terms.ttft_s[c], terms.deadline_s[c] - terms.decoded * times.token_s) - times.first_s
    low, high = min(waited, waits), max(waited, waits)
    overdue = 1.0 if low > allowed else 0.0
    if low <= allowed < high:
        overdue = (high - allowed) / (high - low)
    server.late[c] += overdue * enter
    if histogram.shape[0] > 0:
        _record(
            histogram, times.first_s + low, times.first_s + high, last - first, terms.decoded_ranked, times
        )
    server.next[c] = last
    return last - first, (last - first) * (0.5 * (waited + waits) + times.first_s)


@inlined
def _end_answers(server, c, enter, of_read, slot, times, promised_s, work):
    """Read prompts of class `c`, of all the share `of_read`, and end answers; returns how many."""
    old = server.decoding[c]
    took = (server.prompts[c] + enter) * of_read
    server.prompts[c] += enter - took
    now = old * slot.left + took * slot.spread
    done = old + took - now
    server.decoding[c] = now
    server.ended[c] += done
    # Answers end late as often as those that run are, or by the time per token.
    runs = now + server.prompts[c] + done
    share = server.late[c] / runs if runs > 0.0 else 0.0
    over = (times.token_s - promised_s) / times.noise_s
    slow = 1.0 / (1.0 + math.exp(-1.7 * over)) if abs(over) < 20.0 else (1.0 if over > 0.0 else 0.0)
    server.late[c] -= share * done
    work.late[c] += done * (1.0 - (1.0 - share) * (1.0 - slow))
    return done


@inlined
def _drop(terms, arrivals, number, server, work):
    """Take out of the queue who has waited too long when slot `number` begins."""
    gone = (server.next[0], server.next[1])
    drop_expired(terms, arrivals, number, server, work)
    for c in range(2):
        server.begun[c] += server.next[c] - gone[c]
        server.ended[c] += server.next[c] - gone[c]


@inlined
def _entering(server, slot, places, deferrable, wanted):
    """Requests that are let run per class, interactive ones first."""
    unread = server.prompts[0] + server.prompts[1]
    after = (server.decoding[0] + server.decoding[1]) * slot.left + slot.read * slot.spread
    free = max(0.0, places - after - TRANSIT * slot.per_step * slot.busy - (unread - slot.read))
    first = min(wanted[0], free)
    return first, (min(slot.second, free - first) if deferrable > 0.0 else 0.0)


def serve(
    fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, promised_s, state, i, work,
    histogram, slot_energy,
):  # fmt: skip
    """Serve one interval, see `thermoe_env.twin.service.serve`."""
    terms, learning = fixed.terms[0], fixed.learning
    server, weights, purse = state.server[i], state.weights[i], state.purse[i]
    k, b, pace, clock = index.expert_count, index.routing_bias, knobs.pace, slowest(clocks)
    places = min(knobs.batch_size, terms.places)
    deferrable = knobs.admission * places if open_classes > 1 else 0.0
    before = (int(server.ended[0] + 1e-9), int(server.ended[1] + 1e-9))
    tokens, running, ttft, tpot, began, finished = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for number in range(first_slot, first_slot + terms.slots):
        _drop(terms, arrivals, number, server, work)
        wanted = (
            (arrivals[0, number + 1] - server.begun[0]) if open_classes > 0 else 0.0,
            (arrivals[1, number + 1] - server.begun[1]) if deferrable > 0.0 else 0.0,
        )
        came = (
            arrivals[0, number + 1] - arrivals[0, number],
            (arrivals[1, number + 1] - arrivals[1, number]) if deferrable > 0.0 else 0,
        )
        lesson_s = lesson_time(learning, purse, clock) if knobs.ttt_steps > 0.0 else 0.0
        slot = mean_slot(fixed, server, shift, k, b, clocks, pace, places, deferrable, wanted, came, lesson_s)
        steps, period = slot.steps, slot.steps.period_s
        enter = _entering(server, slot, places, deferrable, wanted)
        waiting = server.prompts[0] + server.prompts[1] + enter[0] + enter[1]
        of_read = slot.read / max(1e-12, waiting)
        wait_s = max(0.0, waiting - slot.read) / max(1e-12, slot.read) * SLOT_S
        for c in range(2):
            times = times_of(terms, slot, c, pace, wait_s)
            n, first_s = _let_run(terms, arrivals, number, server, c, enter[c], wanted[c], times, histogram)
            ttft, began = ttft + first_s, began + n
            promise = promised_s if c == 0 else terms.deferrable_tpot_s
            done = _end_answers(server, c, enter[c], of_read, slot, times, promise, work)
            tpot, finished = tpot + done * times.token_s, finished + done
        count = slot.busy * SLOT_S / period
        fill_energy(fixed, server.draw, shift, k, b, steps, count, clocks, slot_energy[number - first_slot])
        work.batches += count
        work.busy_s += count * steps.busy_s
        tokens += slot.given
        work.prefill_tokens += slot.read * terms.prompt
        held = slot.mean + TRANSIT * slot.read * period / SLOT_S
        running += held + server.prompts[0] + server.prompts[1]
        add_answers(fixed, shift, k, b, steps, slot.given, work)
        add_learned(learning, weights, shift, slot.given, work)
        serving_j = 0.0
        if purse.shape[0] > 0:
            for d in range(clocks.shape[0]):
                serving_j += slot_energy[number - first_slot, d]
        if knobs.ttt_steps > 0.0:
            slot_energy[number - first_slot, 0] += take_lessons(
                terms, learning, server, weights, purse, shift, steps, slot.read, serving_j, clock, work
            )
        elif purse.shape[0] > 0:
            earn(purse, SLOT_S, serving_j)
    work.budget_share = share_of(purse)
    _sum_up(fixed, knobs, arrivals, first_slot, server, before, tokens, running, shift, work)
    work.ttft_s = ttft / max(1.0, began)
    work.tpot_s = tpot / finished if finished > 0.0 else 0.0
    work.sm_clock, work.shift_id = clock, shift


@inlined
def _sum_up(fixed, knobs, arrivals, first_slot, server, before, tokens, running, shift, work):
    """Fill what is told of an interval at its end."""
    terms = fixed.terms[0]
    end_slot = first_slot + terms.slots
    answered = 0.0
    for c in range(2):
        ended = int(server.ended[c] + 1e-9)
        work.answered[c] = ended - before[c] - work.expired[c]
        work.late[c] = min(work.late[c], work.answered[c])
        answered += work.answered[c]
        work.arrived[c] = arrivals[c, end_slot] - arrivals[c, first_slot]
        work.waiting[c] = arrivals[c, end_slot] - ended
        work.oldest_s[c] = 0.0
        if server.next[c] < arrivals[c, end_slot]:
            server.head[c] = slot_of(arrivals, c, server.next[c], server.head[c])
            work.oldest_s[c] = max(
                0.0, end_slot * SLOT_S - arrival_time(arrivals, c, server.next[c], server.head[c])
            )
    accuracy = work.right_tokens / max(1e-12, tokens)
    work.output_tokens = tokens
    work.reference_tokens = tokens * fixed.reference[shift]
    work.confidence /= max(1e-12, tokens)
    work.entropy /= max(1e-12, tokens)
    in_time = answered - work.late[0] - work.late[1]
    work.correct = answered * accuracy
    work.good = in_time * accuracy
    work.good_tokens = in_time * accuracy * (terms.decoded + 1.0)
    mean_running = running / terms.slots
    work.batch_fill = min(1.0, mean_running / knobs.batch_size)
    work.cache_share = min(1.0, mean_running * terms.cache_share)


@inner
def _record(histogram, low, high, requests, decoded, times):
    """Add answers to the three histograms.

    Args:
        histogram: int64 [bins of all].
        low: least time to first token; they lie evenly up to `high`.
        high: likewise.
        requests: how many.
        decoded: rows of answers, ranked.  # [_RANKS]
        times: `Times`; that per token of an answer is spread about the mean as by a logistic distribution.
    """
    bins = histogram.shape[0] // 3
    for part in range(requests):
        share = (part + 0.5) / requests
        first = low + share * (high - low)
        rows = decoded[int(part * _GOLDEN % 1.0 * _RANKS)]
        noise = times.varies_s / math.sqrt(rows) + 0.01 * times.token_s
        each = max(times.least_s, times.token_s + 0.55 * noise * math.log(share / (1.0 - share)))
        histogram[latency_bin(first + rows * each)] += 1
        histogram[bins + latency_bin(first)] += 1
        histogram[2 * bins + latency_bin(10.0 * each)] += 1  # edges are a tenth of those of whole answers


def start(fixed, seed, state, i):
    """Begin with an idle device, an empty queue and an unadapted head, and draw what steps cost."""
    start_unadapted(state.weights[i])
    copy_row(state.purse[i], fixed.fresh_purse)
    server = state.server[i]
    server.unlearned, server.lessons, server.trust = 0.0, 0, FIRST_TRUST
    for c in range(2):
        server.next[c] = server.head[c] = 0
        server.begun[c] = server.ended[c] = server.prompts[c] = server.decoding[c] = server.late[c] = 0.0
    server.draw = integer(derive(seed, _STREAM), 0, fixed.pure.shape[0])
    server.period_s = 0.0
    for d in range(fixed.pure.shape[5]):
        server.period_s = max(
            server.period_s, fixed.pure[0, 0, 0, 0, 0, d, 0] + fixed.pure[0, 0, 0, 0, 0, d, 1]
        )


implement(Generate, start, serve)
