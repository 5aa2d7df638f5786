"""Weights on disk: the shipped ones, those of `python -m moe.lm`, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moe.errors import GpuUnavailableError
from moe.lm import __main__ as command
from moe.lm import weights
from moe.lm.config import SIZES, LmConfig, Recipe
from moe.lm.quality import measures, score
from moe.lm.text import SHIPPED_FOLDER, Documents, bytes_per_token, documents
from moe.lm.weights import WeightsError, load_model, reference, training_record, weights_path

TINY = LmConfig(
    d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=4, expert_width=16, top_k=2,
    tied=True,
)  # fmt: skip
FEW = Documents(documents().tokens[::43], documents().domain[::43])


def test_the_shipped_model_is_as_good_as_its_record_says() -> None:
    path = weights_path("small")
    assert path.stat().st_size <= 8_000_000
    record, right = training_record("small"), reference("small")
    assert right.shape == (256, 1024) and right.dtype == bool
    trained = str(record.config["top_k"])
    assert right[:, 512:].mean() == pytest.approx(record.quality["by_top_k"][trained]["accuracy"], abs=1e-5)
    model = load_model("small", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    found, _ = score(model, FEW)
    assert (found == right[::43]).mean() > 0.98  # the same but for roundings of the machine that trained it
    fewer, _ = score(model, FEW, 1)
    assert fewer.mean() < found.mean()


def test_scores_are_those_of_one_position_after_another() -> None:
    model, some = load_model("small", "cpu"), Documents(documents().tokens[:1], documents().domain[:1])
    right, nats = score(model, some)
    tokens = torch.from_numpy(some.tokens.astype(np.int64))
    for position in (0, 511, 1023):
        stream, _ = model(tokens[:, : position + 1])
        log_p = F.log_softmax(stream[0, -1] @ model.embed.T, dim=-1)
        assert nats[0, position] == pytest.approx(-log_p[tokens[0, position + 1]].item(), abs=1e-3)
        assert right[0, position] == (log_p.argmax() == tokens[0, position + 1])
    n_bytes = sum(int(bytes_per_token()[token]) for token in some.tokens[0, 513:])
    bits = float(nats[0, 512:].sum()) / math.log(2)
    assert measures(right, nats, some) == {
        "accuracy": pytest.approx(right[0, 512:].mean(), abs=1e-5),
        "bits_per_byte": pytest.approx(bits / n_bytes, abs=1e-4),
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny `small` and few documents; the folder of a text."""
    monkeypatch.setitem(SIZES, "small", (TINY, Recipe(steps=3, batch=2, warmup=1)))
    for module in (command, weights):
        monkeypatch.setattr(module, "documents", lambda: FEW)
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(10):
        lines = [" ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 8)) for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def test_the_command_trains_scores_and_writes(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command.Arguments(size="small", text=(tiny,), out=out, device="cpu", compare=True)
    command.main(arguments)
    shown = capsys.readouterr().out
    assert "bits/byte" in shown and "prose" in shown and f"wrote {out / 'small.safetensors'}" in shown
    record = training_record("small", out)
    assert record.config == asdict(TINY) and record.training["steps"] == 3 and record.text["files"] == 10
    assert str(tmp_path) not in (out / "small.json").read_text()  # it may be shipped
    assert set(record.quality["by_top_k"]) == {"1", "2", "4"}  # no more than there are experts
    assert set(record.compared) == {"dense", "top_k=2"}
    dense, moe = record.compared["dense"], record.compared["top_k=2"]
    routers = TINY.n_experts * TINY.d_model
    assert dense["parameters"] == dense["active_parameters"]
    assert moe["active_parameters"] == dense["parameters"] + routers  # top_k=2 is what TINY has anyway
    model, right = load_model("small", "cpu", out), reference("small", out)
    assert np.array_equal(score(model, FEW)[0], right)
    stored = load_file(out / "small.safetensors")
    assert {str(t.dtype) for n, t in stored.items() if t.ndim > 1 and "router" not in n} == {
        "torch.bfloat16", "torch.uint8"
    }  # fmt: skip
    half = right[:, 512:].mean()
    assert half == pytest.approx(record.quality["by_top_k"]["2"]["accuracy"], abs=1e-5)


def test_an_interrupted_command_says_so_in_a_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    monkeypatch.setattr("sys.argv", ["moe.lm", "--size", "small", "--text", str(tiny), "--device", "cpu"])
    with pytest.raises(SystemExit, match="interrupted: no weights were written"):
        command.cli()


def test_base_is_never_trained_unasked_and_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path))
    assert weights_path("base").parent == tmp_path
    for use in (
        lambda: load_model("base", "cpu"),
        lambda: reference("base"),
        lambda: training_record("base"),
    ):
        with pytest.raises(WeightsError, match=r"does not exist\. Train it: `python -m moe.lm --size base`"):
            use()
    assert weights.identity("base")["weights_sha256"] is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(GpuUnavailableError, match="--size base needs an NVIDIA GPU"):
        command.main(command.Arguments(size="base", device="cpu"))
    with pytest.raises(ValueError, match="--limit-s must be above 0, got nan"):
        command.Arguments(limit_s=math.nan)


def _rewrite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Change a tensor and make the record agree, as another program might."""
    save_file(load_file(path) | {name: tensor}, path)
    _edit(path, weights_sha256=weights.file_sha256(path))


def _edit(path: Path, **values: object) -> None:
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | values))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is not the file that small.json describes"),
        (lambda p: p.with_suffix(".json").write_text("{"), "small.json is not JSON"),
        (lambda p: p.with_suffix(".json").unlink(), "small.json does not exist"),
        (
            lambda p: _rewrite(p, "reference", torch.zeros(256, 127, dtype=torch.uint8)),
            "'reference' has shape",
        ),
        (lambda p: _rewrite(p, "norm.weight", torch.full((160,), math.nan)), "'norm.weight' is not finite"),
        (lambda p: _rewrite(p, "more", torch.zeros(1)), "holds tensor 'more', which the model has not"),
        (lambda p: _edit(p, tokenizer_sha256="0" * 64), "trained with another tokenizer"),
        (lambda p: _edit(p, documents_sha256="0" * 64), "trained with another documents"),
        (lambda p: _edit(p, config=asdict(TINY)), "is of another model: .*'d_model'"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, damage, message: str) -> None:
    for suffix in ("safetensors", "json"):
        shutil.copy(SHIPPED_FOLDER / f"small.{suffix}", tmp_path)
    load_model("small", "cpu", tmp_path)
    damage(tmp_path / "small.safetensors")
    for use in (load_model, lambda size, _, folder: reference(size, folder)):
        with pytest.raises(WeightsError, match=message + r".*Remedy: install the package again"):
            use("small", "cpu", tmp_path)
