"""What all tests share."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # small tensors, and several workers on few cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
