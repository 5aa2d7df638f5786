"""Rules that say when to adapt."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.service.gates import (
    CHANGE_TEST,
    Always,
    ConfidenceChange,
    EntropyThreshold,
    InputShift,
    Never,
    Observed,
    Periodic,
    WhenCool,
    changed,
)
from tests.moe.service.page_hinkley import rise


def seen(confidence: float = 0.9, entropy: float = 0.1, stage: str = "NOMINAL") -> Observed:
    return Observed(entropy=entropy, confidence=confidence, stage=stage)


def test_the_plain_rules():
    assert [Always().decide(seen()), Never().decide(seen())] == [True, False]
    periodic = Periodic(3)
    assert [periodic.decide(seen()) for _ in range(7)] == [True, False, False, True, False, False, True]
    threshold = EntropyThreshold(0.3)
    assert [threshold.decide(seen(entropy=h)) for h in (0.2, 0.3, 0.31)] == [False, False, True]


LEVELS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 20)), max_size=6)
"""Two quantities that hold still for a while, then change."""
NOISE = st.floats(0, 0.05)
THRESHOLD, TOLERANCE = st.floats(0.003, 2), st.floats(0, 0.1)


def course(levels: list[tuple[float, float, int]], noise: float) -> list[tuple[float, float]]:
    """Values of both around their levels, within 0..1."""
    rng = np.random.default_rng(0)
    rows = [(a, b) for a, b, length in levels for _ in range(length)]
    shown = np.array(rows).reshape(-1, 2) + noise * rng.standard_normal((len(rows), 2))
    return [(float(a), float(b)) for a, b in shown.clip(0, 1)]


@given(LEVELS, NOISE, THRESHOLD, TOLERANCE)
def test_changed_is_the_page_hinkley_test(levels, noise, threshold, tolerance):
    test, since = np.zeros(CHANGE_TEST), []
    for value, _ in course(levels, noise):
        since.append(value)
        risen = rise(since, tolerance)
        if abs(risen - threshold) < 1e-9:
            return  # rounding decides
        assert changed(test, value, threshold, tolerance) == (risen > threshold)
        if risen > threshold:
            since = []
            assert not test.any()


@given(LEVELS, NOISE, THRESHOLD, TOLERANCE, st.integers(1, 5))
def test_the_rules_that_test_adapt_from_the_start_and_from_an_alarm_on(
    levels, noise, threshold, tolerance, adapt_for
):
    """`ConfidenceChange` tests every batch, `InputShift` both quantities unless it adapted before."""
    of_confidence = ConfidenceChange(threshold, tolerance, adapt_for)
    of_both = InputShift(threshold, tolerance, adapt_for)
    since, left = [], adapt_for
    both_since, both_left, adapted = [], adapt_for, False
    for confidence, entropy in course(levels, noise):
        since.append(confidence)
        risen = rise(since, tolerance)
        both_since.append((confidence, entropy))
        if adapted:
            both_since = []
        both_risen = [rise(values, tolerance) for values in zip(*both_since, strict=True)]
        if any(abs(each - threshold) < 1e-9 for each in (risen, *both_risen)):
            return  # rounding decides
        if risen > threshold:
            since, left = [], adapt_for
        if any(each > threshold for each in both_risen):
            both_since, both_left = [], adapt_for
        adapted = both_left > 0
        assert of_confidence.decide(seen(confidence, entropy)) == (left > 0)
        assert of_both.decide(seen(confidence, entropy)) == adapted
        left, both_left = max(left - 1, 0), max(both_left - 1, 0)


@pytest.mark.parametrize("before, after", [(0.1, 0.3), (0.3, 0.1)])
def test_a_change_of_entropy_alone_is_seen_by_the_rule_that_looks_at_it(before, after):
    rng = np.random.default_rng(0)
    entropies = np.repeat([before, after], 60) + 0.01 * rng.standard_normal(120).clip(-3, 3)
    confidences = 0.9 + 0.01 * rng.standard_normal(120).clip(-3, 3)
    rules = {kind: kind(0.1, 0.01, 1) for kind in (ConfidenceChange, InputShift)}
    adapts = {
        kind: [
            i for i, (c, h) in enumerate(zip(confidences, entropies, strict=True)) if rule.decide(seen(c, h))
        ]
        for kind, rule in rules.items()
    }
    assert adapts == {ConfidenceChange: [0], InputShift: [0, 60]}


def test_what_adaptation_changes_is_no_shift():
    """Confidence that rises because the rule said yes: one alarm from the shift, none from the rise."""
    gate, adapted, answers = InputShift(0.05, 0.005, 1), True, []
    for t in range(60):
        shifted = t >= 20
        if t == 20:
            adapted = False
        answers.append(gate.decide(seen(confidence=0.9 if adapted or not shifted else 0.7)))
        adapted |= answers[-1]
    assert [t for t, yes in enumerate(answers) if yes] == [0, 20]


@pytest.mark.parametrize("before, after", [(0.9, 0.6), (0.6, 0.9)])
def test_the_detector_sees_the_start_and_a_change_and_no_noise(before, after):
    rng = np.random.default_rng(0)
    detector = ConfidenceChange(threshold=0.5, tolerance=0.02, adapt_for=10)
    steady = [detector.decide(seen(c)) for c in before + 0.03 * rng.standard_normal(300).clip(-3, 3)]
    assert steady == [True] * 10 + [False] * 290
    later = [detector.decide(seen(c)) for c in after + 0.03 * rng.standard_normal(60)]
    assert 0 < later.index(True) < 4
    assert sum(later) == 10


def test_heat_forbids_but_the_rule_behind_sees_every_batch():
    cool = WhenCool(Periodic(2))
    stages = ["NOMINAL", "NOMINAL", "HOT", "NOMINAL", "NOMINAL", "CRITICAL", "ELEVATED"]
    assert [cool.decide(seen(stage=s)) for s in stages] == [True, False, False, False, True, False, False]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Periodic(0),
        lambda: EntropyThreshold(1.2),
        lambda: ConfidenceChange(threshold=0),
        lambda: ConfidenceChange(tolerance=math.nan),
        lambda: ConfidenceChange(adapt_for=0),
        lambda: InputShift(threshold=math.nan),
        lambda: seen(confidence=math.nan),
        lambda: seen(entropy=-0.1),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
