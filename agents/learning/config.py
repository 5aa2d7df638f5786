"""Settings of a training run; shipped values are in configs/agents, one file per algorithm."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from agents.files import plain
from agents.learning.algorithms import Settings, algorithm, check_action_mode, refuse_below_one
from thermoe_env.configs import config_path, read_yaml, validated


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
    trained_agent: str | None = None
    """Run folder or zip of a model of the same algorithm and network, whose weights the run begins with."""
    tensorboard_log: str | None = None
    """Folder of TensorBoard's files, in which the run has one of its own name; tb/ of the run by default."""
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
    return train_config({**read_yaml(file), **overrides}, str(file))


def train_config(flat: dict[str, Any], origin: str) -> TrainConfig:
    """Settings from keys side by side, as `TrainConfig.flat` gives them; errors name the `origin`.

    Raises:
        ValueError: unknown algorithm; unknown, missing or refused key.
    """
    chosen = algorithm(str(flat.get("algo")))
    common = {key: value for key, value in flat.items() if key in _COMMON}
    own = {key: value for key, value in flat.items() if key not in _COMMON}
    settings = validated(chosen.settings, own, origin, also=_COMMON)
    defaults = {"action_mode": chosen.action_mode}
    return validated(TrainConfig, {**defaults, **common, "settings": settings}, origin)
