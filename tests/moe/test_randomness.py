"""Random numbers of compiled code against SciPy's distributions."""

import numba
import numpy as np
import pytest
from scipy import stats

from moe.randomness import SMALL_MEAN, derive, exponential, integer, normal, poisson, uniform

N = 200_000
KEY = np.uint64(12345)


@numba.njit
def draw(kind, key, n, mean):
    out = np.empty(n)
    for i in range(n):
        if kind == 0:
            out[i] = uniform(key, i, -1.0, 3.0)
        elif kind == 1:
            out[i] = normal(key, i)
        elif kind == 2:
            out[i] = exponential(key, i, mean)
        elif kind == 3:
            out[i] = integer(key, i, int(mean))
        else:
            out[i] = poisson(key, i, mean, mean**0.5)
    return out


@pytest.mark.parametrize(
    ("kind", "mean", "cdf"),
    [
        (0, 0.0, stats.uniform(-1.0, 4.0).cdf),
        (1, 0.0, stats.norm.cdf),
        (2, 7.0, stats.expon(scale=7.0).cdf),
    ],
)
def test_draws_follow_their_distribution(kind, mean, cdf):
    assert stats.kstest(draw(kind, KEY, N, mean), cdf).pvalue > 1e-3


def test_the_tail_of_the_normal():
    x = np.abs(draw(1, KEY, 20 * N, 0.0))
    for limit in (3.0, 3.5, 4.0, 4.5):  # the ziggurat's last layer begins at 3.44
        expected = 20 * N * 2.0 * stats.norm.sf(limit)
        assert np.sum(x > limit) == pytest.approx(expected, abs=float(5.0 * expected**0.5))


@pytest.mark.parametrize("mean", [0.0, 0.3, 4.0, SMALL_MEAN, SMALL_MEAN + 0.1, 100.0, 7000.0])
def test_poisson_moments(mean):
    x = draw(4, KEY, N, mean)
    assert np.all(x == np.floor(x)) and np.all(x >= 0.0)
    assert x.mean() == pytest.approx(mean, abs=5.0 * (mean / N) ** 0.5)
    assert x.var() == pytest.approx(mean, rel=0.02)
    if mean > 0.0:
        assert stats.skew(x) == pytest.approx(mean**-0.5, rel=0.05, abs=0.02)


@pytest.mark.parametrize("mean", [SMALL_MEAN + 0.1, 60.0])
def test_the_approximation_lies_close_to_the_distribution(mean):
    x = draw(4, KEY, N, mean)
    at = np.arange(int(mean + 12.0 * mean**0.5))
    empirical = np.searchsorted(np.sort(x), at, side="right") / N
    assert np.max(np.abs(empirical - stats.poisson(mean).cdf(at))) < 0.006


def test_integers_are_even():
    counts = np.bincount(draw(3, KEY, N, 7).astype(int), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-3


def test_streams_of_neighbouring_seeds_are_apart():
    keys = {int(derive(np.uint64(seed), np.uint64(number))) for seed in range(300) for number in range(300)}
    assert len(keys) == 300 * 300
    a = draw(1, derive(np.uint64(1), np.uint64(0)), 20_000, 0.0)
    b = draw(1, derive(np.uint64(2), np.uint64(0)), 20_000, 0.0)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
