"""What a trained language model knows, reads and costs in decode, by the engine that serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from moe.device.meter import EnergyMeter
from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.lm.model import LanguageModel
from moe.lm.text import Documents
from moe.profiling.cost import idle_power_w
from moe.profiling.token_cost import Place, measure_place, read_texts
from moe.profiling.token_quality import Passages, score


def measure(
    model: LanguageModel, text: Documents, serve: Sequence[tuple[float, float]], plan: Mapping[int, int],
    contexts: Sequence[int], window_s: float, meter: EnergyMeter | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure every setting at every number of running sequences.

    Args:
        model: in serving types.
        text: documents, of which as much is taken as the model has positions.
        serve: (share of the trained experts per token, routing bias).
        plan: documents that are scored, by running sequences.
        contexts: positions at which the cost of a step is measured.
        window_s: time under load per visit of a cost.
        meter: of the card; None on a CPU, where no joules are.

    Returns:
        Per cell: running, top_k, top_k_share, routing_bias, accuracy of the second halves, experts_read per
        layer and step, step_s, and joules_per_token above idle, null without a meter.
    """
    c, most = model.config, max(plan)
    engine = Engine(
        model, text.tokens[:, : c.context + 1].astype(np.int32), slots=most, max_rows=max(256, most)
    )
    engine.capture()
    idle_w = idle_power_w(meter) if meter else None
    cells = []
    for running, n_documents in plan.items():
        # Evenly from all domains, which lie one behind the other.
        chosen = np.linspace(0, len(text.domain) - 1, n_documents).round().astype(np.int32)
        half = np.full(n_documents, c.context // 2, np.int32)
        halves = Passages(chosen, half, c.context - c.context // 2)
        settings = []
        for share, bias in serve:
            top_k = max(1, round(share * c.top_k))
            settings.append((share, bias, top_k, readable_experts(bias, c.n_experts, top_k)))
        scores = [
            score(engine, text.tokens, halves, running, top_k, [readable])[0]
            for _, _, top_k, readable in settings
        ]
        read_texts(engine, running, max(contexts))
        for (share, bias, top_k, readable), found in zip(settings, scores, strict=True):
            places = [Place(running, 0, context, top_k, readable) for context in contexts]
            costs = [measure_place(engine, place, meter, idle_w, window_s) for place in places]
            joules = [cost.energy_j / running for cost in costs if cost.energy_j is not None]
            cells.append(
                {
                    "running": running, "top_k": top_k, "top_k_share": share, "routing_bias": bias,
                    "accuracy": float(found.right.mean()), "experts_read": found.experts_read,
                    "step_s": mean(cost.step_s for cost in costs),
                    "joules_per_token": mean(joules) if joules else None,
                }
            )  # fmt: skip
    return cells
