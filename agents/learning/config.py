"""Settings of a training run; shipped values are in configs/agents, one file per algorithm."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from agents.files import plain
from agents.learning.algorithms import Settings, algorithm, check_action_mode, refuse_below_one
from thermoe_env.configs import config_path
from thermoe_env.errors import ScenarioError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; shipped values are in configs/agents, one file per algorithm.

    Files hold these keys and those of the algorithm's settings side by side.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    algo: str
    action_mode: str
    """`multi_discrete`, `discrete` or `box`; where a file names none, what fits the algorithm best."""
    scenario: str
    """Name in configs/scenarios or path of a YAML file."""
    seed: int
    total_timesteps: int
    """Steps over all environments; the last update is played to its end."""
    n_envs: int
    """Environments, each playing one episode per round."""
    eval_freq: int
    """Steps between validations, which follow whole rounds."""
    eval_episodes: int
    save_freq: int = 1
    """Steps between checkpoints, which follow whole rounds."""
    torch_threads: int
    """More than one is a little faster on an idle machine, and many times slower on a busy one."""
    settings: Settings
    """Of the algorithm: an instance of its class in `agents.learning.algorithms`."""

    def __post_init__(self) -> None:
        wanted = algorithm(self.algo).settings
        if type(self.settings) is not wanted:
            raise ValueError(
                f"algo {self.algo!r} is set by {wanted.__name__}, got {type(self.settings).__name__}"
            )
        check_action_mode(self.algo, self.action_mode)
        refuse_below_one(self)
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def flat(self) -> dict[str, Any]:
        """All keys side by side, as files have them."""
        common = {name: getattr(self, name) for name in _COMMON}
        return plain({**common, **asdict(self.settings)})


_COMMON = tuple(field.name for field in fields(TrainConfig) if field.name != "settings")


def load_train_config(algo: str | Path = "ppo", **overrides: Any) -> TrainConfig:
    """Read the settings of an algorithm, with `overrides` in place of single keys.

    Args:
        algo: a known algorithm (its file in configs/agents), or the path of a YAML file.
        overrides: keys of `TrainConfig` or of the algorithm's settings.

    Raises:
        ValueError: unknown algorithm; unknown, missing or refused key.
    """
    if not Path(algo).is_file():
        algorithm(str(algo))  # refuses an unknown name
    file = config_path("agents", str(algo), ".yaml")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ScenarioError(f"{file}: {error}") from error
    if not isinstance(raw, dict):
        raise ScenarioError(f"{file}: settings are a mapping of keys, got {type(raw).__name__}")
    return train_config({**raw, **overrides}, str(file))


def train_config(flat: dict[str, Any], origin: str) -> TrainConfig:
    """Settings from keys side by side, as `TrainConfig.flat` gives them; errors name the `origin`.

    Raises:
        ValueError: unknown algorithm; unknown, missing or refused key.
    """
    from pydantic import TypeAdapter, ValidationError

    chosen = algorithm(str(flat.get("algo")))
    common = {key: value for key, value in flat.items() if key in _COMMON}
    own = {key: value for key, value in flat.items() if key not in _COMMON}
    try:
        settings = TypeAdapter(chosen.settings).validate_python(own)
        return TypeAdapter(TrainConfig).validate_python(
            {"action_mode": chosen.action_mode, **common, "settings": settings}
        )
    except ValidationError as error:
        known = sorted([*_COMMON, *(field.name for field in fields(chosen.settings))])
        raise ScenarioError(f"{origin}: {error}\nknown keys: {known}") from error
