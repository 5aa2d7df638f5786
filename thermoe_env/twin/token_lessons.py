"""Adaptation of the token service on the mean, compiled: the head learns from prompts (`moe.lm.adapt`).

Two heads learn by turns, each from one half of the documents. Here they are one, which learns when each has
had a lesson. What is learned and forgotten is `moe.lesson_fit`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe.compiled import inlined
from moe.lesson_fit import learn
from moe.lm.config import HALVES
from moe.service.budget import balance_of, pay_steps
from moe.service.queueing import SLOT_S
from thermoe_env.device.physics import clock_power_factor
from thermoe_env.twin.token_steps import Steps


class Lessons(NamedTuple):
    """What a lesson is, and what it takes at full clock."""

    rows: float
    seconds: float
    joules: float
    margin: float
    """Of the guard, see `moe.lm.adapt.HeadSettings`."""


class Learning(NamedTuple):
    """What compiled code knows of adaptation."""

    lessons: np.ndarray
    """`Lessons`, an array of one record."""
    rate: np.ndarray
    """Of each domain, see `moe.lesson_fit.learn`.  # [S]"""
    changed: np.ndarray
    """[S, Q, 4] what each pure state changes: accuracy, confidence, entropy, and loss (relative)."""
    loss: np.ndarray
    """[S, Q] the last of these."""


@inlined
def rows_of_lesson(terms, lessons, prompts):
    """Rows of prompts that come by for a lesson, where a step reads so many prompts.

    The rows with which a step fills a lesson beyond what it lacks are lost: of pieces of mean m and mean
    square m2 that is m2 / 2m on the mean (Feller, Probability II, XI.4). A piece is what a step reads of one
    half of the documents.
    """
    return lessons.rows + 0.5 * terms.prompt * (max(1.0, prompts / HALVES) + terms.prompt_variance)


@inlined
def _prompt_rows(terms, steps):
    """Rows of prompts of a step that reads some."""
    return steps.filled * max(1.0, terms.max_rows - steps.rows)


@inlined
def lesson_time(learning, purse, clock):
    """How long a lesson lasts now, 0 where none can be paid.

    Args:
        learning: `Learning`.
        purse: what may be spent, see `moe.service.budget`.
        clock: fraction at which the device runs.
    """
    lessons = learning.lessons[0]
    if purse.shape[0] > 0 and balance_of(purse) < lessons.joules * clock_power_factor(clock) / clock:
        return 0.0
    return lessons.seconds / clock


@inlined
def with_lessons(terms, learning, steps, seconds, pace):
    """Steps of which those that read prompts are followed by lessons, each of so many seconds."""
    rows = _prompt_rows(terms, steps)
    needed = rows_of_lesson(terms, learning.lessons[0], rows / terms.prompt)
    busy, mixed = steps.busy_s + steps.mixed_share * rows / needed * seconds, steps.mixed_s
    mixed += rows / needed * seconds
    return Steps(busy / pace, busy, steps.filled, steps.mixed_share, mixed, steps.pure_s, steps.rows)


@inlined
def take_lessons(terms, learning, server, weights, purse, shift, steps, read, serving_j, clock, work):
    """Learn from the prompts that a slot read.

    Args:
        terms: `thermoe_env.twin.generate.Terms`.
        learning: `Learning`.
        server: record of `SERVER_DTYPE`; the rows that wait for a lesson are updated.
        weights: of the pure states, float [Q]; updated.
        purse: pays, unless it is `moe.service.budget.UNLIMITED`.
        shift: domain of the prompts.
        steps: of the slot.
        read: how many prompts.
        serving_j: energy of the slot's steps, which the purse earns by.
        clock: fraction at which the device runs.
        work: record of `moe.workload.WORK_DTYPE`; added to.

    Returns:
        Energy of the lessons.
    """
    lessons = learning.lessons[0]
    needed = rows_of_lesson(terms, lessons, _prompt_rows(terms, steps) / terms.prompt)
    server.unlearned += read * max(0.0, terms.prompt - 1.0)  # behind its last token comes an answer
    asked = int(server.unlearned / needed)
    server.unlearned -= asked * needed
    joules = lessons.joules * clock_power_factor(clock) / clock
    paid = asked
    if purse.shape[0] > 0:
        paid = pay_steps(purse, SLOT_S, serving_j, joules, asked)
    server.lessons += paid
    server.trust, returns = learn(
        weights, server.trust, shift, server.lessons // HALVES, learning.rate[shift], learning.loss[shift],
        lessons.margin,
    )  # fmt: skip
    server.lessons %= HALVES
    work.ttt_rolled_back += returns * HALVES
    work.ttt_steps += paid
    work.ttt_refused += asked - paid
    work.ttt_busy_s += paid * lessons.seconds / clock
    return paid * joules


@inlined
def add_learned(learning, weights, shift, tokens, work):
    """Add what adaptation changes in so many tokens' worth."""
    if weights[0] == 1.0:
        return
    for state in range(1, weights.shape[0]):
        if weights[state] > 0.0:
            share, changed = tokens * weights[state], learning.changed[shift, state]
            work.right_tokens += share * changed[0]
            work.confidence += share * changed[1]
            work.entropy += share * changed[2]
