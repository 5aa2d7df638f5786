"""What an expert costs per token it is sent, measured on the device: the table behind the routing bias.

Widths do not tell: a narrow expert fills the device less well than a wide one, and a token sent to an expert
of no width is still sorted and gathered. So each group of like experts is given all tokens in turn, in every
layer, and the time and the energy of that are read off.

Shapes: T tokens, D model, E experts, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe.device.meter import EnergyMeter
from moe.hf.runner import HfRunner
from moe.model.router import Routing
from moe.model.transformer import MoELayer, MoEModel
from moe.profiling.cost import idle_power_w

REPEATS = 5
WINDOW_S = {"cpu": 0.1, "cuda": 0.4}
"""Time under load per group and repeat: on CUDA four ticks of the energy counter."""
WARM_S = {"cpu": 0.02, "cuda": 0.1}
LEAST_UNITS = 3
"""Units of work in a window at least, however long they take."""
TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class ExpertCost:
    """Cost of one token in one expert of one layer, dispatch included; median of `REPEATS` windows.

    Attributes:
        latency_s: Device time.  # [E]
        latency_spread: Standard deviation over the median.  # [E]
        energy_j: Energy above idle; None without a meter.  # [E]
        energy_spread: Likewise.  # [E]
    """

    latency_s: np.ndarray
    latency_spread: np.ndarray
    energy_j: np.ndarray | None
    energy_spread: np.ndarray | None

    def relative(self) -> np.ndarray:
        """Cost over that of the dearest expert, energy where there is a meter and else time, [E]."""
        cost = self.latency_s if self.energy_j is None else self.energy_j
        return cost / cost.max()


@torch.no_grad()
def measure_expert_cost(
    model: MoEModel, inputs: Tensor, meter: EnergyMeter | None, seed: int = 0
) -> ExpertCost:
    """Measure each group of experts `REPEATS` times, in random order.

    Args:
        model: In eval mode.
        inputs: Samples on the model's device, whose activations the experts are given; repeated or cut to
            `TOKENS`.  # [B, ...]
        meter: The device's energy counter; None on a CPU.
        seed: Of the order.
    """
    device = inputs.device
    layers = _layers_with_tokens(model, inputs, TOKENS[device.type])
    kinds = model.config.expert_kinds
    groups = [[e for e, kind in enumerate(kinds) if kind == name] for name in dict.fromkeys(kinds)]
    units = [_unit(layers, group, model.config.n_experts) for group in groups]
    return measure_units(units, groups, len(layers) * len(layers[0][1]), device, meter, seed)


@torch.no_grad()
def measure_units(
    units: Sequence[Callable[[], object]],
    groups: Sequence[Sequence[int]],
    n_tokens: int,
    device: torch.device,
    meter: EnergyMeter | None,
    seed: int,
) -> ExpertCost:
    """Measure units of work, each `n_tokens` tokens in the experts of one group; together all experts.

    Other arguments as in `measure_expert_cost`.
    """
    idle_w = idle_power_w(meter) if meter else 0.0
    seen: list[list[tuple[float, float]]] = [[] for _ in groups]
    rng = np.random.default_rng(seed)
    for unit in units:  # the first run of a shape compiles and allocates
        unit()
    order = [group for _ in range(REPEATS) for group in rng.permutation(len(groups))]
    for group in tqdm(order, desc="expert cost", unit="window", mininterval=1.0):
        latency_s, power_w = _window(units[group], device, meter)
        seen[group].append((latency_s, (power_w - idle_w) * latency_s))
    per_token = np.array(seen) / n_tokens  # [groups, REPEATS, 2]
    median = np.median(per_token, axis=1)
    spread = per_token.std(axis=1, ddof=1) / median
    group_of_expert = np.empty(sum(map(len, groups)), np.int64)
    for number, group in enumerate(groups):
        group_of_expert[group] = number
    latency_s, energy_j = median[group_of_expert].T
    latency_spread, energy_spread = spread[group_of_expert].T
    if meter is None:
        return ExpertCost(latency_s, latency_spread, None, None)
    return ExpertCost(latency_s, latency_spread, energy_j, energy_spread)


def _layers_with_tokens(model: MoEModel, inputs: Tensor, n_tokens: int) -> list[tuple[MoELayer, Tensor]]:
    """Each layer and the tokens, [T, D], that reach it."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    tokens_of: dict[MoELayer, Tensor] = {}

    def keep(layer: MoELayer, args: tuple[Tensor, ...]) -> None:
        tokens_of[layer] = args[0].flatten(0, -2)

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]  # pyright: ignore[reportArgumentType]
    if model.config.task == "language":
        inputs = inputs[:, -model.config.context_length :]
    try:
        model(inputs[: -(-n_tokens // model.config.tokens_per_sample)])
    finally:
        for hook in hooks:
            hook.remove()
    repeats = -(-n_tokens // len(tokens_of[layers[0]]))
    return [(layer, tokens_of[layer].repeat(repeats, 1)[:n_tokens]) for layer in layers]


def _unit(layers: list[tuple[MoELayer, Tensor]], group: list[int], n_experts: int) -> Callable[[], object]:
    """A pass of all tokens through the experts of one group, evenly, in every layer."""
    n_tokens, device = len(layers[0][1]), layers[0][1].device
    experts = torch.tensor(group, device=device)[torch.arange(n_tokens, device=device) % len(group)]
    weights = torch.ones(n_tokens, 1, device=device)
    logits = torch.empty(n_tokens, n_experts, device=device)
    routing = Routing(router_logits=logits, weights=weights, experts=experts[:, None])
    return lambda: [layer.experts(tokens, routing) for layer, tokens in layers]


def _window(
    unit: Callable[[], object], device: torch.device, meter: EnergyMeter | None
) -> tuple[float, float]:
    """Time of a unit of work under load, and the mean power, NaN without a meter."""
    done_at: list[float] = []

    def step() -> None:
        unit()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done_at.append(time.perf_counter())

    warm_until = time.perf_counter() + WARM_S[device.type]
    while time.perf_counter() < warm_until:
        step()
    if meter is None:
        start_s, end_s = time.perf_counter(), time.perf_counter() + WINDOW_S[device.type]
        while len(done_at) < LEAST_UNITS or time.perf_counter() < end_s:
            step()
        power_w = np.nan
        inside = [t for t in done_at if t >= start_s]
    else:
        start, end = meter.window(step, WINDOW_S[device.type])
        power_w = (end.energy_j - start.energy_j) / (end.time_s - start.time_s)
        inside = [t for t in done_at if start.time_s <= t <= end.time_s]
    if len(inside) < LEAST_UNITS:
        inside = done_at[-LEAST_UNITS:]
    return (inside[-1] - inside[0]) / (len(inside) - 1), power_w


@torch.no_grad()
def measure_alike_experts(runner: HfRunner, meter: EnergyMeter | None, seed: int) -> ExpertCost:
    """Measure what a token costs in an expert of a checkpoint, by the first layer: its experts are alike.

    Args:
        runner: of the checkpoint.
        meter: the device's energy counter; None on a CPU.
        seed: as in `measure_expert_cost`.
    """
    n_tokens, device = TOKENS[runner.device.type], runner.device
    modules = runner.model.named_modules()
    experts = next(module for name, module in modules if name.endswith(".mlp.experts"))
    seen: list[Tensor] = []
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        inputs = runner.samples.inputs[0]
        runner.answer(inputs[: -(-n_tokens // inputs.shape[1])], runner.top_k, 0.0)
    finally:
        hook.remove()
    x = seen[0].repeat(-(-n_tokens // len(seen[0])), 1)[:n_tokens]  # [T, D]
    index = torch.arange(n_tokens, device=device)[:, None] % runner.n_experts  # [T, 1]
    weights = torch.ones(n_tokens, 1, device=device, dtype=x.dtype)
    group = range(runner.n_experts)
    return measure_units([lambda: experts(x, index, weights)], [group], n_tokens, device, meter, seed)
