"""Accuracy against joules per image, by method of adaptation: `python -m studies.ttt_frontier`.

First each model is trained once and each phase of serving and adapting it weighed by itself, alone on the
card. Then every seed of a model is one repeat: the model is trained and serves every stream without
adaptation and by every method, guarded. Every batch is scored before it is learned from. Small batches hardly
load a card, so `--jobs` trainings, then methods, may run at once; where the daemon of NVIDIA's MPS runs,
kernels of several overlap. What is there is not made again: a model, a method of a repeat. `--small` is a
form of minutes for continuous integration.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from tqdm import tqdm

from agents.files import write_file
from moe.device.torch_device import one_thread_on_cpu, pick_device
from moe.errors import one_line_errors
from moe.model.config import Size
from studies.repeats import StudyError, ensure_repeat, repeat_path
from studies.tasks import is_done
from studies.ttt_frontier_config import NEVER, Frontier, load_frontier
from studies.ttt_frontier_play import ensure_trained, run_part, weigh
from studies.ttt_frontier_report import write_report
from studies.ttt_frontier_tables import costs_path, load_results


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare methods of adaptation by what they bring back and what they cost."""

    size: Size = "tiny"
    """tiny for a CPU, base for a data-centre GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    models: tuple[str, ...] = ()
    """Models of the settings; none given: all."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Repeats to run. The first one's models are weighed."""
    jobs: int = 1
    """Trainings or methods that run at once, each in a process of its own."""
    out: Path = Path("runs/ttt_frontier")
    """Folder of the tables and the figure, and per model of its costs, repeats and weights."""
    config: str = "ttt_frontier"
    """Settings: name in configs/studies, or path of a YAML file."""
    small: bool = False
    """The form of minutes that the settings describe."""
    report_only: bool = False
    """Only make the tables and the figure of the repeats that are there."""

    def __post_init__(self) -> None:
        """Refuse what runs nothing."""
        if not self.seeds:
            raise StudyError("seeds must name at least one, got none")
        if self.jobs < 1:
            raise StudyError(f"jobs must be at least 1, got {self.jobs}")


def main(arguments: Arguments) -> None:
    """Run what is missing and report what is there.

    Raises:
        StudyError: The settings do not fit the arguments or what is there, or a worker was killed.
        ValueError, ThermoeError: As a repeat raises them; those that ran beside it are kept.
    """
    study, size = load_frontier(arguments.config), arguments.size
    if size not in study.sizes:
        raise StudyError(f"{arguments.config} has no size {size!r}, only {tuple(study.sizes)}")
    study = study.made_small() if arguments.small else study
    if unknown := set(arguments.models) - set(study.models):
        raise StudyError(f"unknown models {sorted(unknown)}; known: {tuple(study.models)}")
    names = arguments.models or tuple(study.models)
    if not arguments.report_only:
        device = pick_device(arguments.device)
        one_thread_on_cpu(device)  # as in the measured service: the same arithmetic in every repeat
        for name in names:
            _ensure_costs(study, arguments.out / name, name, size, device, arguments.seeds[0])
        trainings, parts = [], []
        for seed, name in itertools.product(arguments.seeds, names):
            folder, settings = arguments.out / name, study.settings(name, size, device.type)
            missing = [
                method
                for method in (NEVER, *study.methods_of(name))
                if not is_done(repeat_path(folder, "vision", size, seed, method), settings)
            ]
            if missing:
                trainings.append(partial(ensure_trained, study, folder, name, size, device, seed))
            for method in missing:
                run = partial(run_part, study, folder, name, size, device, seed, method)
                parts.append(partial(ensure_repeat, folder, "vision", size, seed, settings, run, method))
        _run_all(trainings, "trainings", arguments.jobs, device)
        _run_all(parts, "methods", arguments.jobs, device)
    repeats, weighings = load_results(arguments.out, names, size)
    write_report(repeats, weighings, arguments.out, Console())


def _ensure_costs(
    study: Frontier, folder: Path, name: str, size: Size, device: torch.device, seed: int
) -> None:
    """Weigh a model unless its costs are there."""
    path = costs_path(folder, size)
    if is_done(path, study.weighing(name, size, device.type)):
        print(f"{path} is there")
        return
    costs = weigh(study, folder, name, size, device, seed)
    write_file(path, json.dumps(costs) + "\n")
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in costs["spent_s"].items())
    print(f"wrote {path} ({parts})", flush=True)


def _run_all(works: Sequence[Callable[[], object]], what: str, jobs: int, device: torch.device) -> None:
    """Run works one after the other, or several at once in processes.

    At an error in a process no work is begun any more, and those that run are finished.

    Raises:
        StudyError: A worker was killed.
        Exception: What a work raises.
    """
    if jobs == 1 or len(works) < 2:
        for work in tqdm(works, desc=what, delay=2.0):
            work()
        return
    executor = ProcessPoolExecutor(
        min(jobs, len(works)), get_context("spawn"), initializer=_begin_worker, initargs=(device,)
    )
    try:
        with _silent_bars():
            running = [executor.submit(work) for work in works]
        for done in tqdm(as_completed(running), total=len(running), desc=what):
            done.result()
    except KeyboardInterrupt:
        for worker in active_children():
            worker.terminate()
        raise
    except BrokenProcessPool as error:
        raise StudyError(
            "a worker was killed, as for lack of memory: give fewer --jobs; what is done is kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin_worker(device: torch.device) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    one_thread_on_cpu(device)


@contextmanager
def _silent_bars() -> Iterator[None]:
    """Let processes that begin here draw no bars over that of this one."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    with one_line_errors(interrupted="interrupted; results are kept, run the command again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
