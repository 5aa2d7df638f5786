"""What all tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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

torch.set_num_threads(1)  # small tensors, and several workers on few cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU."""
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
