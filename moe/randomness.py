"""Random numbers for compiled code: draw number i of the stream `key` is a function of both.

No generator has a state, so what is drawn depends neither on how many environments run nor on threads. Bits
are those of splitmix64: Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import math

import numpy as np

from moe.compiled import inlined, inner, jit, small

SMALL_MEAN = 30.0
"""Poisson means up to this one are drawn exactly, above it from a normal approximation."""

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_SIXTH = 1.0 / 6.0
_TO_UNIT, _TO_SIGNED_UNIT = 2.0**-53, 2.0**-52

_LAYERS, _LAYER_BITS = 128, np.uint64(127)
_TAIL = 3.442619855899
"""Where the ziggurat's tail begins, and (next) the area of each of its layers."""
_AREA = 9.91256303526217e-3


@small
def _mixed(z):
    """Scramble a uint64."""
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@small
def bits(key, i):
    """64 random bits: draw number `i` of a stream, uint64."""
    return _mixed(key + np.uint64(i + 1) * _STEP)


@jit
def derive(seed, number):
    """Key of the stream number `number` of a seed, both uint64; or the seed number `number` that follows."""
    return _mixed(_mixed(seed + _STEP) + number * _STEP)


@small
def uniform(key, i, low, high):
    """Uniform in the open interval (low, high)."""
    return low + (high - low) * ((np.float64(np.int64(bits(key, i) >> _11)) + 0.5) * _TO_UNIT)


@small
def integer(key, i, n):
    """Uniform integer in [0, n)."""
    return min(int(uniform(key, i, 0.0, n)), n - 1)


@small
def exponential(key, i, mean):
    """Exponential with the given mean."""
    return -mean * math.log(uniform(key, i, 0.0, 1.0))


def _ziggurat() -> np.ndarray:
    """Right edges of 128 layers of equal area under exp(-x**2 / 2), widest first, float [129]."""
    edge = np.zeros(_LAYERS + 1)
    edge[0], edge[1] = _AREA * math.exp(0.5 * _TAIL * _TAIL), _TAIL
    for i in range(2, _LAYERS):
        edge[i] = math.sqrt(-2.0 * math.log(_AREA / edge[i - 1] + math.exp(-0.5 * edge[i - 1] ** 2)))
    return edge


_EDGE = _ziggurat()


@inlined
def normal(key, i):
    """Standard normal, by the ziggurat method (Marsaglia and Tsang, J. Stat. Softw. 5(8), 2000)."""
    drawn = bits(key, i)
    layer, x = _in_layer(drawn)
    return x if abs(x) < _EDGE[layer + 1] else _beyond_layer(drawn, layer, x)


@small
def _in_layer(drawn):
    """A layer, which the 7 lowest bits choose, and a point of it."""
    layer = np.int64(drawn & _LAYER_BITS)
    return layer, np.float64(np.int64(drawn) >> 11) * _TO_SIGNED_UNIT * _EDGE[layer]


@inner
def _beyond_layer(key, layer, x):
    """The rare rest of `normal`, with a stream of its own: apart, so that the common case stays small."""
    i = 0
    while abs(x) >= _EDGE[layer + 1]:
        if layer == 0:
            beyond = exponential(key, i, 1.0 / _TAIL)
            if 2.0 * exponential(key, i + 1, 1.0) >= beyond * beyond:
                return math.copysign(_TAIL + beyond, x)
        else:
            low, high = math.exp(-0.5 * _EDGE[layer] ** 2), math.exp(-0.5 * _EDGE[layer + 1] ** 2)
            if low + uniform(key, i, 0.0, 1.0) * (high - low) < math.exp(-0.5 * x * x):
                return x
        layer, x = _in_layer(bits(key, i + 2))
        i += 3
    return x


@inlined
def poisson(key, i, mean, root):
    """Poisson count; above `SMALL_MEAN` a normal with the Poisson's skewness, rounded.

    Args:
        key: of the stream.
        i: number of the draw.
        mean: of the count.
        root: square root of the mean (many counts of one mean are drawn in a row).
    """
    if mean <= SMALL_MEAN:
        return _small_poisson(bits(key, i), mean)
    z = normal(key, i)
    return max(0, int(mean + root * z + (z * z - 1.0) * _SIXTH + 0.5))


@inner
def _small_poisson(key, mean):
    """Exact: how many exponential gaps of mean 1 fit into `mean`."""
    count, passed = 0, exponential(key, 0, 1.0)
    while passed < mean:
        count += 1
        passed += exponential(key, count, 1.0)
    return count
