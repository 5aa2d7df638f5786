"""Every command ends by one line in place of a traceback: what is refused, an interruption, a closed pipe."""

from __future__ import annotations

import ctypes
import resource
import signal
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path
from runpy import run_module

import pytest

from agents.files import write_file
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
    "moe.profiling --task vision --size tiny --device cpu --out .": "it is a folder, name a file",
    "moe.training --task vision --size tiny --device cpu --out file": "file",
    "moe.profiling nope.json": "nope.json: is no profile",
    "moe.profiling tokens --size small --device cpu --out file/out.json": "file",
    "moe.profiling tokens --size small --device cpu --out .": "it is a folder, name a file",
    "moe.lm --size small --text nope --out file/out": "file",
    "moe.lm.engine.sample --tokens 2000": "do not fit a context of 1024",
    "agents.tuning.rules --out .": "Is a directory: '.'",
    "agents.tuning.gates --out .": "Is a directory: '.'",
    "thermoe_env.calibration fit nope.csv --out .": "Is a directory: '.'",
    "studies.robustness --policy nope --scenario short.yaml": "unknown policy 'nope'",
    "studies.robustness --config nope": "no studies 'nope'",
    "benchmarks.train_speed --scenario nope": "no scenarios 'nope'",
    "benchmarks.twin_error --twin nope": "no twin 'nope'",
    "benchmarks.expert_parallel --out .": "torchrun --nproc-per-node 2",
    "benchmarks.expert_parallel --out . --placement nope": "torchrun",
}
ROOT = Path(__file__).parents[1]
PACKAGES = ("moe", "thermoe_env", "agents", "studies", "benchmarks")


def commands() -> list[str]:
    """Whatever can be run: modules that ask whether they are the main one, and console scripts."""
    files = [*ROOT.glob("*.py"), *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in files
        if file.stem == "__main__" or '__name__ == "__main__"' in file.read_text()
        if not file.match("benchmarks/clients/with_*.py")  # for other environments, by `benchmarks.clients`
    ]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return sorted([*modules, *scripts.values()])


class Entered(BaseException):
    """The frame of commands was reached."""


def test_there_are_commands() -> None:
    assert {"train_agent", "moe.profiling", "benchmarks.env_speed", "moe.profiling.cli:cli"} <= {*commands()}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", commands())
def test_every_command_begins_by_its_frame(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Before its flags are read, so that nothing of it can end by a traceback."""

    def entered() -> None:
        raise Entered

    monkeypatch.setattr("moe.errors.plain_terminal", entered)  # the first that the frame does
    monkeypatch.setattr(sys, "argv", ["command", "--no-such-flag"])
    module, _, function = command.partition(":")
    with pytest.raises(Entered):
        if function:
            getattr(import_module(module), function)()
        else:
            run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of other tests, in which it is run once more
@pytest.mark.parametrize("command", REFUSED)
def test_what_does_not_exist_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path))
    (tmp_path / "short.yaml").write_text("{name: short, base: vision, episode_s: 10}")
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


def test_sigterm_stops_a_command_as_an_interruption_does(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, one_line_errors("stopped, all is kept"):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143 and capsys.readouterr().err == "\nstopped, all is kept\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interruption_that_a_callback_of_compiled_code_swallows_comes_again() -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGTERM))()
        time.sleep(60.0)
    assert end.value.code == 143


def test_what_the_system_refuses_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path, "name a file"),
        (tmp_path / "none", "check the name"),
        (tmp_path / "file" / "x", "name another"),
    ):
        with pytest.raises(SystemExit) as end, one_line_errors():
            path.read_text()
        assert str(path) in str(end.value.code) and said in str(end.value.code)


def test_a_full_disk_is_named_with_the_file_and_leaves_no_part(tmp_path: Path) -> None:
    file = tmp_path / "result.csv"
    file.write_text("whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit) as end, one_line_errors():
            write_file(file, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(file) in str(end.value.code) and "raise the limit of file sizes" in str(end.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["result.csv"] and file.read_text() == "whole"


UNREAD = {
    "plain": "print('x' * 100_000)",
    "buffered": "print('x')",
    "rich": "from rich.console import Console; Console().print('x' * 100)",
    "help": "import tyro; tyro.cli(int, description='x' * 100_000, args=['--help'])",
}


@pytest.mark.parametrize("output", UNREAD)
def test_output_that_nobody_reads_ends_a_command_quietly(output: str) -> None:
    code = f"from moe.errors import one_line_errors\nwith one_line_errors():\n    {UNREAD[output]}"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141


def test_a_pipe_that_is_not_the_output_is_an_error() -> None:
    with pytest.raises(SystemExit, match="BrokenPipeError: of a worker"), one_line_errors():
        raise BrokenPipeError("of a worker")
