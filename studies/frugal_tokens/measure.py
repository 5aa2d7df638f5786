"""What a trained language model knows, reads and costs in decode, by the engine that serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from moe.device.meter import EnergyMeter
from moe.lm.engine.engine import Engine, Rows, readable_experts
from moe.lm.model import LanguageModel
from moe.lm.text import Documents
from moe.profiling.cost import idle_power_w
from moe.profiling.token_cost import Place, measure_place
from moe.profiling.token_quality import read_prompts


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
        for share, bias in serve:
            top_k = max(1, round(share * c.top_k))
            readable = readable_experts(bias, c.n_experts, top_k)
            accuracy, experts_read = decode(engine, text, chosen, running, top_k, readable)
            places = [Place(running, 0, context, top_k, readable) for context in contexts]
            costs = [measure_place(engine, place, meter, idle_w, window_s) for place in places]
            joules = [cost.energy_j / running for cost in costs if cost.energy_j is not None]
            cells.append(
                {
                    "running": running, "top_k": top_k, "top_k_share": share, "routing_bias": bias,
                    "accuracy": accuracy, "experts_read": experts_read,
                    "step_s": mean(cost.step_s for cost in costs),
                    "joules_per_token": mean(joules) if joules else None,
                }
            )  # fmt: skip
    return cells


def decode(
    engine: Engine, text: Documents, chosen: np.ndarray, running: int, top_k: int, readable: int
) -> tuple[float, float]:
    """Decode the second halves of documents, so many together.

    Returns:
        Share of the tokens that are right, and experts that a step reads, mean over layers and steps.
    """
    last = engine.model.config.context
    first, right, reads = last // 2, [], []
    for group in np.split(chosen, range(running, len(chosen), running)):
        slots = np.array([engine.reserve(last) for _ in group], np.int32)
        read_prompts(engine, slots, group, first, top_k)
        engine.usage()  # forgets the prompts'
        for position in range(first, last):
            rows = Rows(slots, np.full(len(group), position, np.int32), group)
            token = engine.launch(rows, top_k, readable).answers()[0]
            right.append(token == text.tokens[group, position + 1])
        reads.append(engine.usage()[1].sum(axis=1).mean() / (last - first))
        for slot in slots.tolist():
            engine.release(slot)
    return float(np.mean(right)), float(np.mean(reads))
