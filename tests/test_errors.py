"""Commands that are given what does not exist end by one line that names it."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_module

import pytest

from moe.errors import one_line_errors

REFUSED = {
    "train_agent --algo nope": "unknown algo 'nope'",
    "train_agent --algo nope.yaml": "unknown algo 'nope.yaml'",
    "train_agent --scenario nope": "no scenarios 'nope'",
    "train_agent --resume nope": "nope holds no config.yaml",
    "train_agent --log-folder file/run": "Not a directory: 'file/run'",
    "evaluate --policy nope --scenario short.yaml": "unknown policy 'nope'",
    "evaluate --policy nope:Mine --scenario short.yaml": "there is no module 'nope'",
    "evaluate --policy . --scenario short.yaml": "holds no best_model.zip",
    "evaluate --scenario nope.yaml": "no scenarios 'nope.yaml'",
    "evaluate --traffic nope": "no traces/requests 'nope'",
    "agents.export_minari --dataset a/b-v0 --policy nope --scenario short.yaml": "unknown policy 'nope'",
    "agents.export_minari --dataset a/b-v0 --scenario nope": "no scenarios 'nope'",
    "agents.tuning.rules --scenario nope": "no scenarios 'nope'",
    "agents.tuning.gates --scenario nope": "no scenarios 'nope'",
    "agents.demo --scenario nope": "no scenarios 'nope'",
    "thermoe_env.calibration validate nope.csv --twin h100": "nope.csv",
    "moe.profiling --task language --model nope --device cpu --out out.json": "nope",
    "moe.profiling --task vision --size tiny --device cpu --out file/out.json": "file",
    "studies.robustness --policy nope --scenario short.yaml": "unknown policy 'nope'",
    "studies.robustness --config nope": "no studies 'nope'",
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of other tests, in which it is run once more
@pytest.mark.parametrize("command", REFUSED)
def test_what_does_not_exist_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path))
    (tmp_path / "short.yaml").write_text("{name: short, base: default, episode_s: 10}")
    (tmp_path / "file").touch()
    module, *options = command.split()
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit) as end:
        run_module(module, run_name="__main__", alter_sys=True)
    assert REFUSED[command] in str(end.value.code) and "\n" not in str(end.value.code)


def test_an_interruption_says_how_to_go_on() -> None:
    with pytest.raises(SystemExit, match=r"^\ninterrupted; continue with x$"), one_line_errors():
        raise KeyboardInterrupt("continue with x")
    with pytest.raises(RuntimeError, match="a fault of ours"), one_line_errors():
        raise RuntimeError("a fault of ours")
