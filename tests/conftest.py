"""What all tests share."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a change of the code is all that can change a result. New
# ones: pytest --hypothesis-profile=search.
settings.register_profile("repeatable", derandomize=True, print_blob=True)
settings.load_profile("repeatable")
settings.register_profile("search", print_blob=True)

# MKL may round by where in memory an array lies. Here equal inputs give equal bits, so that a difference is
# ours. It reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

os.environ["SDL_VIDEODRIVER"] = "dummy"  # windows without a screen

torch.set_num_threads(1)  # small tensors, and several workers on few cores


@pytest.fixture(scope="session")
def compiled_gates() -> None:
    """The gates that test for a change, compiled: else a property's first example is too slow."""
    from moe.service.gates import CHANGE_TEST, ConfidenceChange, InputShift, Observed, changed

    for gate in (ConfidenceChange(), InputShift()):
        gate.decide(Observed(entropy=0.1, confidence=0.9))
    changed(np.zeros(CHANGE_TEST), 0.9, 0.5, 0.02)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
