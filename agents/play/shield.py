"""A shield around any policy: where a limit is about to break it sets cautious knobs itself, and counts that.

Nothing inside the environment protects a card from its policy. The shield does, on what is observed alone, so
in every world alike; live episodes are played behind it (`agents.play.rollout.play_live`).
"""

from __future__ import annotations

import numpy as np

from thermoe_env.mdp.fields import ranges_of
from thermoe_env.mdp.signals import STAGES
from thermoe_env.problem.problem import Problem

CRITICAL = len(STAGES) - 1
OVERLOAD_SHARE = 0.5
"""Of what the power brake bears, from which power is taken back."""


class Shield:
    """Sets cautious knobs where the die is CRITICAL, or half of what the power brake bears is used up.

    Cautious is the lowest pace, no adaptation and no deferrable request; where the pace is not controlled,
    the fewest experts per token stand for it.

    Attributes:
        interventions: Intervals in which an action was replaced by another.
    """

    def __init__(self, problem: Problem) -> None:
        controlled = problem.knobs.controlled
        slow = "pace" if "pace" in controlled else "expert_count"
        self._lowered = [k for k, name in enumerate(controlled) if name in (slow, "ttt_steps", "admission")]
        self._decode = ranges_of(problem).decode
        self.interventions = 0

    def guard(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Return the levels to play.

        Args:
            observation: float32 [n, fields].
            action: int64 [n, controlled knobs], levels that the policy asks for.
        """
        seen = self._decode(observation)
        danger = (seen["stage"] > CRITICAL - 0.5) | (seen["overload_share"] > OVERLOAD_SHARE)
        safe = np.array(action)
        for k in self._lowered:
            safe[danger, k] = 0
        self.interventions += int((safe != action).any(axis=1).sum())
        return safe
