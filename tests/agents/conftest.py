"""What tests of training share."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from agents.vec import TwinVecEnv
from moe.profiles import save_profile
from tests.thermoe_env.conftest import make_profile
from thermoe_env.scenario import config_path

STEPS = 12
"""Of an episode of `short_scenario`."""


@pytest.fixture(scope="session")
def short_scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the default scenario with short episodes and a profile made up for tests."""
    folder = tmp_path_factory.mktemp("scenario")
    save_profile(make_profile(), folder / "profile.json")
    raw = yaml.safe_load(config_path("scenarios", "default", ".yaml").read_text())
    raw |= {"profile": str(folder / "profile.json"), "episode_s": STEPS}
    (folder / "short.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "short.yaml")


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the user press Ctrl-C at the given step of the environments."""
    step_wait, played = TwinVecEnv.step_wait, 0

    def interrupted(self: TwinVecEnv) -> Any:
        nonlocal played
        played += 1
        if played > steps:
            raise KeyboardInterrupt
        return step_wait(self)

    monkeypatch.setattr(TwinVecEnv, "step_wait", interrupted)
