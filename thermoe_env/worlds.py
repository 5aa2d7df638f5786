"""Which world an environment plays in, and how its two halves are built."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from moe.profiles import load_profile
from moe.workload import Workload
from thermoe_env.errors import GpuUnavailableError, ScenarioError
from thermoe_env.problem import Problem
from thermoe_env.profiled import ProfiledWorkload
from thermoe_env.scenario import Scenario, config_path
from thermoe_env.telemetry import Telemetry
from thermoe_env.twin import TwinTelemetry

WORLDS = ("auto", "twin", "live")
_LOG = logging.getLogger("thermoe_env")


@dataclass
class World:
    """A workload and a telemetry that belong together."""

    name: str
    """`twin`, `live` (NVML) or `live-cpu` (measured work, modelled device)."""
    problem: Problem
    workload: Workload
    telemetry: Telemetry

    def close(self) -> None:
        """Close both halves; safe to call twice."""
        self.workload.close()
        self.telemetry.close()


def build_world(scenario: Scenario, world: str) -> World:
    """Build the halves of a world.

    Args:
        scenario: the control problem.
        world: `twin`, `live`, or `auto` (live where CUDA and NVML answer, else the twin; says which).

    Raises:
        ValueError: unknown world.
        GpuUnavailableError: CUDA without NVML.
        ScenarioError: a live world of several devices.
    """
    if world == "auto":
        reason = _several_devices(scenario) or _no_gpu_reason()
        world = "live" if reason is None else "twin"
        # Not a Python warning: the choice is expected, but it must be seen once.
        _LOG.warning("ThermalMoE-v0: world %r, because %s", world, reason or "CUDA and NVML answer")
    if world == "twin":
        problem = Problem.of(scenario)
        telemetry = TwinTelemetry(problem)
        return World("twin", problem, ProfiledWorkload(problem, lambda: telemetry.clock), telemetry)
    if world == "live":
        return _live(scenario)
    raise ValueError(f"world must be one of {WORLDS}, got {world!r}")


def _several_devices(scenario: Scenario) -> str | None:
    """Why the live world cannot play a scenario's devices, or None when it can."""
    if len(scenario.devices) == 1:
        return None
    return f"the scenario has {len(scenario.devices)} devices and the live service serves from one GPU"


def _no_gpu_reason() -> str | None:
    """Why the live world cannot use a GPU, or None when it can."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return "CUDA is not available"
    from thermoe_env.nvml import NvmlTelemetry

    try:
        NvmlTelemetry().close()
    except GpuUnavailableError as error:
        return f"NVML does not answer ({error})"
    return None


def warn_of_another_card(card: str, problem: Problem) -> None:
    """Log where a scenario's calibration or profile is that of another card than the one at work."""
    twin = ("twin", problem.twin.gpu, "calibrate record, then fit")
    made = (twin, ("profile", problem.profile.device, "moe.profile"))
    for what, device, remedy in made:
        if device != card:
            _LOG.warning(
                "the %s of this scenario is of a %s, the card here is a %s: limits and references are the "
                "other card's; make this card's own (%s)", what, device, card, remedy,
            )  # fmt: skip


def _live(scenario: Scenario) -> World:
    """The live world: real forward passes, read by NVML on CUDA, by the twin's model on a CPU."""
    several = _several_devices(scenario)
    if several is not None:
        raise ScenarioError(f"{several}; play it in the twin")
    import torch

    from moe.live import LiveWorkload
    from moe.samples import SamplePool
    from moe.weights import check_profile, load_model
    from thermoe_env.nvml import NvmlTelemetry
    from thermoe_env.shadow import Shadow

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        problem = Problem.of(scenario)
    else:
        problem = Problem.of(scenario, load_profile(config_path("profiles", f"cpu-{scenario.task}", ".json")))
        _LOG.warning(
            "live world on a CPU: work is measured, the device is modelled after %s", problem.twin.gpu
        )
    telemetry: Telemetry = NvmlTelemetry() if on_gpu else TwinTelemetry(problem)
    if isinstance(telemetry, NvmlTelemetry):
        warn_of_another_card(telemetry.gpu.name, problem)
    try:
        device = "cuda" if on_gpu else "cpu"
        check_profile(problem.profile)
        model = load_model(scenario.task, problem.profile.size, device)
        model.expert_cost.copy_(torch.from_numpy(problem.profile.expert_cost))  # what the tables go by
        samples = SamplePool(scenario.task, problem.profile.shifts, device)
        live = LiveWorkload(
            model,
            samples,
            scenario.traffic,
            problem.capacity_rps,
            scenario.episode_s + 1,
            scenario.service,
            device,
        )
        levels = problem.knobs.levels
        live.warm_up(
            [int(b) for b in levels["batch_size"]],
            [int(k) for k in levels["expert_count"]],
            int(max(levels["ttt_steps"])),
        )
    except BaseException:
        telemetry.close()
        raise
    return World(
        "live" if on_gpu else "live-cpu", problem, live if on_gpu else Shadow(live, problem), telemetry
    )
