"""Scenarios: what is served, under which limits, and what counts. Strict YAML, checked dataclasses.

A scenario names a profile (what the work costs) and a twin calibration (how the device heats up), and
states the rest. Unknown keys are refused, so a misspelt one cannot vanish.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, field, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from moe.model.config import TTT_METHODS, Group, Method
from moe.ranges import (
    STRICT,
    Degrees,
    Dwell,
    Flag,
    Name,
    Number,
    Seconds,
    Share,
    Spread,
    Weight,
    Whole,
)  # fmt: skip
from moe.service.traffic import TrafficConfig
from moe.workload import KNOB_NAMES, Knobs
from thermoe_env.configs import Location, config_path, configs_dir, merged, read_yaml, validated
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.announced import PriceEvents, StrictHours
from thermoe_env.problem.inlet import InletConfig
from thermoe_env.problem.limits import PowerBudget, ThermalLimits


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServiceConfig:
    """Terms of service per request class (interactive, deferrable)."""

    deadline_s: tuple[Seconds, Seconds] = (0.3, 60.0)
    max_wait_s: tuple[Seconds, Seconds] = (0.05, 2.0)
    """A partial batch is launched when its oldest request has waited this long."""
    expire_after_s: tuple[Seconds, Seconds] = (3.0, 90.0)

    def __post_init__(self) -> None:
        for c in range(2):
            if not self.max_wait_s[c] < self.deadline_s[c] < self.expire_after_s[c]:
                raise ValueError(
                    "service needs max_wait_s < deadline_s < expire_after_s per class, got "
                    f"{self.max_wait_s[c]}, {self.deadline_s[c]}, {self.expire_after_s[c]}"
                )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardWeights:
    """What counts beside a good answer, which earns 1 (`thermoe_env.mdp.reward`)."""

    energy: Weight = 0.35
    """What the standard service spends at full load and the usual price, of what it earns."""
    late: Weight = 5.0
    """Per request owed."""
    heat: Weight = 5.0
    """Per interval owed, of what the standard service earns in one at full load."""
    quality: Weight = 20.0
    """Per answer owed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Feasibility:
    """The promises: when a policy counts at all, and from where on it is in debt."""

    quality_share: Share = 0.99
    """Least quality, of the standard service's on the same requests."""
    late_share: Share = 0.01
    """Most requests late or expired, of those finished, in each class."""
    hot_share: Share = 0.01
    """Most time above the temperature limit."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Randomize:
    """Spread of the twin between episodes (relative half-widths, uniform; inlet in degrees)."""

    resistance: Spread = 0.05
    time_constant: Spread = 0.1
    leakage: Spread = 0.2
    energy: Spread = 0.03
    inlet_c: Annotated[Degrees, Field(le=30.0)] = 1.0
    steps: Annotated[Number, Field(ge=0.0, le=10.0)] = 1.0
    """Of task generate: what steps take is drawn from the posterior of their fit, so many times as wide."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeviceConfig:
    """One of the devices that serve the model together (`thermoe_env.twin.heat` says what is modelled)."""

    inlet_offset_c: Annotated[Number, Field(ge=-30.0, le=30.0)] = 0.0
    """How much warmer its air is than the calibrated device's."""
    drift_c: Annotated[Number, Field(ge=0.0, le=20.0)] = 0.0
    """Standard deviation of a slow drift of its air alone, beside the calibrated one, which is for all."""
    drift_tau_s: Seconds = 60.0
    """Time constant with which it comes back."""
    experts: tuple[Annotated[Whole, Field(ge=0, le=100_000)], ...] | None = None
    """Numbers of the experts that it holds, in every layer; none given: all, where it is the only device."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExchangeConfig:
    """What a layer of the token service takes to add up what the experts of several devices said.

    The values are modelled, of H100s behind NVLink switches: no card here was measured. A layer reduces twice
    (`moe.lm.engine.parallel`), some 10 us each where there is little to send (two H100s need 6 us under CUDA
    graphs, github.com/NVIDIA/nccl/issues/1259). Of the links' 450 GB/s NCCL moves 370 by rings
    (github.com/NVIDIA/nccl-tests/issues/212).
    """

    latency_s: Annotated[Number, Field(ge=0.0, le=1.0)] = 20e-6
    """Of a layer, however few rows there are."""
    bytes_per_s: Annotated[Number, Field(ge=1e6, le=1e15)] = 370e9
    """Bus bandwidth as NCCL counts it: of n devices each moves 2 (n - 1) / n of the bytes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StepBudgetConfig:
    """Energy that adaptation may spend: a fraction of what serving takes, banked for a while.

    No budget (null) leaves adaptation unlimited, `ttt_steps` of 0 does without.
    """

    fraction: Annotated[Number, Field(gt=0.0, le=1e4)] = 0.1
    """Joules earned per joule of serving, both above idle."""
    window_s: Dwell = 10.0
    bank_windows: Annotated[Whole, Field(ge=0, le=1000)] = 3
    """Past windows whose rest can still be spent."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaptationConfig:
    """How the model adapts where `ttt_steps` asks it to (`moe.ttt`; of task generate `moe.lm.adapt`)."""

    method: Method | Literal["head"] = "tent"
    """The twin plays the one that its profile was measured with: `tent` on the norms in the shipped ones, of
    task generate `head`."""
    group: Group | Literal["head"] = "norms"
    """Parameters that adapt."""
    guard: Flag = True
    """Whether guards watch over the steps of a live model; those of `head` are part of it."""
    budget: StepBudgetConfig | None = None
    """None: unlimited."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateConfig:
    """A service of tokens: what its requests are like, and what is promised besides `service`."""

    lengths: Name
    """Prompt and output tokens: a name in configs/traces/requests or the path of a trace with token counts.
    One factor brings them down so that 99% of the requests fit the model's context; the rest is cut."""
    ttft_s: tuple[Seconds, Seconds] = (1.0, 60.0)
    """Time to first token, from arrival, above which an answer is late."""
    tpot_s: tuple[Seconds, Seconds] = (0.05, 1.0)
    """Time per output token above which it is late."""
    strict: StrictHours | None = None
    """Hours of a shorter one for interactive requests; None: there are none. The promise in force when an
    answer ends is the one that counts."""
    cache_positions: Annotated[Whole, Field(ge=1, le=100_000_000)] | None = None
    """Positions whose keys and values the service keeps; None: enough for all that may run."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Scenario:
    """One control problem, for the twin and for a live device alike."""

    name: Name
    task: Name
    profile: Name
    """File in configs/profiles (without .json) or a path."""
    twin: Name
    """File in configs/twin (without .yaml) or a path."""
    static: Knobs
    """The standard service; knobs that are not controlled stay here."""
    knobs: tuple[str, ...] = ("routing_bias", "batch_size", "expert_count", "ttt_steps")
    """Controlled knobs."""
    episode_s: Annotated[Whole, Field(ge=10, le=86_400)] = 300
    interval_s: Number = 1.0
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    limits: ThermalLimits
    power_budget: PowerBudget = field(default_factory=PowerBudget)
    price: PriceEvents | None = None
    """When energy costs more or less than usual; None: never."""
    reward: RewardWeights = field(default_factory=RewardWeights)
    feasible: Feasibility = field(default_factory=Feasibility)
    randomize: Randomize = field(default_factory=Randomize)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    inlet: InletConfig | None = None
    """How much warmer the air becomes in an episode; None: it stays as calibrated, but for its drift."""
    devices: Annotated[tuple[DeviceConfig, ...], Field(max_length=64)] = (DeviceConfig(),)
    """Devices of the calibrated kind among which the experts are placed; the power budget is that of all."""
    generate: GenerateConfig | None = None
    """Of task `generate`, which answers requests of many tokens; other tasks answer in one pass."""
    exchange: ExchangeConfig | None = None
    """Between several devices of that task; None: as modelled."""

    def __post_init__(self) -> None:
        if (self.task == "generate") != (self.generate is not None):
            raise ValueError(
                f"the section generate goes with task 'generate', got task {self.task!r} and "
                f"generate {self.generate}: give both or neither"
            )
        self._check_devices()
        self._check_adaptation()
        unknown = [name for name in self.knobs if name not in KNOB_NAMES]
        if unknown or not self.knobs or len(set(self.knobs)) < len(self.knobs):
            raise ValueError(f"knobs must be different ones of {KNOB_NAMES}, got {self.knobs}")
        if self.interval_s not in (0.5, 1.0):
            raise ValueError(
                f"interval_s must be 0.5 or 1.0 (the energy counter ticks at 0.1), got {self.interval_s}"
            )

    def _check_devices(self) -> None:
        """Check what needs no model; `Problem.of` places the experts of one."""
        if not self.devices:
            raise ValueError("devices must name at least one device, got none; leave the key out for one")
        without = [d for d, device in enumerate(self.devices) if device.experts is None]
        if without and len(self.devices) > 1:
            raise ValueError(
                f"with several devices each must say which experts it holds, devices {without} do not; "
                "give `experts` ([] for a device that only idles)"
            )
        if self.exchange is not None and (len(self.devices) == 1 or self.generate is None):
            raise ValueError(
                f"exchange is between several devices of task 'generate', got {self.exchange} with "
                f"{len(self.devices)} of task {self.task!r}: leave it out"
            )

    def _check_adaptation(self) -> None:
        """Check that the method is for the task; the section left out names none."""
        fitting = ("head",) if self.task == "generate" else TTT_METHODS.get(self.task, ())
        if self.adaptation != AdaptationConfig() and self.adaptation.method not in fitting:
            raise ValueError(
                f"adaptation.method {self.adaptation.method!r} is not for task {self.task!r}; use one of "
                f"{fitting}"
            )
        if (self.adaptation.method == "head") != (self.adaptation.group == "head"):
            wanted = self.adaptation.method, self.adaptation.group
            raise ValueError(
                f"adaptation.method and .group are both 'head' or neither, got {wanted}: name both"
            )
        if self.adaptation.method == "head" and not self.adaptation.guard:
            raise ValueError("adaptation.guard of the method 'head' cannot be off: leave it out")
        if self.task == "generate" and len(self.devices) > 1 and self.adapts:
            raise ValueError(
                f"{len(self.devices)} devices share the experts of task generate, and then the head does not "
                "adapt: take ttt_steps out of `knobs` and `static`"
            )

    @property
    def adapts(self) -> bool:
        """Whether adaptation may be asked for."""
        return "ttt_steps" in self.knobs or self.static.ttt_steps > 0

    @property
    def steps(self) -> int:
        """Control intervals in an episode."""
        return round(self.episode_s / self.interval_s)


def as_overrides(overrides: object) -> dict[str, Any]:
    """What an environment is given as `overrides`, as keywords of `load_scenario`; None gives none.

    Raises:
        ScenarioError: no mapping, or one with keys that are no names.
    """
    given = {} if overrides is None else overrides
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ScenarioError(
            "overrides must be a mapping of scenario keys, such as {'episode_s': 600}, got "
            f"{reprlib.repr(overrides)}"
        )
    return dict(given)


def load_scenario(scenario: str | Path | Scenario = "default", /, **overrides: Any) -> Scenario:
    """Load a scenario by shipped name or path.

    A file may name another as its `base` and then states only its own `name` and what differs. What a file
    names (`base`, `profile`, `twin`, `traffic.trace`, `inlet.trace`) is a shipped name or a path that begins
    in its folder; what overrides name begins in the current one.

    Args:
        scenario: name in configs/scenarios, path of a YAML file, or a ready `Scenario`.
        overrides: top-level keys to replace (nested ones as mappings, merged into the file's).

    Returns:
        The scenario. Its files are shipped names or absolute paths, traces always are paths, so it
        says the same wherever a copy of it is loaded.

    Raises:
        ScenarioError: unknown or missing key, a value its rule refuses, no such file, or a base that is
            missing or leads back to where it is named.
    """
    if isinstance(scenario, Scenario):
        if not overrides:
            return scenario
        layers = [_Layer(scenario.name, None, asdict(scenario))]
    else:
        layers = _layers(config_path("scenarios", str(scenario), ".yaml").resolve())
    layers.insert(0, _Layer(f"overrides of {layers[0].name}", None, overrides))
    keys = reduce(merged, (layer.keys for layer in reversed(layers)))
    loaded = validated(Scenario, keys, lambda loc: _stated_in(layers, loc).name, also=("base",))

    def found(loc: Location, kind: str, name: str, suffix: str) -> Path:
        layer = _stated_in(layers, loc)
        try:
            return config_path(kind, name, suffix, layer.folder).absolute()
        except ScenarioError as error:
            raise ScenarioError(f"{layer.name}: {'.'.join(map(str, loc))}: {error}") from error

    files = {}
    for key, kind, suffix in (("profile", "profiles", ".json"), ("twin", "twin", ".yaml")):
        path = found((key,), kind, getattr(loaded, key), suffix)
        files[key] = path.stem if path.parent == configs_dir() / kind else str(path)
    traffic = loaded.traffic
    if traffic.trace is not None:
        trace = found(("traffic", "trace"), "traces/requests", traffic.trace, ".csv")
        traffic = replace(traffic, trace=str(trace))
    inlet = loaded.inlet
    if inlet is not None and inlet.trace is not None:
        inlet = replace(inlet, trace=str(found(("inlet", "trace"), "traces/inlet", inlet.trace, ".csv")))
    generate = loaded.generate
    if generate is not None:
        lengths = found(("generate", "lengths"), "traces/requests", generate.lengths, ".csv")
        generate = replace(generate, lengths=str(lengths))
    return replace(loaded, traffic=traffic, inlet=inlet, generate=generate, **files)


class _Layer(NamedTuple):
    """Keys that a file states, or overrides do."""

    name: str
    """For messages."""
    folder: Path | None
    """Where its paths begin; None for the current one."""
    keys: dict[str, Any]


def _layers(path: Path, above: tuple[Path, ...] = ()) -> list[_Layer]:
    """A scenario's file and those that it is based on, the most special first."""
    keys = read_yaml(path)
    base = keys.pop("base", None)
    if above:
        keys.pop("name", None)  # what differs from a base has a name of its own
    layer = _Layer(str(path), path.parent, keys)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise ScenarioError(f"{path}: base must be the name or the path of one scenario, got {base!r}")
    try:
        below = config_path("scenarios", base, ".yaml", path.parent).resolve()
    except ScenarioError as error:
        raise ScenarioError(f"{path}: base: {error}") from error
    if below in (*above, path):
        chain = " -> ".join(map(str, (*above, path, below)))
        raise ScenarioError(f"{path}: base {base!r} leads in a circle ({chain}): leave the base of one out")
    return [layer, *_layers(below, (*above, path))]


def _stated_in(layers: list[_Layer], loc: Location) -> _Layer:
    """The layer whose word counts at a location; the file itself for what none states."""
    for layer in layers:
        inside: Any = layer.keys
        for part in loc:
            try:
                inside = inside[part]
            except (KeyError, IndexError, TypeError):
                break
        else:
            return layer
    return layers[1]
