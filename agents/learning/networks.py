"""Actor-critic policy networks with one softmax for all knobs.

Stable-Baselines3 treats every entry of a `MultiDiscrete` action as a distribution object of its own, which
costs more per step than the network. Here the knobs' logits are padded to one width and handled at once.
Parameters, and so model files, are those of Stable-Baselines3's own policy.
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy


class PaddedMultiCategorical(MultiCategoricalDistribution):
    """Independent categorical distributions over the levels of several knobs. B batch, C knobs, N levels."""

    def __init__(self, levels: list[int]) -> None:
        """Take the number of levels per knob."""
        super().__init__(levels)
        count = torch.as_tensor(levels)  # [C]
        exists = torch.arange(int(count.max())) < count[:, None]  # [C, N]
        self._slot = exists.flatten().nonzero().flatten()
        self._empty = torch.where(exists, 0.0, -torch.inf).flatten()  # [C * N]

    def proba_distribution(self, action_logits: torch.Tensor) -> PaddedMultiCategorical:
        """Set the logits [B, sum of levels]."""
        padded = self._empty.expand(len(action_logits), -1).index_copy(1, self._slot, action_logits)
        logits = padded.view(len(action_logits), len(self.action_dims), -1)
        self._log_probs = torch.log_softmax(logits, -1)  # [B, C, N]
        return self

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability [B] of actions [B, C]."""
        return self._log_probs.gather(-1, actions.long().unsqueeze(-1)).sum((-1, -2))

    def entropy(self) -> torch.Tensor:
        """Sum of the knobs' entropies [B]."""
        # Padding has probability 0 and log-probability -inf; their product must be 0.
        finite = self._log_probs.clamp_min(torch.finfo(self._log_probs.dtype).min)
        return -(finite.exp() * finite).sum((-1, -2))

    def sample(self) -> torch.Tensor:
        """Draw a level per knob [B, C]."""
        batch, knobs, levels = self._log_probs.shape
        return torch.multinomial(self._log_probs.exp().view(-1, levels), 1).view(batch, knobs)

    def mode(self) -> torch.Tensor:
        """The most likely level of each knob [B, C]."""
        return self._log_probs.argmax(-1)


class KnobPolicy(ActorCriticPolicy):
    """`ActorCriticPolicy` over `PaddedMultiCategorical`."""

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.MultiDiscrete, *args: Any, **kwargs: Any
    ) -> None:
        """Build the networks as Stable-Baselines3 does."""
        super().__init__(observation_space, action_space, *args, **kwargs)
        self.action_dist = PaddedMultiCategorical(action_space.nvec.tolist())


class KnobLstmPolicy(KnobPolicy, RecurrentActorCriticPolicy):
    """`RecurrentActorCriticPolicy` over `PaddedMultiCategorical`."""
