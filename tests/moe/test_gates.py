"""Rules that say when to adapt."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.gates import Always, ConfidenceChange, EntropyThreshold, Never, Observed, Periodic, WhenCool


def seen(confidence: float = 0.9, entropy: float = 0.1, stage: str = "NOMINAL") -> Observed:
    return Observed(entropy=entropy, confidence=confidence, stage=stage)


def test_the_plain_rules():
    assert [Always().decide(seen()), Never().decide(seen())] == [True, False]
    periodic = Periodic(3)
    assert [periodic.decide(seen()) for _ in range(7)] == [True, False, False, True, False, False, True]
    threshold = EntropyThreshold(0.3)
    assert [threshold.decide(seen(entropy=h)) for h in (0.2, 0.3, 0.31)] == [False, False, True]


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.05, 2), st.floats(0, 0.2), st.integers(1, 5))
def test_the_detector_is_the_page_hinkley_test(confidences, threshold, tolerance, adapt_for):
    """Against the definition, summed anew for every batch since the last alarm."""
    detector, since, left = ConfidenceChange(threshold, tolerance, adapt_for), [], adapt_for
    for confidence in confidences:
        since.append(confidence)
        means = np.cumsum(since) / np.arange(1, len(since) + 1)
        deviations = np.stack([means - since, since - means])  # below and above
        sums = np.cumsum(deviations - tolerance, axis=1)
        rise = (sums[:, -1] - np.minimum(0.0, sums.min(axis=1))).max()
        if abs(rise - threshold) < 1e-9:
            return  # rounding decides
        if rise > threshold:
            since, left = [], adapt_for
        assert detector.decide(seen(confidence)) == (left > 0)
        left = max(left - 1, 0)


@pytest.mark.parametrize("before, after", [(0.9, 0.6), (0.6, 0.9)])
def test_the_detector_sees_the_start_and_a_change_and_no_noise(before, after):
    rng = np.random.default_rng(0)
    detector = ConfidenceChange(threshold=0.5, tolerance=0.02, adapt_for=10)
    steady = [detector.decide(seen(c)) for c in before + 0.03 * rng.standard_normal(300).clip(-3, 3)]
    assert steady == [True] * 10 + [False] * 290
    changed = [detector.decide(seen(c)) for c in after + 0.03 * rng.standard_normal(60)]
    assert 0 < changed.index(True) < 4
    assert sum(changed) == 10


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
        lambda: seen(confidence=math.nan),
        lambda: seen(entropy=-0.1),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
