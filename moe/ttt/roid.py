"""Weighted self-training: every sample counts by how sure its answer is and how little was seen of its kind.

After Marsden et al., "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and
Prior Correction", WACV 2024, arXiv 2306.00650. Two of its parts are left out: the loss on augmented images,
which doubles the price of a step, and the prior correction of answers by the others of their batch, since a
service's answer does not depend on what else is in its batch. Shapes: B samples, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model.transformer import ModelOutput, MoEModel
from moe.ttt.settings import Roid
from moe.ttt.state import AdaptationState
from moe.ttt.steps import Step, check_batch, descend, statistics_undone_on_error


def roid(
    model: MoEModel,
    state: AdaptationState,
    inputs: Tensor,
    settings: Roid,
    top_k: int | None = None,
    routing_bias: float = 0.0,
    answers: Tensor | None = None,
) -> Step:
    """Descend the weighted soft likelihood ratio of the answers, then go a little of the way back.

    One pass with a graph: TENT's price. Answers less unlike the moving average of all answers than the
    batch's mean weigh nothing (section 3.2).

    Raises:
        ValueError: The task is not vision, or the batch is a single sample and the model has batch norms.
        AdaptationDiverged: The loss is not a number.
    """
    check_batch(model, inputs)
    mean: list[Tensor] = []

    def objective(output: ModelOutput) -> Tensor:
        probabilities = output.logits.softmax(dim=-1)  # [B, C]
        weights = _weights(probabilities.detach(), output.entropy.detach(), state, settings)  # [B]
        mean.append(probabilities.detach().mean(dim=0))
        return (weights * likelihood_ratio(probabilities)).mean()

    with statistics_undone_on_error(model):
        loss = descend(model, state, inputs, objective, top_k, routing_bias)
    state.descent.step()
    state.pull_back(settings.source_share)
    state.average("probabilities", mean[0], settings.average_decay)
    return Step(selected=len(inputs), loss=loss)


def likelihood_ratio(probabilities: Tensor) -> Tensor:
    """Return the soft likelihood ratio loss of probabilities [B, C], [B].

    Its gradient does not fade where an answer is sure, as that of the entropy does (Mummadi et al.,
    arXiv 2106.14999).
    """
    p = probabilities.clamp(1e-5, 1 - 1e-5)
    return -(p * (p.log() - (1 - p).log())).sum(dim=-1)


def _weights(probabilities: Tensor, entropy: Tensor, state: AdaptationState, settings: Roid) -> Tensor:
    """Return how much each sample counts, [B]: the exponential of diversity times certainty."""
    even = torch.full_like(probabilities[0], 1 / probabilities.shape[1])
    average = state.averages.get("probabilities", even)
    diversity = _to_unit(1 - F.cosine_similarity(average[None], probabilities))
    weights = (diversity * _to_unit(-entropy) / settings.temperature).exp()
    return weights.masked_fill(diversity < diversity.mean(), 0.0)


def _to_unit(values: Tensor) -> Tensor:
    """Scale values, [B], to 0..1; all alike are 0."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp(min=1e-12)
