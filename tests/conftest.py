"""What all tests share."""

from __future__ import annotations

import os

# One thread for torch's small tensors, here and in processes that tests start: there are several workers on
# few cores. Threads that wait do not spin. Read when the libraries are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a change of the code is all that can change a result. New
# ones: pytest --hypothesis-profile=search. No example has a deadline: the first may compile for seconds.
settings.register_profile("repeatable", derandomize=True, print_blob=True, deadline=None)
settings.load_profile("repeatable")
settings.register_profile("search", print_blob=True, deadline=None)

# MKL may round by where in memory an array lies. Here equal inputs give equal bits, so that a difference is
# ours. It reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

os.environ["SDL_VIDEODRIVER"] = "dummy"  # windows without a screen

ONE_THREAD = {"NUMBA_NUM_THREADS": "1"}
"""What to add to the environment of a process whose episodes are short: threads would wait for each other."""

numba.get_num_threads()  # starts its threads, which sets torch's OpenMP, the same, to as many
torch.set_num_threads(1)


LONG = (
    "test_every_method.py", "test_frozen.py", "test_generate_live.py", "test_fuzz.py", "test_kill_resume.py",
    "test_compiled.py", "test_expert_parallel.py", "test_wheel.py", "test_parallel.py", "test_calibrate.py",
    "test_generate_adaptation.py", "test_ttt.py", "test_ttt_frontier.py", "test_training.py",
    "test_processes.py", "test_run.py", "test_routing.py", "test_fit.py",
)  # fmt: skip
"""Files that take longest: begun first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skip the tests marked gpu where there is no GPU."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@contextmanager
def no_host_wait() -> Iterator[None]:
    """Make each wait of the host for a CUDA device an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notice, once a process, that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
