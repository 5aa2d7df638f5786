"""Statistics over units against scipy, brute force and known distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from agents.play.statistics import (
    Pair,
    bootstrap_interval,
    iqm,
    pair,
    per_unit,
    performance_profile,
    share_interval,
    unit_name,
)

Frame = Any
small = st.floats(-1e6, 1e6)
columns = hnp.arrays(np.float64, st.tuples(st.integers(1, 30), st.just(2)), elements=small)


@given(columns)
def test_iqm_is_the_mean_of_the_middle(values: np.ndarray) -> None:
    cut = len(values) // 4
    middle = np.sort(values, 0)[cut : len(values) - cut]
    np.testing.assert_allclose(iqm(values), middle.mean(0), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(iqm(values.T, axis=-1), stats.trim_mean(values, 0.25), rtol=1e-9, atol=1e-6)


def test_iqm_keeps_what_is_missing_and_trims_what_is_infinite() -> None:
    values = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, np.inf], [4.0, np.nan]])
    np.testing.assert_array_equal(iqm(values)[:1], [2.5])
    assert math.isnan(iqm(values)[1])  # not taken for the highest
    assert iqm(np.array([1.0, 2.0, 3.0, np.inf])) == 2.5
    assert np.isnan(iqm(np.zeros((0, 2)))).all()


@pytest.mark.parametrize(("units", "share"), [(40, (0.90, 0.98)), (3, (0.55, 0.9))])
def test_bootstrap_covers_as_often_as_it_should(units: int, share: tuple[float, float]) -> None:
    """Samples side by side in columns. Of three units it covers less than it claims, as documented."""
    samples = np.random.default_rng(1).normal(5.0, 2.0, (units, 400))
    low, high = bootstrap_interval(iqm, samples)
    covered = ((low <= 5.0) & (high >= 5.0)).mean()
    assert share[0] < covered < share[1]


def test_pairs_are_resampled_together_and_others_are_not() -> None:
    base = np.random.default_rng(2).lognormal(0.0, 1.0, 50)
    ratio = lambda a, b, axis=0: a.mean(axis) / b.mean(axis)  # noqa: E731
    low, high = bootstrap_interval(ratio, 0.5 * base, base, paired=True)
    assert (low, high) == pytest.approx((0.5, 0.5))
    low, high = bootstrap_interval(ratio, 0.5 * base, base[:20])
    assert low < 0.4 and high > 0.6
    again = bootstrap_interval(ratio, 0.5 * base, base[:20])
    assert (low, high) == again  # the same numbers at every call


@pytest.mark.parametrize("units", [0, 1, 2, 3])
def test_fewer_than_three_units_have_no_interval(units: int) -> None:
    values = np.arange(units, dtype=float)[:, None]
    for low, high in (
        bootstrap_interval(np.mean, values),
        share_interval(np.array([0.5]), units),
        Pair(values, values + 1.0, paired=True).compare(np.subtract)[1:],
        Pair(np.arange(5.0)[:, None], values, paired=False).probability_lower()[1:],
    ):
        assert np.isnan([low, high]).all() == (units < 3)


@pytest.mark.parametrize(("count", "units"), [(0, 5), (3, 10), (20, 20)])
def test_share_interval_is_wilsons(count: int, units: int) -> None:
    expected = stats.binomtest(count, units).proportion_ci(method="wilson")
    assert share_interval(np.array(count / units), units) == pytest.approx((expected.low, expected.high))


@given(
    hnp.arrays(np.float64, 6, elements=st.integers(0, 3)),
    hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(0, 3)),
)
def test_probability_of_improvement_by_brute_force(own: np.ndarray, base: np.ndarray) -> None:
    score = lambda a, b: 1.0 if a < b else 0.5 if a == b else 0.0  # noqa: E731
    value, low, high = Pair(own[:, None], base[:, None], paired=False).probability_lower()
    assert value[0] == pytest.approx(np.mean([score(a, b) for a in own for b in base]))
    mann_whitney = stats.mannwhitneyu(own, base, alternative="less").statistic  # counts own above base
    assert value[0] == pytest.approx(1.0 - mann_whitney / (len(own) * len(base)))
    assert len(base) < 3 or low[0] <= high[0]
    paired, low, high = Pair(own[:, None], own[::-1, None], paired=True).probability_lower()
    assert paired[0] == np.mean([score(a, b) for a, b in zip(own, own[::-1], strict=True)])
    assert 0.0 <= low[0] <= paired[0] <= high[0] <= 1.0


def test_pairs_tell_a_small_improvement_from_how_requests_differ() -> None:
    base = np.random.default_rng(3).lognormal(0.0, 1.0, (20, 1))
    assert Pair(0.99 * base, base, paired=True).probability_lower()[0] == 1.0
    assert Pair(0.99 * base, base, paired=False).probability_lower()[0] == pytest.approx(0.5, abs=0.05)
    missing = np.where(base == base.max(), np.nan, base)
    assert np.isnan(Pair(missing, base, paired=True).probability_lower()[0])


@given(
    hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0.0, 3.0) | st.just(np.inf)),
    hnp.arrays(np.float64, 9, elements=st.floats(0.0, 4.0)),
)
def test_performance_profile_counts(values: np.ndarray, thresholds: np.ndarray) -> None:
    thresholds.sort()
    profile = performance_profile(values, thresholds)
    assert profile.tolist() == [sum(v <= t for v in values.tolist()) / len(values) for t in thresholds]
    assert (np.diff(profile) >= 0.0).all()


def table(values: np.ndarray, runs: list[str], seeds: list[int]) -> Frame:
    """Rows of an episodes table, run by run."""
    return pd.DataFrame({"run": np.repeat(runs, len(seeds)), "seed": seeds * len(runs), "x": values.ravel()})


def test_units_of_rules_and_of_trained_algorithms() -> None:
    rng = np.random.default_rng(4)
    rule, other = table(rng.random(4), [""], [1, 2, 3, 4]), table(rng.random(4), [""], [4, 3, 2, 9])
    sac = table(rng.random((3, 4)), ["seed-0", "seed-1", "seed-2"], [1, 2, 3, 4])
    ppo = table(rng.random((5, 3)), [f"seed-{i}" for i in range(5)], [4, 3, 2])
    assert (unit_name(rule), unit_name(sac)) == ("episode seed", "training seed")
    np.testing.assert_allclose(per_unit(sac, ["x"])[:, 0], sac.x.to_numpy().reshape(3, 4).mean(1))

    both = pair(rule, other, ["x"])  # by seed, whatever the order
    assert both.paired
    np.testing.assert_array_equal(both.own[:, 0], rule.x[1:4])
    np.testing.assert_array_equal(both.base[:, 0], other.x[[2, 1, 0]])

    both = pair(sac, other, ["x"])
    assert both.paired and both.own.shape == (3, 1)
    np.testing.assert_allclose(both.own[:, 0], sac.x.to_numpy().reshape(3, 4)[:, 1:].mean(1))
    np.testing.assert_allclose(both.base[:, 0], other.x[:3].mean())
    mirrored = pair(other, sac, ["x"])
    np.testing.assert_array_equal(mirrored.own, both.base)
    np.testing.assert_array_equal(mirrored.base, both.own)

    both = pair(sac, ppo, ["x"])
    assert not both.paired and (len(both.own), len(both.base)) == (3, 5)
    np.testing.assert_allclose(both.own[:, 0], sac.x.to_numpy().reshape(3, 4)[:, 1:].mean(1))
    assert not len(pair(rule, other[other.seed > 5], ["x"]).own)


def test_more_episodes_do_not_make_up_for_training_seeds() -> None:
    """Repeating every episode leaves an algorithm's interval where it was."""
    values = np.random.default_rng(5).random((4, 5))
    runs = [f"seed-{i}" for i in range(4)]
    few = table(values, runs, list(range(5)))
    many = table(np.tile(values, (1, 20)), runs, list(range(100)))
    expected = bootstrap_interval(iqm, per_unit(few, ["x"]))
    np.testing.assert_allclose(bootstrap_interval(iqm, per_unit(many, ["x"])), expected)
