"""Which world an environment plays in, and how its two halves are built."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moe.profiles import load_profile
from moe.workload import Workload
from thermoe_env.device.telemetry import Telemetry
from thermoe_env.errors import GpuUnavailableError, ScenarioError
from thermoe_env.problem.problem import Problem, profile_of
from thermoe_env.problem.scenario import Scenario
from thermoe_env.twin.telemetry import TwinTelemetry
from thermoe_env.twin.workload import TwinWorkload

if TYPE_CHECKING:
    from moe.lm.config import Size
    from moe.service.score.runner import Runner

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

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of.

        Raises:
            TypeError: a live world, whose model, queue and meter exist once.
        """
        if self.name != "twin":
            raise TypeError(
                f"world {self.name!r} cannot be copied or pickled: its model, clock and meter are those of a "
                "machine; copy ThermalMoETwin-v0, or make a live environment where it is needed"
            )
        return vars(self)

    def limits_c(self) -> list[float]:
        """Temperature limit in force in each interval, and one more.

        Nobody can warm the inlet of a real device: there the limit falls by as much as the inlet would rise.
        """
        scenario, offset_c = self.problem.scenario, self.problem.inlet_offset_c
        fall_c = np.zeros_like(offset_c) if self.telemetry.simulated else offset_c
        second = (np.arange(scenario.steps + 1) * scenario.interval_s).astype(np.int64)
        return (self.problem.limit_c - fall_c[second]).tolist()

    def close(self) -> None:
        """Close both halves; safe to call twice."""
        self.workload.close()
        self.telemetry.close()


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face model in place of the scenario's own, and what it costs here."""

    model: str
    """Its folder."""
    profile: str
    """Its profile, as `python -m moe.profiling --model` measured it on this machine."""

    @classmethod
    def of(cls, model: str | None, profile: str | None) -> Checkpoint | None:
        """Both or neither.

        Raises:
            ValueError: one is given without the other.
        """
        if (model is None) != (profile is None):
            raise ValueError(
                f"model and profile go together, got model={model!r} and profile={profile!r}: measure a "
                "checkpoint with `python -m moe.profiling --model FOLDER`; a scenario names its own profile"
            )
        return None if model is None or profile is None else cls(model, profile)


def build_world(scenario: Scenario, world: str, checkpoint: Checkpoint | None = None) -> World:
    """Build the halves of a world.

    Args:
        scenario: the control problem.
        world: `twin`, `live`, or `auto` (live where CUDA and NVML answer, else the twin; says which).
        checkpoint: what a live world serves instead of the scenario's own model.

    Raises:
        ValueError: unknown world, or a checkpoint for another world than `live`.
        GpuUnavailableError: CUDA without NVML.
        ScenarioError: a live world of several devices.
        ProfileError: the profile is of another model than is served.
        HfModelError: the checkpoint cannot be served.
    """
    if checkpoint is not None and world != "live":
        raise ValueError(f"a checkpoint is served live, not in world {world!r}: make ThermalMoELive-v0")
    if world == "auto":
        reason = _several_devices(scenario) or _no_gpu_reason()
        world = "live" if reason is None else "twin"
        # Not a Python warning: the choice is expected, but it must be seen once.
        _LOG.warning("ThermalMoE-v0: world %r, because %s", world, reason or "CUDA and NVML answer")
    if world == "twin":
        problem = Problem.of(scenario)
        telemetry = TwinTelemetry(problem)
        return World("twin", problem, TwinWorkload(problem, partial(getattr, telemetry, "clocks")), telemetry)
    if world == "live":
        return _live(scenario, checkpoint)
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
    from moe.device.torch_device import uuid_of
    from thermoe_env.device.nvml import NvmlTelemetry

    try:
        NvmlTelemetry(uuid_of(torch.device("cuda"))).close()
    except GpuUnavailableError as error:
        return f"NVML does not answer ({error})"
    return None


def warn_of_another_card(card: str, problem: Problem) -> None:
    """Log where a scenario's calibration or profile is of another card, or of a service without graphs."""
    twin = ("twin", problem.twin.gpu, "calibrate record, then fit")
    made = (twin, ("profile", problem.profile.device, "moe.profiling"))
    for what, device, remedy in made:
        if device != card:
            _LOG.warning(
                "the %s of this scenario is of a %s, the card here is a %s: limits and references are the "
                "other card's; make this card's own (%s)", what, device, card, remedy,
            )  # fmt: skip
    profile = problem.profile
    own_model = profile.task != "generate" and "checkpoint" not in profile.provenance
    if own_model and not profile.provenance.get("captured"):
        _LOG.warning(
            "the profile of this scenario was measured without CUDA graphs, by which the service here "
            "answers: small batches take less time than it says; measure it again (moe.profiling)"
        )


def _live_problem(scenario: Scenario, on_gpu: bool, checkpoint: Checkpoint | None) -> Problem:
    """What a live world plays: the scenario on the profile of the machine and model that will do the work."""
    if checkpoint is not None:
        from moe.hf.runner import check_checkpoint

        profile = load_profile(checkpoint.profile)
        check_checkpoint(profile, checkpoint.model)
        # The standard service runs a model as it was made.
        static = replace(scenario.static, expert_count=int(profile.expert_count[profile.own_k]))
        return Problem.of(replace(scenario, static=static), profile)
    if on_gpu:
        return Problem.of(scenario)
    return Problem.of(scenario, profile_of(scenario, f"cpu-{scenario.task}"))


def runner_of(problem: Problem, device: str, checkpoint: Checkpoint | None) -> Runner:
    """What answers in a live world."""
    import torch

    from moe.data.pools import SamplePool
    from moe.hf.runner import load_runner
    from moe.service.score.runner import Runner
    from moe.training.weights import check_profile, load_model
    from moe.ttt import METHODS, Adapter, GuardSettings

    profile = problem.profile
    if checkpoint is not None:
        return load_runner(checkpoint.model, profile.shifts, device)  # of experts that cost alike
    check_profile(profile)
    model = load_model(profile.task, profile.size, device)
    model.expert_cost.copy_(torch.from_numpy(profile.expert_cost))  # what the tables go by
    samples = SamplePool(profile.task, profile.shifts, device)
    if profile.ttt_latency_s is None:
        return Runner(model, samples, device)
    wanted = problem.scenario.adaptation
    assert wanted.method != "head" and wanted.group != "head"  # of task generate
    settings, _ = METHODS[wanted.method]
    guard = GuardSettings() if wanted.guard else None
    return Runner(model, samples, device, adapter=Adapter(model, settings(), wanted.group, guard))


def _live(scenario: Scenario, checkpoint: Checkpoint | None) -> World:
    """The live world: real forward passes, read by NVML on CUDA, by the twin's model on a CPU."""
    several = _several_devices(scenario)
    if several is not None:
        raise ScenarioError(f"{several}; play it in the twin")
    import torch

    from moe.device.torch_device import uuid_of
    from moe.service.score.live import LiveWorkload
    from thermoe_env.device.nvml import NvmlTelemetry
    from thermoe_env.twin.shadow import Shadow

    on_gpu = torch.cuda.is_available()
    name = "live" if on_gpu else "live-cpu"
    tokens: Workload | None = None
    if scenario.generate is None:
        problem = _live_problem(scenario, on_gpu, checkpoint)
    else:
        from thermoe_env.live_tokens import token_service

        problem, tokens = token_service(scenario, torch.device("cuda" if on_gpu else "cpu"))
    if not on_gpu:
        _LOG.warning(
            "live world on a CPU: work is measured, the device is modelled after %s", problem.twin.gpu
        )
    telemetry: Telemetry = NvmlTelemetry(uuid_of(torch.device("cuda"))) if on_gpu else TwinTelemetry(problem)
    if isinstance(telemetry, NvmlTelemetry):
        warn_of_another_card(telemetry.gpu.name, problem)
    if tokens is not None:
        return World(name, problem, tokens if on_gpu else Shadow(tokens, problem), telemetry)
    try:
        runner = runner_of(problem, "cuda" if on_gpu else "cpu", checkpoint)
        live = LiveWorkload(
            runner, scenario.traffic, problem.capacity_rps, scenario.episode_s + 1, scenario.service,
            budget=problem.step_budget(),
        )  # fmt: skip
        levels = problem.knobs.levels
        live.warm_up(
            [int(b) for b in levels["batch_size"]],
            [int(k) for k in levels["expert_count"]],
            int(max(levels["ttt_steps"])),
        )
    except BaseException:
        telemetry.close()
        raise
    return World(name, problem, live if on_gpu else Shadow(live, problem), telemetry)


def weights_file(problem: Problem) -> Path:
    """Where the weights of a problem's own model are on this machine."""
    from moe.lm import weights as of_tokens
    from moe.training import weights

    scenario, size = problem.scenario, problem.profile.size
    if scenario.generate is None:
        return weights.weights_path(scenario.task, size)
    return of_tokens.weights_path(cast("Size", size))
