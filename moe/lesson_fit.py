"""How fast the head of the token service learns each domain: fitted to the curves of a profile.

The law is `moe.service.adaptation.learn`. Shapes: D domains, Q = D + 1 pure states, the unadapted first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from moe.lm.config import FIRST_TRUST, HALVES
from moe.service.adaptation import learn, start_unadapted
from moe.token_profile import TokenAdaptation


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
                trust, _ = learn(weights, trust, d, rate, self.loss[d], self.margin)
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
                while waiting >= HALVES:  # of each head one
                    trust, _ = learn(weights, trust, d, self.rate[d], self.loss[d], self.margin)
                    waiting -= HALVES
                predicted = weights @ self.changed[d]
                errors.append((predicted[3] - visit.loss, predicted[0] - visit.accuracy))
        loss, accuracy = np.sqrt(np.square(errors).mean(axis=0)) if errors else (np.nan, np.nan)
        return {"points": float(len(errors)), "loss_rmse": float(loss), "accuracy_rmse": float(accuracy)}
