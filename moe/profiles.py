"""The profile: what one model costs and answers on one machine, as measured (`python -m moe.profiling`).

A profile is a JSON file. Every cell in it was measured; a cell that could not be measured is absent,
and the file is refused. Energies are per micro-batch and above the idle power of the device.

What lies between the cells: expert counts are never interpolated. Batch sizes and routing biases are,
linearly and within the measured range: above a small batch's floor, time and energy are linear in its size,
but for what fills CUDA graphs up (docs/design.md, the staircase). A batch smaller than the smallest costs as
much as that. `held_out` says with what error for costs; biases between those of the quality are among the
points of `adaptation_error`.

Index letters: N batch sizes, K expert counts, C biases of the costs, R biases of the quality, S input
shifts, Q states of the model (unadapted, then adapted to each shift; 1 where nothing adapts), M pairs of
states, P mixtures of a pair, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.files import write_file

IDENTITY = ("key", "config", "data_sha256", "weights_sha256")
"""Fields of `Profile.model`."""
HELD_OUT = (
    "batch_size", "expert_count", "routing_bias", "latency_s", "energy_j", "latency_error", "energy_error",
)  # fmt: skip
"""Fields of an entry of `Profile.held_out`; energies are null without a meter."""
_METERED = ("energy_j", "energy_spread", "start_temperature_c", "idle_power_w", "expert_energy_j")
_ADAPTING = ("mixture", "adapt_rate", "adaptation_error", "ttt_latency_s", "ttt_latency_spread")
_METERED_AND_ADAPTING = ("ttt_energy_j", "ttt_energy_spread")


class ProfileError(ValueError):
    """A profile file cannot be used; the message names the file, the field and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Measured tables of one (model, machine). Adaptation tables are None for a task without it.

    A spread is the standard deviation of a cell's visits over their median, which is the cell's value.
    """

    task: str
    size: str
    device: str
    """Name of the device as its driver gives it."""
    provenance: dict[str, Any]
    """Where, when, with what versions, seed and options it was measured."""
    model: dict[str, Any]
    """Identity of what was measured, as `moe.training.weights.identity` gives it."""
    shifts: tuple[str, ...]
    """[S] names of the input shifts; the first is "clean"."""
    batch_size: np.ndarray
    """[N] measured batch sizes, ascending."""
    expert_count: np.ndarray
    """[K] experts per token, ascending."""
    routing_bias: np.ndarray
    """[R] biases at which quality and expert shares were measured, ascending from 0."""
    cost_bias: np.ndarray
    """[C] biases at which costs were measured, ascending, from and to the ends of `routing_bias`."""
    latency_s: np.ndarray
    """[N, K, C] time of a micro-batch at full clock."""
    latency_spread: np.ndarray
    """[N, K, C]"""
    energy_j: np.ndarray | None
    """[N, K, C] energy of a micro-batch above idle; None where no meter exists."""
    energy_spread: np.ndarray | None
    """[N, K, C]"""
    visits: np.ndarray
    """[N, K, C] how often a cell was measured."""
    start_temperature_c: np.ndarray | None
    """[N, K, C] temperature of the die before a visit, mean over the visits."""
    idle_power_w: float | None
    ttt_latency_s: np.ndarray | None
    """[N, K] time of one adaptation step after a micro-batch."""
    ttt_latency_spread: np.ndarray | None
    """[N, K]"""
    ttt_energy_j: np.ndarray | None
    """[N, K] energy of one adaptation step above idle."""
    ttt_energy_spread: np.ndarray | None
    """[N, K]"""
    held_out: list[dict[str, float | None]]
    """Cells between those of the tables: what was measured, and the relative error of interpolation."""
    samples: int
    """Samples behind each quality."""
    accuracy: np.ndarray
    """[S, Q, K, R] share of right answers."""
    confidence: np.ndarray
    """[S, Q, K, R] mean probability of the answer given."""
    entropy: np.ndarray
    """[S, Q, K, R] mean entropy of the answer over its maximum."""
    mixture: np.ndarray | None
    """[S, M, P, 3] accuracy, confidence and entropy of mixtures of two states at the model's own expert count
    and without bias, as `moe.service.adaptation.tabulate` reads them."""
    adapt_rate: float | None
    """Share of the adapted state that one adaptation step replaces, see `moe.ttt.step_share`."""
    adaptation_error: dict[str, float] | None
    """Error of `service.adaptation` on random sequences of shifts and steps, played on the model itself."""
    expert_share: np.ndarray
    """[K, R, L, E] share of a layer's routed tokens that each expert takes."""
    expert_cost: np.ndarray
    """[E] cost from 0 to 1 that the router's bias went by while all this was measured."""
    expert_latency_s: np.ndarray
    """[E] device time of one token in one expert of one layer, as `moe.profiling.expert_cost` measures it."""
    expert_energy_j: np.ndarray | None
    """[E] energy of that above idle."""

    def latency_at(self, batch_size: float, expert_count: int, routing_bias: float = 0.0) -> float:
        """Latency of a micro-batch in seconds, interpolated as the twin does."""
        return self._at(self.latency_s, batch_size, expert_count, routing_bias)

    def energy_at(self, batch_size: float, expert_count: int, routing_bias: float = 0.0) -> float:
        """Energy of a micro-batch above idle in joules, interpolated as the twin does."""
        if self.energy_j is None:
            raise ProfileError(
                f"the profile of {self.device} holds no energies; measure one on a card with NVML"
            )
        return self._at(self.energy_j, batch_size, expert_count, routing_bias)

    def step_energy_at(self, batch_size: float, expert_count: int) -> float:
        """Energy above idle of an adaptation step after a micro-batch, in joules, as the twin has it."""
        if self.ttt_energy_j is None:
            raise ProfileError(f"the profile of {self.device} holds no energies of adaptation steps")
        k = level_index("expert_count", expert_count, self.expert_count)
        return float(np.interp(batch_size, self.batch_size, self.ttt_energy_j[:, k]))

    def active_power_w(self, batch_size: float, expert_count: int, routing_bias: float = 0.0) -> float:
        """Mean power above idle while micro-batches of this kind run back to back."""
        energy = self.energy_at(batch_size, expert_count, routing_bias)
        return energy / self.latency_at(batch_size, expert_count, routing_bias)

    def quality(self) -> np.ndarray:
        """Accuracy, confidence and entropy of the states, [S, Q, K, R, 3]."""
        return np.stack([self.accuracy, self.confidence, self.entropy], axis=-1)

    @property
    def own_k(self) -> int:
        """Index of the model's own expert count, at which it adapted."""
        return level_index("expert_count", self.model["config"]["top_k"], self.expert_count)

    @property
    def adapted_by(self) -> tuple[str, str]:
        """Method and group of the adaptation that was measured; older profiles do not say: TENT."""
        adaptation = self.provenance.get("adaptation") or {}
        return adaptation.get("method", "tent"), adaptation.get("group", "norms")

    def accuracy_interval(self) -> np.ndarray:
        """Ends of the 95% interval of `accuracy` (Wilson, JASA 22, 1927), [S, Q, K, R, 2]."""
        z2_n = 1.959964**2 / self.samples
        middle = (self.accuracy + z2_n / 2.0) / (1.0 + z2_n)
        variance = self.accuracy * (1.0 - self.accuracy) * z2_n + z2_n**2 / 4.0
        half = np.sqrt(variance) / (1.0 + z2_n)
        return np.stack([middle - half, middle + half], axis=-1)

    def _at(self, table: np.ndarray, batch_size: float, expert_count: int, routing_bias: float) -> float:
        k = level_index("expert_count", expert_count, self.expert_count)
        refuse_beyond("routing_bias", routing_bias, self.cost_bias)
        column = [np.interp(routing_bias, self.cost_bias, row) for row in table[:, k, :]]  # [N]
        return float(np.interp(batch_size, self.batch_size, column))


def level_index(knob: str, value: float, levels: np.ndarray) -> int:
    """Position of `value` among the measured `levels` of a knob; an unmeasured one is refused."""
    hits = np.flatnonzero(np.asarray(levels) == value)
    if not len(hits):
        raise ProfileError(f"{knob}={value} was not measured; the profile holds {list(np.asarray(levels))}")
    return int(hits[0])


def refuse_beyond(knob: str, value: float, levels: np.ndarray) -> None:
    """Refuse a value outside of the measured levels of a knob that is interpolated."""
    if not levels[0] <= value <= levels[-1]:
        raise ProfileError(
            f"{knob}={value} lies outside of what was measured, {levels[0]} to {levels[-1]}; measure it "
            "with `python -m moe.profiling`"
        )


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile; anything doubtful raises `ProfileError` naming file and field."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
    except FileNotFoundError as error:
        raise ProfileError(f"{path}: no such profile; measure one with `python -m moe.profiling`") from error
    except OSError as error:
        raise ProfileError(
            f"{path}: cannot be read ({error.strerror}); name the file of a profile"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not a JSON document ({error}); measure it again") from error
    known = {f.name for f in dataclasses.fields(Profile)}
    if not isinstance(raw, dict) or set(raw) != known:
        odd = sorted(set(raw) ^ known) if isinstance(raw, dict) else "no mapping"
        raise ProfileError(
            f"{path}: missing or unknown fields {odd}; a profile holds exactly {sorted(known)}"
        )
    arrays = {f.name for f in dataclasses.fields(Profile) if "ndarray" in str(f.type)}
    values: dict[str, Any] = {
        name: _as_array(path, name, raw[name]) if name in arrays else raw[name] for name in known
    }
    if not isinstance(raw["shifts"], list) or not raw["shifts"] or not _all_text(raw["shifts"]):
        raise ProfileError(f"{path}: shifts must list the names of the input shifts, got {raw['shifts']!r}")
    values["shifts"] = tuple(raw["shifts"])
    profile = Profile(**values)
    _check(path, profile)
    return profile


def save_profile(profile: Profile, path: str | Path) -> None:
    """Check and write a profile in one step: the file is whole or absent."""
    path = Path(path)
    _check(path, profile)
    document = {f.name: _as_json(getattr(profile, f.name)) for f in dataclasses.fields(Profile)}
    write_file(path, json.dumps(document, indent=1, allow_nan=False))


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is there twice, one value would be lost without a word."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{max(keys, key=keys.count)!r} is there twice in an object")
    return dict(pairs)


def _as_array(path: Path, name: str, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    try:
        table = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProfileError(
            f"{path}: {name} is ragged, or has a cell missing or not a number ({error})"
        ) from error
    if any(isinstance(cell, str | bool) for cell in np.asarray(value, dtype=object).flat):
        raise ProfileError(f"{path}: {name} holds text or true and false among its numbers")
    return table


def _as_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return json.loads(json.dumps(value.tolist()), parse_float=lambda text: float(f"{float(text):.6g}"))
    return value


def _check(path: Path, p: Profile) -> None:
    for name in ("batch_size", "expert_count", "routing_bias", "cost_bias", "expert_share"):
        table = getattr(p, name)
        if table is None or table.size == 0 or table.ndim != (4 if name == "expert_share" else 1):
            raise ProfileError(
                f"{path}: {name} is absent, empty or of the wrong rank; measure the profile again"
            )
    _check_tables(path, p)
    for name in ("batch_size", "expert_count", "routing_bias", "cost_bias"):
        levels = getattr(p, name)
        if not (np.all(np.diff(levels) > 0) and np.all(np.isfinite(levels))):
            raise ProfileError(f"{path}: {name} must ascend, got {levels.tolist()}")
    for name in ("batch_size", "expert_count"):
        levels = getattr(p, name)
        if levels[0] < 1:
            raise ProfileError(f"{path}: {name} must start at 1 or above, got {levels[0]}")
        if np.any(levels % 1):
            raise ProfileError(f"{path}: {name} must hold whole numbers, got {levels.tolist()}")
    ends = [0.0, p.routing_bias[-1]]
    if [p.routing_bias[0], p.routing_bias[-1]] != ends or [p.cost_bias[0], p.cost_bias[-1]] != ends:
        raise ProfileError(f"{path}: routing_bias must start at 0 and cost_bias have the same ends")
    if p.shifts[0] != "clean":
        raise ProfileError(f'{path}: shifts must start with "clean", got {list(p.shifts)}')
    _check_scalars(path, p)
    if not np.allclose(p.expert_share.sum(axis=-1), 1.0, atol=1e-3):
        raise ProfileError(f"{path}: expert_share does not sum to 1 over the experts of a layer")


def _check_tables(path: Path, p: Profile) -> None:
    cost = (len(p.batch_size), len(p.expert_count), len(p.cost_bias))
    states = 1 if p.mixture is None else len(p.shifts) + 1
    quality = (len(p.shifts), states, len(p.expert_count), len(p.routing_bias))
    points = p.mixture.shape[2] if p.mixture is not None and p.mixture.ndim == 4 else 0
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("latency_s", "latency_spread", "energy_j", "energy_spread", "visits"), cost),
        "start_temperature_c": cost,
        **dict.fromkeys(
            ("ttt_latency_s", "ttt_latency_spread", "ttt_energy_j", "ttt_energy_spread"), cost[:2]
        ),
        **dict.fromkeys(("accuracy", "confidence", "entropy"), quality),
        "mixture": (len(p.shifts), states * (states - 1) // 2, points, 3),
        "expert_share": (*quality[2:], *p.expert_share.shape[2:]),
        **dict.fromkeys(("expert_cost", "expert_latency_s", "expert_energy_j"), p.expert_share.shape[3:]),
    }
    for name, shape in shapes.items():
        table = getattr(p, name)
        if table is None:
            if name in _METERED + _ADAPTING + _METERED_AND_ADAPTING:
                continue
            raise ProfileError(f"{path}: {name} is absent; measure it with `python -m moe.profiling`")
        if table.shape != shape:
            raise ProfileError(
                f"{path}: {name} has shape {table.shape}, the axes say {shape}: a cell is missing"
            )
        if not np.all(np.isfinite(table)) or np.any(table < 0.0):
            where = np.argwhere(~np.isfinite(table) | (table < 0.0))[0].tolist()
            raise ProfileError(f"{path}: {name}{where} is negative or not a number; measure that cell again")
        if name.endswith(("_s", "_j", "visits")) and np.any(table <= 0.0):
            raise ProfileError(f"{path}: {name} holds a zero; nothing runs in no time at no cost")
        if name in ("accuracy", "confidence", "entropy", "mixture", "expert_share", "expert_cost") and np.any(
            table > 1.0 + 1e-6
        ):
            raise ProfileError(f"{path}: {name} holds a value above 1")


def _check_scalars(path: Path, p: Profile) -> None:
    """Check texts and numbers, and which fields are there together."""
    if not _all_text([p.task, p.size, p.device]):
        raise ProfileError(f"{path}: task, size and device must be text, got {p.task, p.size, p.device}")
    if not isinstance(p.provenance, dict):
        raise ProfileError(f"{path}: provenance must be an object, got {p.provenance!r}")
    groups = (
        (_METERED, p.energy_j is not None),
        (_ADAPTING, p.mixture is not None),
        (_METERED_AND_ADAPTING, p.energy_j is not None and p.mixture is not None),
    )
    for names, there in groups:
        for name in names:
            if (getattr(p, name) is not None) != there:
                raise ProfileError(
                    f"{path}: {name} must be {'there' if there else 'null'} as the others of {names} are: "
                    "they are measured together or not at all"
                )
    if p.idle_power_w is not None and not _within(p.idle_power_w, 1e-3, 1e5):
        raise ProfileError(f"{path}: idle_power_w must be above 0, got {p.idle_power_w}")
    if p.adapt_rate is not None and not _within(p.adapt_rate, 1e-6, 1.0):
        raise ProfileError(f"{path}: adapt_rate must lie in (0, 1], got {p.adapt_rate}")
    if type(p.samples) is not int or p.samples < 1:
        raise ProfileError(f"{path}: samples must be a whole number above 0, got {p.samples!r}")
    if not isinstance(p.model, dict) or set(p.model) != set(IDENTITY):
        raise ProfileError(f"{path}: model must be an object with exactly the fields {IDENTITY}")
    config = p.model["config"]
    if not isinstance(config, dict) or config.get("top_k") not in p.expert_count:
        raise ProfileError(f"{path}: model.config.top_k must be among expert_count {p.expert_count.tolist()}")
    for cell in p.held_out if isinstance(p.held_out, list) else [None]:
        if not isinstance(cell, dict) or set(cell) != set(HELD_OUT):
            raise ProfileError(f"{path}: held_out must list objects with exactly the fields {HELD_OUT}")
        for name, value in cell.items():
            if not (value is None and name.startswith("energy")) and not _within(value, -1e9, 1e9):
                raise ProfileError(f"{path}: held_out has {name}={value!r}, which is not a number")
    if not isinstance(p.adaptation_error, dict | None):
        raise ProfileError(f"{path}: adaptation_error must be an object, got {p.adaptation_error!r}")
    for name, value in (p.adaptation_error or {}).items():
        if not _within(value, 0.0, 1e9):
            raise ProfileError(f"{path}: adaptation_error.{name} must be a number, got {value!r}")


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)
