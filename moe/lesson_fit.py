"""What lessons do to the head of the token service (`moe.lm.adapt`): a law, fitted to a profile's curves.

The state is one of `moe.service.adaptation`: weights of pure states, the unadapted head and one that has
learned each domain to the end. A lesson goes a share of the way to its domain's that is left.
Shapes: D domains, Q = D + 1 pure states, the unadapted first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from moe.compiled import jit
from moe.lm.config import FALLS_TO, FIRST_TRUST, HALVES, LEAST_TRUST, RISES_TO
from moe.service.adaptation import adapt, start_unadapted
from moe.token_profile import TokenAdaptation


@jit
def learn(weights, trust, shift, lessons, rate, loss, margin):
    """Let a guarded head take lessons on `shift`: updates the state, float [Q], in place.

    Before each, one that answers worse than the unadapted head goes back to it (`moe.lm.adapt`).

    Args:
        weights: the state.
        trust: share of a whole step that it takes.
        shift: of the lessons.
        lessons: how many, whole.
        rate: share of the way to the shift that is left which a whole step goes.
        loss: relative change of the loss about `shift` in each pure state, float [Q].
        margin: how much above or below 0 that is worse, or better.

    Returns:
        (the trust that is left, how often it went back)
    """
    returns, own = 0, loss[shift + 1]
    while lessons > 0:
        change = 0.0
        for state in range(weights.shape[0]):
            change += weights[state] * loss[state]
        if change > margin:
            start_unadapted(weights)
            trust, change, returns = trust * FALLS_TO, 0.0, returns + 1
        elif change < -margin:
            trust *= RISES_TO
        trust = min(max(trust, LEAST_TRUST), 1.0)
        # From here on the change lies between what it is and the shift's own: the rest may be alike.
        alike = own <= margin and (trust == 1.0 or min(change, own) >= -margin)
        taken = lessons if alike else 1
        adapt(weights, shift, taken * trust, rate)
        lessons -= taken
    return trust, returns


class LessonFit:
    """What lessons do.

    Attributes:
        domains: Names.
        rate: Share of the way to a domain that is left which a whole step goes.  # [D]
        changed: By each pure state: accuracy, confidence, entropy, and loss (relative).  # [D, Q, 4]
        margin: Of the guard.
    """

    def __init__(self, adaptation: TokenAdaptation) -> None:
        """Fit a rate per domain by least squares of its curve."""
        self.domains = tuple(adaptation.curve)
        self.margin = adaptation.margin
        changed = [
            [astuple(adaptation.changed[about][learned]) for learned in self.domains]
            for about in self.domains
        ]
        self.changed = np.pad(np.array(changed), [(0, 0), (1, 0), (0, 0)])
        self.loss = np.ascontiguousarray(self.changed[..., 3])
        self.rate = np.array([self._fitted(d, adaptation.curve[name]) for d, name in enumerate(self.domains)])
        self._visits = adaptation.visits

    def _fitted(self, d: int, curve: Iterable[tuple[float, float]]) -> float:
        lessons, change = np.array(list(curve)).T
        whole = np.round(lessons).astype(int)

        def error(rate: float) -> float:
            weights, trust, reached = self._unadapted(), FIRST_TRUST, [0.0]
            for _ in range(whole.max()):
                trust, _ = learn(weights, trust, d, 1, rate, self.loss[d], self.margin)
                reached.append(weights @ self.loss[d])
            return float(np.square(change - np.array(reached)[whole]).sum())

        # Trust moves in steps, so the error has valleys: first the best of a grid, then what is near it.
        grid = np.geomspace(0.01, 1.0, 100)
        best = int(np.argmin([error(rate) for rate in grid]))
        near = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
        found: Any = minimize_scalar(error, bounds=near, method="bounded")
        return float(found.x)

    def _unadapted(self) -> np.ndarray:
        weights = np.zeros(len(self.domains) + 1)
        start_unadapted(weights)
        return weights

    def error(self) -> dict[str, float]:
        """Root mean squares over the visits, of the loss (relative) and of the accuracy, and their number."""
        errors = []
        for visits in self._visits:
            weights, trust, waiting = self._unadapted(), FIRST_TRUST, 0
            for visit in visits:
                d = self.domains.index(visit.domain)
                waiting += visit.lessons
                # Of each head one is a lesson of the law.
                trust, _ = learn(
                    weights, trust, d, waiting // HALVES, self.rate[d], self.loss[d], self.margin
                )
                waiting %= HALVES
                predicted = weights @ self.changed[d]
                errors.append((predicted[3] - visit.loss, predicted[0] - visit.accuracy))
        loss, accuracy = np.sqrt(np.square(errors).mean(axis=0)) if errors else (np.nan, np.nan)
        return {"points": float(len(errors)), "loss_rmse": float(loss), "accuracy_rmse": float(accuracy)}
