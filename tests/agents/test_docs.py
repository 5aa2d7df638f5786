"""Examples of the documentation, run as they stand but for their size."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.load import load_policy
from agents.play.rollout import play_twin
from moe.workload import KNOB_NAMES
from thermoe_env.problem.problem import Problem

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"


def example(heading: str) -> str:
    """The first block of Python below a heading."""
    _, _, rest = PAGE.read_text().partition(f"\n## {heading}\n")
    block = re.search(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)
    assert block is not None, heading
    return block[1]


def test_stable_baselines3_trains_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = example("Stable-Baselines3")
    sizes = {"num_envs=64": "num_envs=2", "n_steps=300": "n_steps=8", "1200": "16", "1_000_000": "32"}
    for shown, tiny in sizes.items():
        assert shown in code
        code = code.replace(shown, tiny)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].num_timesteps == 32 and Path("mine.zip").is_file()
    observation = names["env"].reset()
    assert names["env"].observation_space.contains(observation[0])
    assert np.shape(names["model"].predict(observation)[0]) == (2, len(names["problem"].knobs.nvec))


def test_a_policy_of_one_s_own_is_loaded(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("frugal.py").write_text(example("Your own policy"))
    recording = play_twin(problem, load_policy("frugal:Frugal", problem), [0, 1], "Frugal")
    seen = recording.field("margin_c")[:-1] < 10.0  # what each decision but the first was made on
    experts = recording.index[1:, :, KNOB_NAMES.index("expert_count")]
    column = problem.knobs.controlled.index("expert_count")
    normal, saving = problem.knobs.action()[column], problem.knobs.action(expert_count=1)[column]
    np.testing.assert_array_equal(experts, np.where(seen, saving, normal))
