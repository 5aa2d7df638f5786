"""The knobs: one table of names, levels and units, and the three forms an action may take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from moe.compiled import copy_row, inlined, jit
from moe.workload import KNOB_NAMES, Knobs

if TYPE_CHECKING:
    from gymnasium import Space

    from moe.profiles import Profile
    from thermoe_env.problem.scenario import Scenario

INDEX_DTYPE = np.dtype([(name, np.int64) for name in KNOB_NAMES])
"""Level of every knob, as compiled code reads it."""
VALUE_DTYPE = np.dtype([(name, np.float64) for name in KNOB_NAMES])
"""Value of every knob, likewise."""

ACTION_MODES = ("multi_discrete", "discrete", "box")

MEASURED = ("routing_bias", "batch_size", "expert_count", "ttt_steps")
"""Knobs whose levels a profile has."""

_ROUTING_BIAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PACE = (0.2, 0.4, 0.6, 0.8, 1.0)
_SM_CLOCK = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ADMISSION = (0.0, 0.5, 1.0)
_BATCH_LEVELS = 6


def knob_levels(profile: Profile) -> dict[str, tuple[float, ...]]:
    """Levels of every knob on the machine and model that `profile` describes."""
    largest = int(profile.batch_size[-1])
    smallest = max(int(profile.batch_size[0]), largest >> (_BATCH_LEVELS - 1))
    batch = [largest >> shift for shift in range(_BATCH_LEVELS - 1, -1, -1)]
    return {
        "routing_bias": tuple(b for b in _ROUTING_BIAS if b <= profile.routing_bias[-1]),
        "batch_size": tuple(float(b) for b in batch if b >= smallest),
        "expert_count": tuple(float(k) for k in profile.expert_count),
        "ttt_steps": _ttt_steps(profile),
        "pace": _PACE,
        "sm_clock": _SM_CLOCK,
        "admission": _ADMISSION if profile.task == "generate" else (1.0,),
    }


def _ttt_steps(profile: Profile) -> tuple[float, ...]:
    if profile.ttt_latency_s is None:
        return (0.0,)
    return (0.0, 1.0) if profile.task == "generate" else (0.0, 1.0, 2.0)


@jit
def _decode_levels(actions, nvec, columns, default, index):
    """Fill `index` [n, knobs] from levels [n, controlled]; False where an action is not of the space."""
    for i in range(actions.shape[0]):
        copy_row(index[i], default)
        for c in range(actions.shape[1]):
            level = int(actions[i, c])
            if not 0 <= level < nvec[c] or level != actions[i, c]:
                return False
            index[i, columns[c]] = level
    return True


@jit
def _decode_flat(actions, nvec, columns, default, index):
    """Same from flat numbers [n, 1] of a combination of levels, the last knob varying fastest."""
    combinations = nvec.prod()
    for i in range(actions.shape[0]):
        rest = int(actions[i, 0])
        if not 0 <= rest < combinations or rest != actions[i, 0]:
            return False
        copy_row(index[i], default)
        for c in range(nvec.shape[0] - 1, -1, -1):
            index[i, columns[c]] = rest % nvec[c]
            rest //= nvec[c]
    return True


@jit
def _decode_box(actions, nvec, columns, default, index):
    """Same from [-1, 1] [n, controlled], divided evenly among the levels."""
    for i in range(actions.shape[0]):
        copy_row(index[i], default)
        for c in range(actions.shape[1]):
            if not abs(actions[i, c]) <= 1.0 + 1e-6:
                return False
            level = int((actions[i, c] + 1.0) * 0.5 * nvec[c])
            index[i, columns[c]] = min(max(level, 0), nvec[c] - 1)
    return True


@inlined
def fill_values(level_table, index, values):
    """Fill `values` from `index`, rows of both [knobs], see `KnobTable.level_table`."""
    for k in range(index.shape[0]):
        values[k] = level_table[k, index[k]]


_DECODERS = {"multi_discrete": _decode_levels, "discrete": _decode_flat, "box": _decode_box}


@dataclass(frozen=True)
class KnobTable:
    """Levels of all knobs, which of them are controlled, and where the others stay."""

    levels: dict[str, tuple[float, ...]]
    controlled: tuple[str, ...]
    default_index: tuple[int, ...]
    """Level of every knob (in `KNOB_NAMES` order) where it is not controlled."""

    @classmethod
    def of(cls, scenario: Scenario, profile: Profile) -> KnobTable:
        """Table of a scenario on a profile; a static level that was not measured is refused."""
        levels = knob_levels(profile)
        default = []
        for name in KNOB_NAMES:
            value = float(getattr(scenario.static, name))
            if value not in levels[name]:
                raise ValueError(
                    f"static.{name}={value} is not one of the levels {levels[name]} of this profile"
                )
            default.append(levels[name].index(value))
        return cls(levels, scenario.knobs, tuple(default))

    @cached_property
    def level_table(self) -> np.ndarray:
        """Levels of all knobs, float [knobs, most levels], rows in `KNOB_NAMES` order filled up with 0."""
        table = np.zeros((len(KNOB_NAMES), max(len(levels) for levels in self.levels.values())))
        for row, name in enumerate(KNOB_NAMES):
            table[row, : len(self.levels[name])] = self.levels[name]
        return table

    def records(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records of levels and of values, `INDEX_DTYPE` and `VALUE_DTYPE` [n], of int64 [n, knobs]."""
        values = self.level_table[np.arange(len(KNOB_NAMES)), index]
        levels = np.ascontiguousarray(index, np.int64)
        return levels.view(INDEX_DTYPE)[:, 0], values.view(VALUE_DTYPE)[:, 0]

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.array([KNOB_NAMES.index(name) for name in self.controlled], np.int64)

    @cached_property
    def _default(self) -> np.ndarray:
        return np.array(self.default_index, np.int64)

    @cached_property
    def nvec(self) -> np.ndarray:
        """Number of levels per controlled knob."""
        return np.array([len(self.levels[name]) for name in self.controlled], np.int64)

    def action_space(self, mode: str) -> Space[Any]:
        """Action space: `multi_discrete`, `discrete` (flattened) or `box` ([-1, 1] per knob)."""
        from gymnasium import spaces

        if mode == "multi_discrete":
            return spaces.MultiDiscrete(self.nvec)
        if mode == "discrete":
            return spaces.Discrete(int(self.nvec.prod()))
        if mode == "box":
            return spaces.Box(-1.0, 1.0, (len(self.controlled),), np.float32)
        raise ValueError(f"action_mode must be one of {ACTION_MODES}, got {mode!r}")

    def indices(self, actions: np.ndarray, mode: str) -> np.ndarray:
        """Level index of every knob, int64 [n, knobs], from a batch of actions.

        Args:
            actions: [n, controlled] for `multi_discrete` and `box`, [n] for `discrete`.
            mode: the action mode.

        Raises:
            ValueError: wrong shape, a level that does not exist, or not a number.
        """
        actions = np.asarray(actions)
        nvec = self.nvec
        if mode == "discrete":
            if actions.ndim != 1:
                raise ValueError(f"actions must be integers, one per environment, got shape {actions.shape}")
            actions = actions[:, None]
        elif actions.ndim != 2 or actions.shape[1] != len(nvec):
            raise ValueError(
                f"an action must have {len(nvec)} entries {self.controlled}, got shape {actions.shape}"
            )
        if actions.dtype.kind in "iub":
            actions = actions.astype(np.int64, copy=False)
        else:
            actions = actions.astype(np.float64, copy=False)
        index = np.empty((len(actions), len(KNOB_NAMES)), np.int64)
        if not _DECODERS[mode](actions, nvec, self._columns, self._default, index):
            raise ValueError(f"{self._rule(mode)}, got {actions!r}")
        return index

    def _rule(self, mode: str) -> str:
        """What actions must be."""
        if mode == "discrete":
            return f"an action must be an integer in [0, {int(self.nvec.prod())})"
        if mode == "box":
            return "every entry of a box action must lie in [-1, 1]"
        return f"every level must lie in [0, {self.nvec.tolist()}) for {self.controlled}"

    def one(self, action: Any, mode: str) -> tuple[np.ndarray, Knobs]:
        """Level indices, int64 [knobs], and `Knobs` of a single action.

        Actions of discrete modes are few, so each is decoded once; what it gives is shared.

        Raises:
            ValueError: as in `indices`.
        """
        action = np.asarray(action)
        key = mode, action.shape, action.dtype.char, action.tobytes()
        known = self._decoded.get(key)
        if known is None:
            index = self.indices(action[None], mode)[0]
            known = index, self.knobs(index)
            if mode != "box":
                self._decoded[key] = known
        return known

    @cached_property
    def _decoded(self) -> dict[tuple[Any, ...], tuple[np.ndarray, Knobs]]:
        return {}

    def knobs(self, index: np.ndarray) -> Knobs:
        """The `Knobs` of one row of level indices."""
        key = tuple(index.tolist())
        if key not in self._known:
            value = {name: self.levels[name][i] for name, i in zip(KNOB_NAMES, key, strict=True)}
            whole = {name: int(value[name]) for name in ("batch_size", "expert_count", "ttt_steps")}
            self._known[key] = Knobs(**{**value, **whole})
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, ...], Knobs]:
        return {}

    def index(self, knobs: Knobs) -> np.ndarray:
        """Level index of every knob, int64 [knobs]; a value that is no level is refused by `ValueError`."""
        return np.array([self.levels[name].index(float(getattr(knobs, name))) for name in KNOB_NAMES])

    def action(self, **wanted: float) -> np.ndarray:
        """The multi-discrete action nearest to the wanted values; others as in the static service.

        Raises:
            ValueError: a name that is not controlled.
        """
        unknown = sorted(set(wanted) - set(self.controlled))
        if unknown:
            raise ValueError(f"{unknown} are not controlled; controlled knobs are {self.controlled}")
        action = []
        for name in self.controlled:
            default = self.levels[name][self.default_index[KNOB_NAMES.index(name)]]
            levels = np.array(self.levels[name])
            action.append(int(np.argmin(np.abs(levels - wanted.get(name, default)))))
        return np.array(action, np.int64)
