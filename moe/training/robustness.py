"""What each corruption costs a vision model that does not adapt: ``python -m moe.training.robustness``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moe.data.corruptions import KINDS
from moe.data.pools import SamplePool
from moe.device.torch_device import pick_device, serving_dtype
from moe.errors import one_line_errors
from moe.model.config import Size
from moe.model.transformer import MoEModel
from moe.training.checkpoint import load_checkpoint
from moe.training.evaluate import evaluate_vision
from moe.training.weights import load_model


def accuracy_by_kind(model: MoEModel, severity: int) -> dict[str, float]:
    """Measure top-1 accuracy, 0 to 1, on the test images: ``"clean"``, then every kind at a severity.

    Raises:
        ValueError: The severity is unknown, or the model is for text.
    """
    if model.config.task != "vision":
        raise ValueError(f"corruptions are of images: need a vision model, got task {model.config.task!r}")
    accuracy = {}
    for kind in ("clean", *KINDS):
        shift = kind if kind == "clean" else f"{kind}@{severity}"
        pool = SamplePool("vision", (shift,), model.position.device)  # one at a time: not all in memory
        accuracy[kind] = evaluate_vision(model, pool.inputs[0], pool.targets[0], model.config.top_k)
    return accuracy


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Show the accuracy of a vision model under every corruption, without adaptation."""

    size: Size = "tiny"
    """Which of the shipped models."""
    weights: Path | None = None
    """A model that `moe.training` wrote, instead of a shipped one."""
    severity: int = 5
    """1 (mild) to 5 (severe)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""

    def model(self) -> MoEModel:
        """Return the model, ready to answer."""
        device = pick_device(self.device)
        if self.weights is None:
            return load_model("vision", self.size, device)
        model, _ = load_checkpoint(self.weights)
        return model.requires_grad_(False).eval().cast_weights(serving_dtype(device)).to(device)


def main(arguments: Arguments) -> None:
    """Run the command."""
    accuracy = accuracy_by_kind(arguments.model(), arguments.severity)
    clean = accuracy.pop("clean")
    print(f"clean accuracy {100 * clean:.1f}%; at severity {arguments.severity}:")
    print(f"{'kind':<16}{'accuracy %':>12}{'lost points':>13}")
    for kind, value in accuracy.items():
        print(f"{kind:<16}{100 * value:12.1f}{100 * (clean - value):13.1f}")
    mean = sum(accuracy.values()) / len(accuracy)
    print(f"{'mean':<16}{100 * mean:12.1f}{100 * (clean - mean):13.1f}")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
