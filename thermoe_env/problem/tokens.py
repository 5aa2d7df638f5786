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
from moe.token_profile import TokenCost, TokenProfile, TokenQuality


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
    standard = standard_accuracy(quality, lengths, cost.config["context"])
    answers = [cell for cell in quality.cells if cell.running == max(c.running for c in quality.cells)]
    running = sorted({cell.decode_rows for cell in cost.decode_grid()})
    top_ks = sorted({cell.top_k for cell in answers})
    biases = sorted({cell.routing_bias for cell in answers})
    n_experts, n_layers = cost.config["n_experts"], cost.config["n_layers"]
    readable = [n_experts * (1 - 0.75 * bias) for bias in biases]
    metered = all(cell.energy_j is not None for cell in cost.cells)
    prompt, output = float(lengths.prompt.mean()), float(lengths.output.mean())
    adaptation = profile.adaptation

    def of_requests(name: str) -> np.ndarray:
        """[N, K, R] of a batch of so many requests."""
        steps = _costs(cost, name, running, top_ks, readable)
        prompts = np.multiply.outer(np.array(running) * prompt, steps.prompt_token)  # [N, K]
        return output * steps.decode + prompts[:, :, None]

    def of_answers(name: str, domain: str | None = None) -> np.ndarray:
        """[K, R] of the answers, in the middle between measured biases."""
        rows = []
        for k in top_ks:
            cells = sorted((c for c in answers if c.top_k == k), key=lambda cell: cell.routing_bias)
            values = [getattr(cell.by_domain[domain] if domain else cell, name) for cell in cells]
            rows.append(np.interp(biases, [cell.routing_bias for cell in cells], values))
        return np.array(rows)

    def of_lessons(per_lesson: float | None) -> np.ndarray | None:
        """[N, K] of all lessons that a batch's prompts make."""
        if adaptation is None or per_lesson is None:
            return None
        lessons = np.array(running) * prompt / adaptation.lesson_rows
        return np.multiply.outer(lessons * per_lesson, np.ones(len(top_ks)))

    shape = (len(running), len(top_ks), len(biases))
    adapting = of_lessons(adaptation.lesson_s if adaptation else None)
    domains = list(standard)
    accuracy = np.stack(
        [np.clip(standard[name] + of_answers("minus_standard", name), 0.0, 1.0) for name in domains]
    )[:, None]  # [S, 1, K, R]
    other = {
        name: np.broadcast_to(of_answers(name), accuracy.shape).copy() for name in ("confidence", "entropy")
    }
    digests = json.dumps(profile.digests(), sort_keys=True).encode()
    return Profile(
        task="generate", size=quality.size, device=cost.device,
        provenance=cost.provenance | {"missing": [], "adaptation": {"method": "head", "group": "head"}},
        model={
            "key": hashlib.sha256(digests).hexdigest()[:12], "config": cost.config,
            "data_sha256": quality.documents_sha256, "weights_sha256": quality.weights_sha256,
        },
        shifts=tuple(domains), batch_size=np.array(running, float), expert_count=np.array(top_ks, float),
        routing_bias=np.array(biases), cost_bias=np.array(biases), latency_s=of_requests("step_s"),
        latency_spread=np.zeros(shape), energy_j=of_requests("energy_j") if metered else None,
        energy_spread=np.zeros(shape) if metered else None, visits=np.ones(shape), start_temperature_c=None,
        idle_power_w=cost.idle_power_w, ttt_latency_s=adapting,
        ttt_latency_spread=None if adapting is None else np.zeros_like(adapting),
        ttt_energy_j=of_lessons(adaptation.lesson_j if adaptation else None), ttt_energy_spread=None,
        held_out=[], samples=min(cell.tokens for cell in answers), accuracy=accuracy,
        **other, mixture=None, adapt_rate=None, adaptation_error=None,
        expert_share=np.full((len(top_ks), len(biases), n_layers, n_experts), 1.0 / n_experts),
        expert_cost=np.zeros(n_experts), expert_latency_s=np.zeros(n_experts), expert_energy_j=None,
    )  # fmt: skip


def standard_accuracy(quality: TokenQuality, lengths: TokenLengths, context: int) -> dict[str, float]:
    """Accuracy of the standard service's answers per domain, where in the context requests have them."""
    (parts,) = {len(shares) for shares in quality.standard.values()}
    # Entry i of a document predicts token i + 1: the first answer is that of the prompt's last token.
    change = np.zeros(context + 1)
    np.add.at(change, lengths.prompt - 1, 1.0)
    np.add.at(change, lengths.prompt + lengths.output - 1, -1.0)
    answers = np.array([part.sum() for part in np.array_split(change.cumsum()[:context], parts)])
    return {
        name: float(answers @ quality.standard[name] / answers.sum())
        for name in DOMAINS
        if name in quality.standard
    }


def _costs(
    cost: TokenCost, name: str, running: list[int], top_ks: list[int], readable: list[float]
) -> _Costs:
    """What `name` of the cells says of steps and of prompts' tokens."""
    decode, grid = np.zeros((len(running), len(top_ks), len(readable))), cost.decode_grid()
    for i, n in enumerate(running):
        for j, k in enumerate(top_ks):
            at = {
                cell.readable: getattr(cell, name)
                for cell in grid
                if (cell.decode_rows, cell.top_k) == (n, k)
            }
            if not at:
                raise ProfileError(f"the profile lacks steps of {n} sequences and {k} experts per token")
            measured = sorted(at)
            decode[i, j] = np.interp(readable, measured, [at[m] for m in measured])
    return _Costs(decode, np.array([_prompt_token(cost, name, k) for k in top_ks]))


def _prompt_token(cost: TokenCost, name: str, top_k: int) -> float:
    """What a token of a prompt adds to a step, by the largest chunk that was measured beside decode rows."""
    beside = [
        cell
        for cell in cost.cells
        if cell.prefill_rows and cell.decode_rows and cell.top_k == top_k and not cell.held_out
    ]
    if not beside:
        raise ProfileError(f"the profile lacks prompts beside answers, {top_k} experts per token")
    most = max(beside, key=lambda cell: cell.prefill_rows)
    (without,) = (
        getattr(cell, name)
        for cell in cost.decode_grid()
        if (cell.decode_rows, cell.top_k, cell.readable) == (most.decode_rows, top_k, most.readable)
    )
    return (getattr(most, name) - without) / most.prefill_rows
