"""The reward: goodput less energy, lateness, excess power, heat and missing quality.

Every term is in units of the standard service at full load for one interval: a good answer is worth
the energy the standard service spends on one (`reference_good` answers cost `reference_j`), so a policy
as frugal as the standard service earns about nothing, and a more frugal one earns what it saves.
"""

from __future__ import annotations

from typing import NamedTuple

from moe.queueing import jit

REWARD_TERMS = ("good", "energy", "late", "over_budget", "heat", "quality")


class Prices(NamedTuple):
    """Weights and references, as compiled code reads them."""

    good: float
    energy: float
    late: float
    over_budget: float
    heat: float
    quality: float
    reference_j: float
    """Energy of the standard service at full load in one interval."""
    reference_good: float
    """Good answers of the standard service at full load in one interval."""
    interval_s: float


@jit
def reward_terms(prices, good, energy_j, missed, power_w, budget_w, over_c, shortfall, terms):
    """Fill `terms` (in `REWARD_TERMS` order) and return their sum.

    Args:
        prices: `Prices`.
        good: right answers in time.
        energy_j: energy of the interval.
        missed: requests answered late or expired.
        power_w: mean power.
        budget_w: its budget in this interval.
        over_c: degrees above the virtual limit, negative below.
        shortfall: growth of the answers by which quality falls short of its floor over the episode.
        terms: float [6].
    """
    terms[0] = prices.good * good / prices.reference_good
    terms[1] = -prices.energy * energy_j / prices.reference_j
    terms[2] = -prices.late * missed / prices.reference_good
    terms[3] = -prices.over_budget * max(0.0, power_w - budget_w) * prices.interval_s / prices.reference_j
    terms[4] = -prices.heat * prices.interval_s * (1.0 + over_c) if over_c > 0.0 else 0.0
    terms[5] = -prices.quality * shortfall / prices.reference_good
    return terms[0] + terms[1] + terms[2] + terms[3] + terms[4] + terms[5]
