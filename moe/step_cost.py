"""Time and energy of a step of the token service, for any rows and knobs: a small form fitted to a profile.

What a step reads and computes are few amounts (as in the roofline model, Williams et al., CACM 2009: bytes
moved and arithmetic, and a constant for launches). Time and energy are sums of amounts times rates, none
below zero, fitted to the measured cells by least squares of the relative error. How many experts rows read
is no formula: it is interpolated between what was counted.

Energies are above idle. Shapes: C cells, F terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from moe.lm.config import ROW_BUCKETS
from moe.profiles import ProfileError
from moe.token_profile import CostCell, TokenProfile

TERMS = ("launch", "experts", "cache", "rows", "expert rows", "prompt attention", "expert tiles")
"""What a step is made of: a constant; bytes of the experts that are read, and of keys and values; rows of the
graph that runs; rows times experts each; pairs of a prompt's row and a position that it attends to; tiles of
rows beyond each expert's first."""
_TILE_ROWS = (16, 64)
"""Rows of a tile of the expert kernels, in steps of at most `_SMALL` rows and in larger ones."""
_SMALL = 128
_SHARPNESS = 8.0
"""How suddenly a limit of readable experts begins to bind: power of the norm that joins both numbers."""


class StepWork(NamedTuple):
    """What steps do; numbers or arrays alike in shape."""

    decode_rows: Any
    prompt_rows: Any
    cached: Any
    """Positions whose keys and values are read."""
    prompt_pairs: Any
    """Pairs of a prompt's row and a position that it attends to."""
    top_k: Any
    experts_read: Any
    """Of a layer."""


def work_of(cell: CostCell) -> StepWork:
    """What the step of a measured cell does."""
    pairs, cached, left = 0.0, float(cell.decode_rows * cell.context), cell.prefill_rows
    while left > 0:
        rows = min(left, cell.context)  # a chunk of another prompt, which ends at the context
        pairs += rows * (cell.context - (rows - 1) / 2)
        cached += cell.context
        left -= rows
    return StepWork(cell.decode_rows, cell.prefill_rows, cached, pairs, cell.top_k, cell.experts_read)


@dataclass(frozen=True)
class Residuals:
    """Relative errors of a fit, predicted over measured less 1."""

    fitted: np.ndarray
    """Of the cells that made it."""
    held_out: np.ndarray
    """Of those that did not."""


@dataclass(frozen=True)
class Fit:
    """Rates of a quantity.

    Attributes:
        rate: Per unit of each of `TERMS`, at least 0.  # [F]
        covariance: Of the rates, from the spread of the residuals; 0 for a rate at its bound.  # [F, F]
    """

    rate: np.ndarray
    covariance: np.ndarray
    residuals: Residuals

    def draws(self, number: int, spread: float, rng: np.random.Generator) -> np.ndarray:
        """Rates as they might be as well, none below zero.  # [number, F].

        The covariance alone says how sure the rates are if the form is right. It is not quite: so draws are
        spread until what they say of the measured steps is off by as much, on the mean, as the form is.

        Args:
            number: how many.
            spread: times that; 0 gives the fit itself.
            rng: of the draws.
        """
        free = max(1, int((self.rate > 0.0).sum()))
        wider = self.covariance * len(self.residuals.fitted) / free
        values, vectors = np.linalg.eigh(wider)  # of a bound rate 0, so it may be singular
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return np.maximum(0.0, self.rate + spread * rng.standard_normal((number, len(self.rate))) @ root.T)


class ExpertReads:
    """Experts of a layer that rows read, between counted numbers.

    With e read of E, -log(1 - e/E) is the rows' *pressure*: it adds up over rows that choose independently.
    Its logarithm is a straight line between counts over that of the rows, of answers and of prompts apart.
    Answers about one domain read what was counted over whole ones of that domain. Rows of both overlap: how
    much is one number, fitted to steps that had both.
    """

    def __init__(self, profile: TokenProfile) -> None:
        """Take the counts of a profile.

        Raises:
            ProfileError: steps are missing.
        """
        cells = [cell for cell in profile.cost.cells if not cell.held_out]
        self.n_experts = profile.cost.config["n_experts"]
        self._answers: dict[tuple[int, str | None], tuple[np.ndarray, np.ndarray]] = {}
        self._prompts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for k in sorted({cell.top_k for cell in cells}):
            here = [cell for cell in cells if cell.top_k == k]
            steps = {
                c.decode_rows: c.experts_read
                for c in profile.cost.decode_grid()
                if c.top_k == k and c.readable == self.n_experts
            }
            whole = {
                c.running: c.by_domain
                for c in profile.quality.cells
                if c.top_k == k and c.routing_bias == 0.0
            }
            prompts = {c.prefill_rows: c.experts_read for c in here if not c.decode_rows} | {1: float(k)}
            if len(steps) < 2 or len(prompts) < 2 or not whole:
                raise ProfileError(
                    f"the profile counted too few steps at {k} experts per token for a curve: two numbers of "
                    "rows of answers, one of prompts and a quality are needed; measure it again: python -m "
                    "moe.profiling tokens"
                )
            rows, pressure = self._answers[k, None] = self._curve(steps)
            for name in profile.quality.standard:
                at, counted = self._curve({n: of[name].experts_read for n, of in whole.items()})
                off = counted - _line(at, rows, pressure)
                self._answers[k, name] = rows, pressure + np.interp(rows, at, off)
            self._prompts[k] = self._curve(prompts)
        both = [cell for cell in cells if cell.decode_rows and cell.prefill_rows]
        self._overlap = 0.0
        if both:
            n, m, k = (
                np.array([getattr(c, a) for c in both]) for a in ("decode_rows", "prefill_rows", "top_k")
            )
            counted = np.array([cell.experts_read for cell in both])

            def error(overlap: float) -> float:
                self._overlap = overlap
                return float(((self._unlimited(n, m, k) / counted - 1.0) ** 2).sum())

            best: Any = minimize_scalar(error, bounds=(0.0, 1.0), method="bounded")
            self._overlap = float(best.x)

    def __call__(
        self, decode_rows: Any, prompt_rows: Any, top_k: Any, readable: Any, domain: str | None = None
    ) -> np.ndarray:
        """Experts that steps read; arguments broadcast. `top_k` must be one that was measured.

        Answers are about `domain`; None: about text as mixed as that of the measured steps.
        """
        n, m, k, limit = np.broadcast_arrays(*map(np.asarray, (decode_rows, prompt_rows, top_k, readable)))
        free = self._unlimited(n, m, k, domain)
        # Less the pool of all: where all are readable, or all would be read, nothing is rounded off.
        norms = free**-_SHARPNESS + limit.astype(float) ** -_SHARPNESS - self.n_experts**-_SHARPNESS
        return norms ** (-1.0 / _SHARPNESS)

    def _unlimited(
        self, n: np.ndarray, m: np.ndarray, k: np.ndarray, domain: str | None = None
    ) -> np.ndarray:
        found = np.empty(n.shape)
        for top_k in np.unique(k):
            at = k == top_k
            rows, pressure = self._answers[int(top_k), domain]
            prompts = self._prompts[int(top_k)]
            answers = np.where(n[at] > 0, np.exp(_line(np.log(np.maximum(n[at], 1e-9)), rows, pressure)), 0.0)
            beside = np.where(m[at] > 0, np.exp(_line(np.log(np.maximum(m[at], 1e-9)), *prompts)), 0.0)
            # As many rows of answers as would read what the prompts do, for those that choose alike.
            alike = np.exp(_line(np.log(np.maximum(beside, 1e-9)), pressure, rows)) * (m[at] > 0)
            together = np.exp(_line(np.log(np.maximum(n[at] + alike, 1e-9)), rows, pressure))
            apart = answers + beside
            joined = apart ** (1.0 - self._overlap) * together**self._overlap
            found[at] = -self.n_experts * np.expm1(-np.where((n[at] > 0) & (m[at] > 0), joined, apart))
        return found

    def _curve(self, counts: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of rows, and of their pressure, both ascending.  # [N] each.

        Rows that read no more than fewer did tell nothing: of those that read all only the fewest do.
        """
        rows = np.array(sorted(counts), float)
        read = np.minimum([counts[int(n)] for n in rows], self.n_experts * (1 - 1e-4))
        told = np.append(True, read[1:] > np.maximum.accumulate(read)[:-1])
        rows, read = rows[told], read[told]
        return np.log(rows), np.log(-np.log1p(-read / self.n_experts))


class StepCost:
    """Seconds and joules of steps.

    Attributes:
        reads: Experts that rows read.
        time, energy: The fits; energy above idle, None without a meter.
        buckets: Rows of the graphs that run, ascending; None where a step has just its rows.
    """

    def __init__(self, profile: TokenProfile) -> None:
        """Fit the cells of a profile.

        Raises:
            ProfileError: too few of them.
        """
        cost = profile.cost
        self.reads = ExpertReads(profile)
        # A CPU runs the rows it is given; it has no meter of copies either.
        self.buckets = None if cost.copy_bytes_per_s is None else np.array(ROW_BUCKETS)
        c = cost.config
        bytes_each = 4 if cost.copy_bytes_per_s is None else 2  # float32 on a CPU, else bfloat16
        self._expert_bytes = 3 * c["d_model"] * c["expert_width"] * c["n_layers"] * bytes_each
        self._cached_bytes = 2 * c["n_kv_heads"] * c["head_dim"] * c["n_layers"] * bytes_each
        fitted, held_out = ([cell for cell in cost.cells if cell.held_out == held] for held in (False, True))
        if len(fitted) <= len(TERMS):
            raise ProfileError(
                f"{len(fitted)} measured steps fit no form of {len(TERMS)} terms: measure more"
            )
        self.time = self._fit(fitted, held_out, "step_s")
        metered = all(cell.energy_j is not None for cell in cost.cells)
        self.energy = self._fit(fitted, held_out, "energy_j") if metered else None

    def amounts(self, work: StepWork) -> np.ndarray:
        """How much of each of `TERMS` steps need.  # [..., F]."""
        w = StepWork(*np.broadcast_arrays(*(np.asarray(part, float) for part in work)))
        rows = run = w.decode_rows + w.prompt_rows
        if self.buckets is not None:
            run = self.buckets[np.minimum(np.searchsorted(self.buckets, rows), len(self.buckets) - 1)]
        per_expert = rows * w.top_k / np.maximum(w.experts_read, 1e-9)
        tiles = per_expert / np.where(run <= _SMALL, *_TILE_ROWS)
        return np.stack(
            [
                np.ones_like(rows), w.experts_read * self._expert_bytes, w.cached * self._cached_bytes,
                np.asarray(run, float), rows * w.top_k, w.prompt_pairs,
                w.experts_read * np.maximum(0.0, tiles - 1.0),
            ],
            axis=-1,
        )  # fmt: skip

    def _fit(self, fitted: Sequence[CostCell], held_out: Sequence[CostCell], name: str) -> Fit:
        amounts, measured = self._of(fitted, name)
        scale = amounts.max(axis=0)
        scale[scale == 0.0] = 1.0
        relative = amounts / scale / measured[:, None]
        rate, _ = nnls(relative, np.ones(len(measured)))
        residual = relative @ rate - 1.0
        free = rate > 0.0
        variance = (residual**2).sum() / max(1, len(measured) - free.sum())
        inverse = np.zeros((len(rate), len(rate)))
        inverse[np.ix_(free, free)] = np.linalg.pinv(relative[:, free].T @ relative[:, free])
        other = np.zeros(0)
        if held_out:
            amounts, measured = self._of(held_out, name)
            other = amounts / scale @ rate / measured - 1.0
        covariance = variance * inverse / np.outer(scale, scale)
        return Fit(rate / scale, covariance, Residuals(residual, other))

    def _of(self, cells: Sequence[CostCell], name: str) -> tuple[np.ndarray, np.ndarray]:
        works = StepWork(*np.array([work_of(cell) for cell in cells], float).T)
        return self.amounts(works), np.array([getattr(cell, name) for cell in cells], float)

    def table(self) -> str:
        """The residuals and what the rates mean, to read; without a last line end."""
        lines = [
            "| | terms above 0 | fitted cells, rms | largest | held-out cells, rms | largest |",
            "|---|---|---|---|---|---|",
        ]
        for name, fit in (("time", self.time), ("energy", self.energy)):
            if fit is None:
                continue
            names = ", ".join(term for term, rate in zip(TERMS, fit.rate, strict=True) if rate > 0)
            shown = [_percent(part) for part in (fit.residuals.fitted, fit.residuals.held_out)]
            lines.append(f"| {name} | {names} | {shown[0]} | {shown[1]} |")
        return "\n".join(lines)


def _percent(residual: np.ndarray) -> str:
    if not len(residual):
        return "- | -"
    return f"{math.sqrt((residual**2).mean()):.1%} | {np.abs(residual).max():.1%}"


def _line(x: np.ndarray, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Linear interpolation that goes on beyond both ends as between the last two points."""
    i = np.clip(np.searchsorted(at, x), 1, len(at) - 1)
    return values[i - 1] + (x - at[i - 1]) * (values[i] - values[i - 1]) / (at[i] - at[i - 1])
