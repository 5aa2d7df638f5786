"""Statistics over units of replication: interquartile means, intervals, shares, comparisons.

The unit is what a repetition would draw anew, never an episode for its own sake. A rule, and a single
trained model, is repeated on other requests: its unit is the episode seed, which it shares with the policy
that it is compared with. An algorithm is repeated by training it again: its unit is the training seed, and
the value of one its mean over the episode seeds, however many. Fewer than `MIN_UNITS` units have no interval.

After Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021.
Their strata are tasks; here all is on one scenario, so a policy is a stratum, resampled within itself. Their
package rliable does not import beside pandas 3, ignores the seed of its resampling and knows no pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

MIN_UNITS = 3
CONFIDENCE = 0.95
_RESAMPLES = 2000

Interval = tuple[np.ndarray, np.ndarray]


def mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean; NaN where there are no values."""
    return values.mean(axis) if values.shape[axis] else np.full(np.delete(values.shape, axis), np.nan)


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: of what is left without the lowest and the highest quarter, rounded down.

    Of three values it is their mean. NaN where there are none, or one is NaN.
    """
    ordered = np.sort(np.moveaxis(values, axis, 0), 0)  # `scipy.stats.trim_mean` is slow where one is NaN
    cut = len(ordered) // 4
    middle = mean(ordered[cut : len(ordered) - cut])
    return np.where(np.isnan(values).any(axis), np.nan, middle)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, paired: bool = False
) -> Interval:
    """95% interval of a statistic by the percentile bootstrap, the same one at every call.

    Where units are few it is narrower than it claims, as every percentile interval.

    Args:
        statistic: of the samples and `axis`, vectorized.
        samples: [units, ...] each, resampled along the units: together where paired, else each within itself.
        paired: whether unit i of one sample belongs to unit i of the others.

    Returns:
        Lower and upper limits, [...]; NaN for fewer than `MIN_UNITS` units in a sample.
    """
    if min(len(sample) for sample in samples) < MIN_UNITS:
        return np.full(samples[0].shape[1:], np.nan), np.full(samples[0].shape[1:], np.nan)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # of missing values, which give NaN limits
        result = stats.bootstrap(
            samples, statistic, paired=paired, axis=0, vectorized=True, n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
    return result.confidence_interval.low, result.confidence_interval.high


def share_interval(share: np.ndarray, units: int) -> Interval:
    """95% interval of shares of the units: Wilson's (1927). At 0 and 1 a bootstrap's would be a point.

    Args:
        share: [...]; units may count half, as ties do, which only makes the interval wider than it need be.
        units: how many.

    Returns:
        Lower and upper limits, [...]; NaN for fewer than `MIN_UNITS` units.
    """
    if units < MIN_UNITS:
        return np.full_like(share, np.nan), np.full_like(share, np.nan)
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    scale = 1.0 + z**2 / units
    middle = (share + z**2 / (2 * units)) / scale
    half = z / scale * np.sqrt(share * (1.0 - share) / units + z**2 / (4 * units**2))
    return np.clip(middle - half, 0.0, share), np.clip(middle + half, share, 1.0)


def performance_profile(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the units with a value of at most each threshold, [thresholds]; their distribution."""
    return (values <= thresholds[:, None]).mean(1)


@dataclass(frozen=True)
class Pair:
    """A policy and another on the episode seeds that both played.

    Where at least one of them is a rule, row i of both is the same unit: an episode seed where both are, else
    a training seed, with the rule's mean over the same episodes beside it. Two algorithms share no unit:
    equal numbers of training seeds mean nothing.
    """

    own: np.ndarray
    """[units, indicators]"""
    base: np.ndarray
    """Likewise, of the other policy."""
    paired: bool

    def compare(self, paired: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Interquartile mean of an elementwise comparison (`np.divide`, `np.subtract`), and its interval.

        Of paired units it is taken unit by unit; of two algorithms, between their interquartile means.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.paired:
                values = paired(self.own, self.base)
                return iqm(values), *bootstrap_interval(iqm, values)

            def statistic(own: np.ndarray, base: np.ndarray, axis: int = 0) -> np.ndarray:
                return paired(iqm(own, axis), iqm(base, axis))

            return statistic(self.own, self.base), *bootstrap_interval(statistic, self.own, self.base)

    def probability_lower(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability that the policy's value is below the other's, and its 95% interval, [indicators] each.

        Ties count half. Of paired units it is the share of units in which it is lower: both met the same
        requests, so what they do on other requests is no comparison. The Mann-Whitney estimate, the share of
        all pairs of any unit with any other, would mix in how requests differ and lean to one half; it is
        right for two algorithms, whose training seeds are independent, and taken there. The interval is
        Wilson's for paired units, else a bootstrap of each algorithm's training seeds.
        """
        if self.paired:
            lower = _lower(self.own, self.base)
            return mean(lower), *share_interval(mean(lower), len(lower))

        def statistic(own: np.ndarray, base: np.ndarray, axis: int = 0) -> np.ndarray:
            own, base = np.moveaxis(own, axis, 0), np.moveaxis(base, axis, 0)
            lower = _lower(own[:, None], base[None])
            return mean(lower.reshape(-1, *lower.shape[2:]))

        return statistic(self.own, self.base), *bootstrap_interval(statistic, self.own, self.base)


def _lower(own: np.ndarray, base: np.ndarray) -> np.ndarray:
    """1 where own is lower, 1/2 where equal, 0 where higher, NaN where one is missing."""
    score = (own < base) + 0.5 * (own == base)
    return np.where(np.isnan(own) | np.isnan(base), np.nan, score)


def unit_name(episodes: pd.DataFrame) -> str:
    """What a policy's unit is, by its rows of the episodes table."""
    return "training seed" if _trained(episodes) else "episode seed"


def per_unit(episodes: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Indicators per unit of a policy, [units, names]; of a training seed, means over its episodes."""
    columns = list(names)
    if not _trained(episodes):
        return episodes[columns].to_numpy(float)
    return np.stack([run[columns].to_numpy(float).mean(0) for run in _runs(episodes)])


def pair(own: pd.DataFrame, base: pd.DataFrame, names: Sequence[str]) -> Pair:
    """Two policies on the seeds that both played, by their rows of the episodes table."""
    columns = list(names)
    if _trained(own) and _trained(base):
        seeds = set.intersection(*(set(run.seed) for run in (*_runs(own), *_runs(base))))
        common: list[Any] = [x[x.seed.isin(seeds)] for x in (own, base)]
        return Pair(*(per_unit(x, columns) for x in common), paired=False)
    pairs = []
    for x in _runs(own):
        for y in _runs(base):  # at most one of them has several
            seeds = sorted(set(x.seed) & set(y.seed))
            both = [z.set_index("seed").loc[seeds, columns].to_numpy(float) for z in (x, y)]
            averaged = len(seeds) > 0 and (_trained(own) or _trained(base))
            pairs.append([values.mean(0, keepdims=True) if averaged else values for values in both])
    none = np.zeros((0, len(columns)))
    left, right = ([none, *side] for side in zip(*pairs, strict=True)) if pairs else ([none], [none])
    return Pair(np.concatenate(left), np.concatenate(right), paired=True)


def _trained(episodes: pd.DataFrame) -> bool:
    return bool((episodes.run != "").any())


def _runs(episodes: pd.DataFrame) -> list[pd.DataFrame]:
    return [rows for _, rows in episodes.groupby("run", sort=False)]
