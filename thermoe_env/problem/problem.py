"""A scenario made concrete: profile, twin, knob levels and the reference the reward is priced in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moe.placement import Placement
from moe.profiles import Profile, ProfileError, level_index, load_profile, refuse_beyond
from moe.service.adaptation import tabulate
from moe.service.budget import UNLIMITED, EnergyBudget, StepBudget, open_purse
from moe.service.generate.lengths import token_lengths
from moe.service.traffic import traffic_of
from moe.token_profile import TokenProfile, load_token_profile
from moe.workload import Knobs
from thermoe_env.configs import config_path, validated
from thermoe_env.device.parameters import TwinParams, load_twin
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.check_limits import check_limits, inlet_offsets_c
from thermoe_env.problem.knobs import MEASURED, KnobTable
from thermoe_env.problem.placing import place
from thermoe_env.problem.scenario import Scenario
from thermoe_env.problem.tokens import request_profile

NODES_PER_OCTAVE = 8


class Tables(NamedTuple):
    """The profile at the knobs' levels, as compiled code reads it. B biases, else as in `Profile`."""

    cost: np.ndarray
    """[K, B, M, 4] cost of a micro-batch at the sizes of `batch_nodes`: latency in s, energy in J, and the
    same of one adaptation step."""
    answer_pure: np.ndarray  # [S, Q, K, B, 3], as the next see `moe.service.adaptation`
    answer_mixed: np.ndarray  # [S, M, G, 3]
    adapt_rate: float
    """Share of the adapted state that one adaptation step replaces."""
    load_imbalance: np.ndarray  # [K, B]


def batch_nodes(largest: int) -> np.ndarray:
    """Batch sizes from 1 to `largest` at which costs are tabled: `NODES_PER_OCTAVE` evenly in each octave.

    Costs are straight lines between measured sizes; those that are no node are rounded off by the next ones.
    """
    octaves = int(np.ceil(np.log2(max(2, largest))))
    step = np.arange(octaves * NODES_PER_OCTAVE + 2)
    return 2.0 ** (step // NODES_PER_OCTAVE) * (1.0 + step % NODES_PER_OCTAVE / NODES_PER_OCTAVE)


@dataclass(frozen=True)
class Problem:
    """Everything that does not change between episodes."""

    scenario: Scenario
    profile: Profile
    power_profile: Profile
    """Profile whose energies the twin uses; differs from `profile` only where that has none."""
    twin: TwinParams
    knobs: KnobTable
    placement: Placement
    """Which of the scenario's devices holds which expert of the model."""
    tokens: TokenProfile | None = None
    """Of task `generate`: what steps cost and answers are worth, where `profile` has whole requests."""

    def __deepcopy__(self, memo: object) -> Problem:
        """Itself: nothing changes it, and copies of an environment play the same problem."""
        return self

    @classmethod
    def of(cls, scenario: Scenario, profile: Profile | TokenProfile | None = None) -> Problem:
        """Load what the scenario names.

        Args:
            scenario: the control problem.
            profile: profile of the machine that will do the work, where it is another one than the
                scenario's; its batch levels then stand for the scenario's in the same order, and
                where it holds no energies power is modelled from the scenario's own profile.

        Raises:
            ScenarioError: a profile, a twin or a placement does not fit the scenario.
            ValueError: a level that was not measured, or more requests than can be counted.
            TraceError: the trace of requests does not fit the scenario.
        """
        own = profile_of(scenario, scenario.profile)
        named, measured = _of_requests(scenario, own), profile or own
        work = named if profile is None else _of_requests(scenario, profile)
        for of, task in ((scenario.profile, named.task), (f"of {work.device}", work.task)):
            if task != scenario.task:
                raise ScenarioError(f"profile {of!r} is of task {task!r}, not {scenario.task!r}")
        if named.energy_j is None:
            raise ScenarioError(
                f"profile {scenario.profile!r} holds no energies; name one measured with NVML"
            )
        if max(scenario.traffic.shifts) >= len(named.shifts):
            raise ScenarioError(
                f"traffic.shifts {scenario.traffic.shifts} exceed the profile's {named.shifts}"
            )
        _check_adaptation(scenario, work)
        placement = place(scenario, named)
        twin = load_twin(config_path("twin", scenario.twin, ".yaml"))
        offsets_c = inlet_offsets_c(scenario)
        _check_spread(scenario, twin, offsets_c)
        if work is not named:
            if scenario.task == "generate":  # the standard service runs a model as it was trained
                own_k = int(work.expert_count[work.own_k])
                scenario = replace(scenario, static=replace(scenario.static, expert_count=own_k))
            ratio = float(work.batch_size[-1] / named.batch_size[-1])
            static = replace(scenario.static, batch_size=max(1, round(scenario.static.batch_size * ratio)))
            scenario = replace(scenario, static=static)
        power = named if work.energy_j is None else work
        knobs = KnobTable.of(scenario, work)
        fixed = [name for name in knobs.controlled if name in MEASURED and len(knobs.levels[name]) == 1]
        if fixed and work is named:
            raise ScenarioError(
                f"scenario {scenario.name!r} controls {fixed}, of which profile {scenario.profile!r} has one "
                "level: take them out of `knobs`, or measure more (python -m moe.profiling)"
            )
        steps = measured if isinstance(measured, TokenProfile) else None
        problem = cls(scenario, work, power, twin, knobs, placement, steps)
        check_limits(scenario, twin, offsets_c, problem.limit_c)
        limits = replace(scenario.limits, temperature_c=problem.limit_c)  # a number, whatever room is next
        problem = replace(problem, scenario=replace(scenario, limits=limits))
        traffic_of(scenario.traffic, scenario.episode_s + 1, problem.capacity_rps)  # or too many requests
        _ = problem.device_share  # or work that cannot be shared
        return problem

    @cached_property
    def capacity_rps(self) -> float:
        """Requests per second of the standard service at full batches; load 1.0."""
        static = self.scenario.static
        return static.batch_size / self.profile.latency_at(
            static.batch_size, static.expert_count, static.routing_bias
        )

    @cached_property
    def reference_power_w(self) -> float:
        """Power of the standard service on all devices at load 1.0, the unit of energy prices."""
        idle = self.power_profile.idle_power_w
        assert idle is not None
        return len(self.scenario.devices) * idle + self.serving_power_w

    @cached_property
    def serving_power_w(self) -> float:
        """Power above idle of the standard service at load 1.0."""
        static = self.scenario.static
        batch = static.batch_size * self.batch_scale
        return self.power_profile.active_power_w(batch, static.expert_count, static.routing_bias)

    @cached_property
    def limit_c(self) -> float:
        """The virtual temperature limit, of the hottest die."""
        twin, each_w = self.twin, self.serving_power_w / len(self.scenario.devices)
        rise_c = (twin.resistance_c_per_w - twin.r_fan_c_per_w) * each_w  # before fans answer it
        return self.scenario.limits.on_a_card(twin.inlet_c + twin.idle_rise_c, rise_c)

    @cached_property
    def batch_scale(self) -> float:
        """Batch size on the power profile that stands for a batch of 1 on the working one."""
        return float(self.power_profile.batch_size[-1] / self.profile.batch_size[-1])

    @cached_property
    def metered_profile(self) -> Profile:
        """The working profile; where it holds no energies, with those modelled from the power profile.

        Its work then takes what the power profile's card draws while as busy with work of the same kind.
        """
        own, power = self.profile, self.power_profile
        if own.energy_j is not None:
            return own
        watts = np.array(
            [
                [
                    [power.active_power_w(n * self.batch_scale, int(k), r) for r in own.cost_bias]
                    for k in own.expert_count
                ]
                for n in own.batch_size
            ]
        )  # [N, K, R]
        adapting = None if own.ttt_latency_s is None else own.ttt_latency_s * watts[:, :, 0]
        return replace(
            own, energy_j=own.latency_s * watts, idle_power_w=power.idle_power_w, ttt_energy_j=adapting
        )

    @cached_property
    def inlet_offset_c(self) -> np.ndarray:
        """How much warmer the inlet is than calibrated in each second, float [episode_s + 1]."""
        return inlet_offsets_c(self.scenario)

    @cached_property
    def purse(self) -> np.ndarray:
        """What adaptation may spend at an episode's start, see `moe.service.budget`."""
        budget = self.scenario.adaptation.budget
        if budget is None:
            return UNLIMITED
        return open_purse(**asdict(budget), full_serving_w=self.serving_power_w)

    def step_budget(self) -> StepBudget | None:
        """The same for a live service, with what its work costs at full clock; None where unlimited."""
        if not len(self.purse):
            return None
        profile = self.metered_profile

        def batch_energy_j(size: int, knobs: Knobs) -> tuple[float, float]:
            serving_j = profile.energy_at(size, knobs.expert_count, knobs.routing_bias)
            return serving_j, profile.step_energy_at(size, knobs.expert_count)

        return StepBudget(EnergyBudget.of(self.purse), batch_energy_j)

    @cached_property
    def quality_floor(self) -> np.ndarray:
        """[S] least quality per input shift: that of the standard service, not adapted, times a share."""
        return self.scenario.feasible.quality_share * self._standard_quality

    @cached_property
    def _standard_quality(self) -> np.ndarray:
        """[S] of the standard service, not adapted, per input shift."""
        p, static = self.profile, self.scenario.static
        rows = p.accuracy[:, 0, level_index("expert_count", static.expert_count, p.expert_count)]
        return np.array([np.interp(static.routing_bias, p.routing_bias, row) for row in rows])

    @cached_property
    def reference_good_rps(self) -> float:
        """Good answers per second of the standard service at load 1.0, all shifts alike.

        Raises:
            ProfileError: it has nothing right, so nothing has a price.
        """
        accuracy = float(self._standard_quality[list(self.scenario.traffic.shifts)].mean())
        if not accuracy > 1e-9:
            raise ProfileError(
                f"the model that was profiled on {self.profile.device} answers nothing right under the "
                "scenario's shifts (accuracy 0), and rewards are priced by right answers: serve a trained "
                "model, or measure its profile with more --samples"
            )
        return self.capacity_rps * accuracy

    @cached_property
    def expert_tokens(self) -> np.ndarray:
        """[K, B, L, E] tokens that one answer sends to each expert of each layer, at the knobs' levels."""
        p, bias = self.profile, np.array(self.knobs.levels["routing_bias"])
        share = np.apply_along_axis(lambda row: np.interp(bias, p.routing_bias, row), 1, p.expert_share)
        return share * p.expert_count[:, None, None, None]

    @cached_property
    def device_share(self) -> np.ndarray:
        """[K, B, D] share of the expert work that each device takes, at the knobs' levels.

        Tokens of its experts, each times the expert's width. A profile of tokens counts none per expert:
        there all are taken to be in equal demand, at every bias, and a device's share is that of the experts
        that it holds.
        """
        if self.placement.n_devices == 1:
            return np.ones((*self.expert_tokens.shape[:2], 1))
        width = np.array(self.profile.model["config"].get("expert_widths", 1.0), np.float64)
        held = self.placement.per_device(self.expert_tokens.sum(axis=2) * width)  # [K, B, D]
        total = held.sum(axis=-1, keepdims=True)
        if not np.all(total > 0.0):
            raise ScenarioError(
                "the energy of the work is split by expert width, but at some routing bias all tokens go to "
                "experts of width 0; serve this model from one device"
            )
        return held / total

    @cached_property
    def tables(self) -> Tables:
        """The profile interpolated to the levels of the knobs, for compiled code."""
        p, bias = self.profile, np.array(self.knobs.levels["routing_bias"])

        for value in bias:
            refuse_beyond("routing_bias", value, p.routing_bias)

        def at_bias(table: np.ndarray, measured: np.ndarray, axis: int) -> np.ndarray:
            """Interpolate an axis of measured biases to the knob's levels."""
            return np.ascontiguousarray(
                np.apply_along_axis(lambda row: np.interp(bias, measured, row), axis, table)
            )

        def at_nodes(table: np.ndarray) -> np.ndarray:
            """Interpolate axis 0 (measured batch sizes) to the nodes.

            Below the smallest measured batch the smallest one's cost stands: latency has a floor there.
            """
            at = batch_nodes(int(p.batch_size[-1]))
            return np.apply_along_axis(lambda column: np.interp(at, p.batch_size, column), 0, table)

        def per_step(table: np.ndarray | None) -> np.ndarray:
            """Cost of an adaptation step, [M, K, B]; it does not depend on the bias."""
            shape = len(batch_nodes(int(p.batch_size[-1]))), len(p.expert_count), len(bias)
            if table is None:
                return np.zeros(shape)
            return np.broadcast_to(at_nodes(table)[:, :, None], shape)

        if p.energy_j is None:
            raise ProfileError(f"the profile of {p.device} holds no energies, so no twin can run on it")
        if p.ttt_latency_s is not None:
            _refuse_another_method(self.scenario, p, "the twin knows no other adaptation")
        share = p.expert_share * p.expert_share.shape[-1]  # [K, R, L, E], 1 = even
        imbalance = share.std(axis=-1).mean(axis=-1)  # [K, R]
        answers = tabulate(p.quality(), p.mixture, p.own_k)
        cost = np.stack(
            [
                at_nodes(at_bias(p.latency_s, p.cost_bias, 2)), at_nodes(at_bias(p.energy_j, p.cost_bias, 2)),
                per_step(p.ttt_latency_s), per_step(p.ttt_energy_j),
            ],
            axis=-1,
        )  # fmt: skip
        return Tables(
            np.ascontiguousarray(cost.transpose(1, 2, 0, 3)),
            at_bias(answers.answer_pure, p.routing_bias, 3),
            answers.answer_mixed,
            p.adapt_rate or 0.0,
            at_bias(imbalance, p.routing_bias, 1),
        )


def profile_of(scenario: Scenario, name: str) -> Profile | TokenProfile:
    """A profile by name or path, of the kind of the scenario's service.

    Raises:
        ProfileError: it cannot be used.
    """
    path = config_path("profiles", name, ".json")
    return load_profile(path) if scenario.generate is None else load_token_profile(path)


def _of_requests(scenario: Scenario, profile: Profile | TokenProfile) -> Profile:
    """A profile of whole requests, which that of steps becomes by the lengths of the scenario's.

    Raises:
        ScenarioError: the scenario's service has no steps.
        TraceError: the lengths cannot be used.
    """
    if isinstance(profile, Profile):
        return profile
    if scenario.generate is None:
        raise ScenarioError(
            f"profile of {profile.cost.device!r} is of task 'generate', not {scenario.task!r}"
        )
    lengths = token_lengths(scenario.generate.lengths, profile.cost.config["context"])
    return request_profile(profile, lengths)


def _check_adaptation(scenario: Scenario, profile: Profile) -> None:
    """Refuse a budget that the profile cannot charge.

    Raises:
        ScenarioError: names what the profile measured.
    """
    if scenario.adaptation.budget is None:
        return
    if profile.ttt_latency_s is None:
        raise ScenarioError(
            f"adaptation.budget has nothing to pay for: the profile of {profile.device} measured no "
            f"adaptation of task {profile.task!r}, so ttt_steps has the level 0 "
            "alone; leave the budget out (null)"
        )
    _refuse_another_method(scenario, profile, "a budget charges what was measured")


def _refuse_another_method(scenario: Scenario, profile: Profile, why: str) -> None:
    wanted = scenario.adaptation.method, scenario.adaptation.group
    if wanted != profile.adapted_by:
        raise ScenarioError(
            f"adaptation.method and .group {wanted} are wanted, the profile of {profile.device} was "
            f"measured with {profile.adapted_by}, and {why}; name that one, or play live without a budget"
        )


def _check_spread(scenario: Scenario, twin: TwinParams, inlet_c: np.ndarray) -> None:
    """Refuse a spread or an inlet that would make a device of the twin that no calibration may describe.

    Args:
        scenario: the control problem.
        twin: the calibration.
        inlet_c: float [seconds], offset of the inlet.

    Raises:
        ScenarioError: names the rule that the hottest or the coldest device would break.
    """
    spread, offsets = scenario.randomize, [device.inlet_offset_c for device in scenario.devices]
    drift_c = twin.inlet_drift_c + max(device.drift_c for device in scenario.devices)
    passive = [name for name in vars(twin) if name.startswith("r_") and name != "r_fan_c_per_w"]
    for what, sign, offset_c in (
        ("hottest", 1.0, max(offsets) + inlet_c.max()), ("coldest", -1.0, min(offsets) + inlet_c.min()),
    ):  # fmt: skip
        extreme = {name: getattr(twin, name) * (1.0 + sign * spread.resistance) for name in passive}
        extreme["r_fan_c_per_w"] = twin.r_fan_c_per_w * (1.0 - sign * spread.resistance)
        extreme["leakage_per_c"] = twin.leakage_per_c * (1.0 + spread.leakage)
        extreme |= {"inlet_c": twin.inlet_c + offset_c + sign * spread.inlet_c, "inlet_drift_c": drift_c}
        validated(
            TwinParams,
            {**vars(twin), **extreme},
            f"the {what} device that randomize (resistance, leakage, inlet_c), inlet_offset_c, drift_c and "
            f"inlet (by_c, trace) make of twin {scenario.twin!r}",
        )
