"""The reward: good answers, less the price of energy, less the growth of three debts.

Units are the standard service's at full load: in an interval it earns 1 with `reference_good` good answers
and spends `weights.energy` on `reference_j`. A debt is what an episode so far broke of a promise beyond what
the promise allows: requests late, seconds above the temperature limit, answers that quality falls short by.
It grows, and what is done well later pays it back; over an episode growth adds up to what is owed at its end.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.compiled import inlined, jit
from thermoe_env.problem.scenario import RewardWeights

REWARD_TERMS = ("good", "energy", "late", "heat", "quality")


class Prices(NamedTuple):
    """What each unit earns or costs, weights and references in it, as compiled code reads them."""

    good: float
    """Per right answer in time."""
    energy: float
    """Per joule at the usual price."""
    late: float
    """Per request owed."""
    heat: float
    """Per second owed."""
    quality: float
    """Per answer owed."""

    @classmethod
    def of(
        cls, weights: RewardWeights, reference_j: float, reference_good: float, interval_s: float
    ) -> Prices:
        """Prices of the weights of a scenario.

        Args:
            weights: of the terms.
            reference_j: energy of the standard service at full load in one interval.
            reference_good: its good answers in one.
            interval_s: length of an interval.
        """
        return cls(
            1.0 / reference_good, weights.energy / reference_j, weights.late / reference_good,
            weights.heat / interval_s, weights.quality / reference_good,
        )  # fmt: skip


@inlined
def owe(debt, more):
    """Return a debt, below 0 what was done beyond a promise, and by how much what is owed has grown."""
    after = debt + more
    return after, max(0.0, after) - max(0.0, debt)


@jit
def reward_terms(prices, good, energy_j, late, heat_s, quality, terms):
    """Fill `terms` (in `REWARD_TERMS` order) and return their sum.

    Args:
        prices: `Prices`.
        good: right answers in time.
        energy_j: energy of the interval, times its price over the usual one.
        late: growth of what is owed for requests late or expired.
        heat_s: growth of what is owed for seconds above the temperature limit.
        quality: growth of what is owed for answers that are not right.
        terms: float [5].
    """
    terms[0] = prices.good * good
    terms[1] = -prices.energy * energy_j
    terms[2] = -prices.late * late
    terms[3] = -prices.heat * heat_s
    terms[4] = -prices.quality * quality
    return terms[0] + terms[1] + terms[2] + terms[3] + terms[4]
