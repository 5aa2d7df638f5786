"""Test-time adaptation in the twin: a mixture of the unadapted model and one adapted to each shift."""

from __future__ import annotations

from moe.queueing import jit


@jit
def adapt(weights, shift, steps, rate):
    """Move `weights` towards the model that is adapted to a shift, in place.

    Args:
        weights: float64 [S + 1], sum 1; 0 is the unadapted model, 1 + s the one adapted to shift s.
        shift: index of the input shift in force.
        steps: adaptation steps done.
        rate: share of what is missing to the adapted model that one step brings.
    """
    keep = (1.0 - rate) ** steps
    for i in range(weights.shape[0]):
        weights[i] *= keep
    weights[1 + shift] += 1.0 - keep


@jit
def answer_quality(tables, weights, shift, k_index, b_index):
    """(accuracy, confidence, entropy) of the answers that a partly adapted model gives.

    Args:
        tables: `Tables`.
        weights: float64 [S + 1], see `adapt`.
        shift: index of the input shift in force.
        k_index: level of the expert count.
        b_index: level of the routing bias.
    """
    adapted = weights[1 + shift]
    accuracy = tables.accuracy[shift, k_index, b_index]
    confidence = tables.confidence[shift, k_index, b_index]
    entropy = tables.entropy[shift, k_index, b_index]
    return (
        accuracy[0] + adapted * (accuracy[1] - accuracy[0]),
        confidence[0] + adapted * (confidence[1] - confidence[0]),
        entropy[0] + adapted * (entropy[1] - entropy[0]),
    )
