"""A slot of the token service on the mean, compiled: see `thermoe_env.twin.generate`."""

from __future__ import annotations

import math
from typing import NamedTuple

from moe.compiled import inlined
from moe.lm.config import AHEAD
from moe.service.queueing import SLOT_S
from thermoe_env.twin.token_lessons import with_lessons
from thermoe_env.twin.token_steps import Steps, either_class, own_prompts, steps_of

TRANSIT = AHEAD + 1.0
"""Steps in which a place is taken and no row of an answer runs: those that were launched before its last
token came back, and the one that reads the next prompt."""
_ITERATIONS = 2


class Slot(NamedTuple):
    """A slot on the mean."""

    left: float
    """Share of the answers under way that still are at its end."""
    spread: float
    """Likewise of those that begin in it, evenly."""
    given: float
    """Tokens."""
    read: float
    """Prompts that are read."""
    mean: float
    """Rows that decode."""
    busy: float
    """Share of the time in which steps run."""
    per_step: float
    """Prompts that a step reads."""
    second: float
    """Deferrable requests that could be let run."""
    begun: tuple[float, float]
    """Prompts that a step reads, per class."""
    crowded: bool
    """Whether more wait than are let run or read."""
    steps: Steps


@inlined
def mean_slot(fixed, server, shift, k, b, clocks, pace, places, deferrable, wanted, came, lesson_s):
    """Find what follows from each other in a slot: rows, prompts and how long a step lasts.

    Args:
        fixed: `Generate`.
        server: record of `SERVER_DTYPE`; the period is updated.
        shift: domain of the text.
        k: level of the experts per token.
        b: level of the routing bias.
        clocks: float [D].
        pace: cap on the devices' busy share.
        places: most sequences.
        deferrable: of these, for deferrable requests.
        wanted: per class, requests that wait or arrive.
        came: per class, those that arrive.
        lesson_s: time of a lesson, 0 where nothing is learned.
    """
    terms = fixed.terms[0]
    decoding, unread = server.decoding[0] + server.decoding[1], server.prompts[0] + server.prompts[1]
    period = server.period_s
    rows = decoding
    read, left, spread, mean, busy, per_step = 0.0, 1.0, 0.0, 0.0, 0.0, 0.0
    begun, crowded, second, z = (0.0, 0.0), False, 0.0, 0.0
    steps = Steps(period, period, 0.0, 0.0, 0.0, 0.0, 1.0)
    for _ in range(_ITERATIONS):
        z = SLOT_S / (terms.decoded * period)
        left = math.exp(-z)
        spread = (1.0 - left) / z
        each = spread + TRANSIT * period / SLOT_S  # places that one who enters holds at the end
        free = max(0.0, deferrable - server.decoding[1] * left - server.prompts[1])
        second = min(wanted[1], free / each)
        # Prompts that are read, and who is let run.
        room = max(0.0, places - decoding * left) / each
        bound = max(1.0, terms.max_rows - rows) / terms.prompt * SLOT_S / period
        full = wanted[0] + second + unread
        read = min(full, min(room, bound))
        mean = decoding * spread + read * (1.0 - spread) / z
        per_step = read * period / SLOT_S
        active = mean + per_step * steps.mixed_s / period
        busy = 1.0 - math.exp(-active * (1.0 + 0.14 * active)) if active < 6.0 else 1.0
        rows = max(1.0, mean / busy) if busy > 0.0 else 1.0
        per_step /= max(busy, 1e-12)
        of_first = per_step * came[0] / max(1.0, came[0] + came[1])
        begun, crowded = (of_first, per_step - of_first), read < full
        share = either_class(begun[0], begun[1])
        if crowded:  # whoever enters does so when another ends, at any time
            share = 1.0 - math.exp(-per_step)
        needs = per_step * terms.prompt / max(1.0, terms.max_rows - rows)
        share = min(1.0, max(share, needs))
        filled = min(1.0, needs / share) if share > 0.0 else 0.0
        steps = steps_of(fixed, server.draw, shift, k, b, rows, filled, share, clocks, pace)
        if lesson_s > 0.0:
            steps = with_lessons(terms, fixed.learning, steps, lesson_s, pace)
        period = steps.period_s
    server.period_s = period
    given = mean * z * terms.decoded + read  # what ended has all its tokens
    return Slot(left, spread, given, read, mean, busy, per_step, second, begun, crowded, steps)


class Times(NamedTuple):
    """How long the requests of a class take in a slot."""

    first_s: float
    """From where a request is let run to its first token."""
    token_s: float
    """Mean time per token after it."""
    varies_s: float
    """Standard deviation of a step's."""
    noise_s: float
    """Of an answer's time per token."""
    least_s: float
    """Of a step that reads no prompt."""


@inlined
def times_of(terms, slot, c, pace, wait_s):
    """`Times` of class `c`, whose prompts wait for `wait_s` until the first step that reads them begins."""
    steps = slot.steps
    pure_s, extra_s = steps.pure_s / pace, (steps.mixed_s - steps.pure_s) / pace
    # Prompts come to steps by chance, and so do their lengths (a compound Poisson sum), as far as there is
    # room for them.
    by_chance = math.sqrt((1.0 + terms.prompt_variance) / max(1e-9, slot.per_step))
    varies_s = steps.mixed_share * extra_s * by_chance
    varies_s *= math.sqrt(1.0 - steps.mixed_share * steps.filled * steps.filled)
    noise_s = varies_s / math.sqrt(terms.decoded_harmonic) + 0.01 * steps.period_s
    ahead = behind = steps.mixed_share
    if not slot.crowded:
        ahead = either_class(slot.begun[1 - c], max(0.0, slot.begun[c] - 0.5 / AHEAD))
        behind = either_class(slot.begun[1 - c], own_prompts(slot.begun[c], terms.decoded))
    first_s = slot.busy * (AHEAD * (pure_s + ahead * extra_s) + 0.55 * steps.period_s)
    first_s += steps.mixed_s + wait_s
    return Times(first_s, pure_s + behind * extra_s, varies_s, noise_s, pure_s)
