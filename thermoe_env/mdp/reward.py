"""The reward: goodput less energy, lateness, excess power, heat and missing quality.

Every term is in units of the standard service at full load for one interval: a good answer is worth
the energy the standard service spends on one (`reference_good` answers cost `reference_j`), so a policy
as frugal as the standard service earns about nothing, and a more frugal one earns what it saves.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.compiled import jit
from thermoe_env.problem.scenario import RewardWeights

REWARD_TERMS = ("good", "energy", "late", "over_budget", "heat", "quality")


class Prices(NamedTuple):
    """What each unit earns or costs, weights and references in it, as compiled code reads them."""

    good: float
    """Per right answer in time."""
    energy: float
    """Per joule."""
    late: float
    """Per request answered late or expired."""
    over_budget: float
    """Per watt of mean power over the budget, for an interval."""
    heat: float
    """Of an interval above the limit, and as much again per degree."""
    quality: float
    """Per answer by which quality falls short."""

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
            weights.good / reference_good, weights.energy / reference_j, weights.late / reference_good,
            weights.over_budget * interval_s / reference_j, weights.heat * interval_s,
            weights.quality / reference_good,
        )  # fmt: skip


@jit
def reward_terms(prices, good, energy_j, missed, power_w, budget_w, over_c, shortfall, terms):
    """Fill `terms` (in `REWARD_TERMS` order) and return their sum.

    Args:
        prices: `Prices`.
        good: right answers in time.
        energy_j: energy of the interval, times its price over the usual one.
        missed: requests answered late or expired.
        power_w: mean power.
        budget_w: its budget in this interval.
        over_c: degrees above the virtual limit, negative below.
        shortfall: growth of the answers by which quality falls short of its floor over the episode.
        terms: float [6].
    """
    terms[0] = prices.good * good
    terms[1] = -prices.energy * energy_j
    terms[2] = -prices.late * missed
    terms[3] = -prices.over_budget * max(0.0, power_w - budget_w)
    terms[4] = -prices.heat * (1.0 + over_c) if over_c > 0.0 else 0.0
    terms[5] = -prices.quality * shortfall
    return terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5]
