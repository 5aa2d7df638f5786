"""A profile of tokens as one of whole requests: what a control problem is priced by.

A request of mean length costs its prompt and its output tokens, decoded beside as many others as run. From
that follow the reference load, the price of energy and the floor of quality. How a service of tokens runs
from step to step is in none of it: the live service does that itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from moe.lm.text import DOMAINS
from moe.profiles import Profile, ProfileError
from moe.service.generate.lengths import TokenLengths
from moe.token_profile import CostCell, TokenProfile


@dataclass(frozen=True)
class _Costs:
    """Time or energy of a step.  # decode [N, K, R], a token of a prompt beside decode rows [K]."""

    decode: np.ndarray
    prompt_token: np.ndarray


def request_profile(profile: TokenProfile, lengths: TokenLengths) -> Profile:
    """Tables of batches of requests of mean length, all running together from first to last token.

    Args:
        profile: of steps and answers.
        lengths: of the requests.

    Returns:
        A profile of task "generate" whose batch sizes are running sequences, whose shifts are domains, and
        whose expert shares are even: the live service counts its own.

    Raises:
        ProfileError: cells that are needed were not measured.
    """
    cost, quality = profile.cost, profile.quality
    fitted = [cell for cell in cost.cells if not cell.held_out]
    answers = [cell for cell in quality.cells if cell.running == max(c.running for c in quality.cells)]
    running = sorted({cell.decode_rows for cell in fitted if cell.decode_rows and not cell.prefill_rows})
    top_ks = sorted({cell.top_k for cell in answers})
    biases = sorted({cell.routing_bias for cell in answers})
    n_experts, n_layers = cost.config["n_experts"], cost.config["n_layers"]
    readable = [n_experts * (1 - 0.75 * bias) for bias in biases]
    metered = all(cell.energy_j is not None for cell in fitted)
    prompt, output = float(lengths.prompt.mean()), float(lengths.output.mean())

    def of_requests(name: str) -> np.ndarray:
        """[N, K, R] of a batch of so many requests."""
        steps = _costs(fitted, name, running, top_ks, readable)
        prompts = np.multiply.outer(np.array(running) * prompt, steps.prompt_token)  # [N, K]
        return output * steps.decode + prompts[:, :, None]

    def of_answers(name: str, domain: str | None = None) -> np.ndarray:
        """[K, R] of the answers, in the middle between measured biases."""
        rows = []
        for k in top_ks:
            cells = sorted((c for c in answers if c.top_k == k), key=lambda cell: cell.routing_bias)
            values = [cell.by_domain[domain] if domain else getattr(cell, name) for cell in cells]
            rows.append(np.interp(biases, [cell.routing_bias for cell in cells], values))
        return np.array(rows)

    shape = (len(running), len(top_ks), len(biases))
    domains = [name for name in DOMAINS if name in answers[0].by_domain]
    accuracy = np.stack([of_answers("accuracy", name) for name in domains])[:, None]  # [S, 1, K, R]
    other = {
        name: np.broadcast_to(of_answers(name), accuracy.shape).copy() for name in ("confidence", "entropy")
    }
    digests = json.dumps(profile.digests(), sort_keys=True).encode()
    return Profile(
        task="generate", size=quality.size, device=cost.device,
        provenance=cost.provenance | {"missing": []},
        model={
            "key": hashlib.sha256(digests).hexdigest()[:12], "config": cost.config,
            "data_sha256": quality.documents_sha256, "weights_sha256": quality.weights_sha256,
        },
        shifts=tuple(domains), batch_size=np.array(running, float), expert_count=np.array(top_ks, float),
        routing_bias=np.array(biases), cost_bias=np.array(biases), latency_s=of_requests("step_s"),
        latency_spread=np.zeros(shape), energy_j=of_requests("energy_j") if metered else None,
        energy_spread=np.zeros(shape) if metered else None, visits=np.ones(shape), start_temperature_c=None,
        idle_power_w=cost.idle_power_w, ttt_latency_s=None, ttt_latency_spread=None, ttt_energy_j=None,
        ttt_energy_spread=None, held_out=[], samples=min(cell.tokens for cell in answers), accuracy=accuracy,
        **other, mixture=None, adapt_rate=None, adaptation_error=None,
        expert_share=np.full((len(top_ks), len(biases), n_layers, n_experts), 1.0 / n_experts),
        expert_cost=np.zeros(n_experts), expert_latency_s=np.zeros(n_experts), expert_energy_j=None,
    )  # fmt: skip


def _costs(
    cells: list[CostCell], name: str, running: list[int], top_ks: list[int], readable: list[float]
) -> _Costs:
    """What `name` of the cells says of steps and of prompts' tokens."""
    decode = np.zeros((len(running), len(top_ks), len(readable)))
    alone = [cell for cell in cells if not cell.prefill_rows]
    contexts = [cell.context for cell in alone]
    context = max(set(contexts), key=contexts.count)  # where the grid was measured
    for i, n in enumerate(running):
        for j, k in enumerate(top_ks):
            at = {
                cell.readable: getattr(cell, name)
                for cell in alone
                if (cell.decode_rows, cell.top_k, cell.context) == (n, k, context)
            }
            if not at:
                raise ProfileError(f"the profile lacks steps of {n} sequences and {k} experts per token")
            measured = sorted(at)
            decode[i, j] = np.interp(readable, measured, [at[m] for m in measured])
    prompt_token = np.array([_prompt_token(cells, name, k, context) for k in top_ks])
    return _Costs(decode, prompt_token)


def _prompt_token(cells: list[CostCell], name: str, top_k: int, context: int) -> float:
    """What a token of a prompt adds to a step, by the largest chunk that was measured beside decode rows."""
    beside = [cell for cell in cells if cell.prefill_rows and cell.decode_rows and cell.top_k == top_k]
    if not beside:
        raise ProfileError(f"the profile lacks prompts beside answers, {top_k} experts per token")
    most = max(beside, key=lambda cell: cell.prefill_rows)
    (without,) = (
        getattr(cell, name)
        for cell in cells
        if (cell.decode_rows, cell.prefill_rows, cell.top_k, cell.readable, cell.context)
        == (most.decode_rows, 0, top_k, most.readable, context)
    )
    return (getattr(most, name) - without) / most.prefill_rows
