"""Train a language model on text of this machine: `python -m moe.lm --size base`."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from moe.device.torch_device import device_name, pick_device
from moe.errors import GpuUnavailableError, one_line_errors
from moe.lm.config import SIZES, LmConfig, Recipe, Size
from moe.lm.corpus import Corpus, build_corpus, default_roots
from moe.lm.fit import train
from moe.lm.model import LanguageModel, describe
from moe.lm.quality import measure_quality
from moe.lm.routing_loss import RoutingLoss
from moe.lm.text import documents, documents_sha256, tokenizer_sha256
from moe.lm.weights import LmRecord, save_model, stored_tensors, weights_path
from moe.training.checkpoint import cache_folder


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a language model, score it on the shipped documents, and write its weights."""

    size: Size = "base"
    """`base` for a data-centre GPU; `small` for CPUs, which is shipped. To train either wants a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    compare: bool = False
    """Also train, by the same recipe, the dense model of the same active width and a model of 2 experts per
    token; their quality goes to the record."""
    text: tuple[Path, ...] = ()
    """Folders whose text is learned from; none given: /opt, /usr, this Python's library and packages."""
    limit_s: float = 280.0
    """Longest training of a model: where the recipe's steps take longer, its schedule runs by the clock."""
    seed: int = 0
    """Of the weights and of the order of the text."""
    read_weight: float = 0.0
    """Weight of the experts that a decode step reads, in the loss: the model learns to need fewer."""
    read_budget: float | None = None
    """Experts of a layer that a step of 32 sequences may read, in place of a weight."""
    balance_weight: float = Recipe.balance_weight
    """Of an even load of the experts."""
    out: Path | None = None
    """Folder for weights and record; none given: where they are looked for, `small` in runs/weights."""

    def __post_init__(self) -> None:
        """Refuse a limit that trains nothing, and losses that mean nothing."""
        if not self.limit_s > 0:
            raise ValueError(f"--limit-s must be above 0, got {self.limit_s}")
        RoutingLoss(self.config, self.recipe, torch.device("cpu"))

    @property
    def config(self) -> LmConfig:
        """Shape of the model."""
        return SIZES[self.size][0]

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        asked = (self.balance_weight, self.read_weight, self.read_budget)
        names = ("balance_weight", "read_weight", "read_budget")
        return replace(SIZES[self.size][1], **dict(zip(names, asked, strict=True)))

    @property
    def path(self) -> Path:
        """Where the weights go."""
        return weights_path(self.size, self.out or (Path("runs/weights") if self.size == "small" else None))


def main(arguments: Arguments) -> None:
    """Run the command.

    Raises:
        GpuUnavailableError: `base` without a GPU.
    """
    device = pick_device(arguments.device)
    if arguments.size == "base" and device.type != "cuda":
        raise GpuUnavailableError(
            "--size base needs an NVIDIA GPU and a CUDA build of torch; small is shipped and runs on a CPU"
        )
    arguments.path.parent.mkdir(parents=True, exist_ok=True)  # before minutes are spent
    corpus = build_corpus(cache_folder(), arguments.text or default_roots())
    record = make(
        arguments.config, arguments.recipe, corpus, device, arguments.path, arguments.seed, arguments.limit_s,
        arguments.compare,
    )  # fmt: skip
    _print_card(record)
    print(f"wrote {arguments.path} and {arguments.path.with_suffix('.json').name}")


def make(
    config: LmConfig,
    recipe: Recipe,
    corpus: Corpus,
    device: torch.device,
    path: Path,
    seed: int,
    limit_s: float,
    compare: bool,
) -> LmRecord:
    """Train and score a model, and those it is compared with; write its weights and its record."""
    model, training = train(config, recipe, corpus.tokens, device, seed, limit_s)
    tensors = stored_tensors(model)
    model.load_state_dict(tensors)  # what is scored is what is stored
    quality, right = measure_quality(model, documents())
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    del model  # room for the next
    others = {"dense": config.dense(), "top_k=2": replace(config, top_k=2)} if compare else {}
    compared = {}
    for name, other in others.items():
        trained, of_training = train(other, recipe, corpus.tokens, device, seed, limit_s, f"training {name}")
        compared[name] = _summary(trained) | {"steps": of_training["steps"]}
        del trained
    record = LmRecord(
        config=asdict(config),
        recipe=asdict(recipe),
        seed=seed,
        training=training,
        text=corpus.record,
        tokenizer_sha256=tokenizer_sha256(),
        documents_sha256=documents_sha256(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=device_name(device),
        torch=torch.__version__,
        quality=quality,
        compared=compared,
    )
    save_model(tensors, right, record, path)
    return record


def _summary(model: LanguageModel) -> dict[str, Any]:
    shape = describe(model)
    sizes = {name: shape[name] for name in ("parameters", "active_parameters")}
    return sizes | measure_quality(model, documents())[0]


def _print_card(record: LmRecord) -> None:
    print(f"{'':>10} {'top_k':>6} {'accuracy':>9} {'bits/byte':>10}")
    rows = [
        (name, top_k, values)
        for name, quality in {"this model": record.quality, **record.compared}.items()
        for top_k, values in quality["by_top_k"].items()
    ]
    rows += [(name, record.config["top_k"], values) for name, values in record.quality["by_domain"].items()]
    for name, top_k, values in rows:
        print(f"{name:>10} {top_k:>6} {values['accuracy']:9.4f} {values['bits_per_byte']:10.3f}")


def cli() -> None:
    """Run the command line."""
    with one_line_errors(interrupted="interrupted: no weights were written; read text is kept"):
        main(tyro.cli(Arguments))


if __name__ == "__main__":
    cli()
