"""The token decoding study: its corpus, its training, its optimiser, and its command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.errors import DataCorruptError, GpuUnavailableError
from moe.training.fit import TrainingDiverged
from studies.tasks import StudyError
from studies.token_decode import __main__ as command
from studies.token_decode import metering, train
from moe.lm.__main__ import Arguments, main
from moe.lm.config import SIZES, Recipe
from moe.lm.corpus import END_ID, build_corpus, bytes_per_token
from moe.lm.model import LanguageModel, initialise
from moe.lm.muon import orthogonalise
from moe.lm.quality import HeldOut, evaluate
from moe.lm.routing import RoutingKnobs
from tests.studies.plain_decoder import TINY

WORDS = "def return import value tensor expert router token batch energy for while if else class self".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 small Python files, one of them twice, and some that are no text."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(60):
        lines = [" ".join(rng.choice(WORDS, 8)) + f" {number}" for _ in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    (folder / "same.py").write_bytes((folder / "file_7.py").read_bytes())
    (folder / "binary.py").write_bytes(bytes(range(256)) * 4)
    (folder / "table.txt").write_text("0.125 3.5 17\n" * 100, encoding="utf-8")
    (folder / "minified.c").write_text("a=b;" * 500, encoding="utf-8")
    (folder / "short.md").write_text("short", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder, [text], SIZES["smoke"])
    return folder


def test_the_corpus_holds_each_text_once_in_one_split_and_reads_back(text: Path, corpus: Path) -> None:
    from tokenizers import Tokenizer

    record = json.loads((corpus / "corpus.json").read_text())
    assert record["files"]["train"] + record["files"]["held_out"] == 60 and record["files"]["duplicates"] == 1
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    written = {path.read_text() for path in text.glob("file_*.py")}
    read: list[str] = []
    for split in ("train", "held_out"):
        ids = np.load(corpus / f"{split}.npy")
        parts = np.split(ids, np.flatnonzero(ids == END_ID) + 1)[:-1]
        texts = [tokenizer.decode(part[:-1].tolist()) for part in parts]
        assert len(texts) == record["files"][split] and len(ids) == record["tokens"][split]
        assert bytes_per_token(corpus)[ids].sum() == sum(len(t.encode()) for t in texts)
        read += texts
    assert len(read) == 60 and set(read) == written
    again = build_corpus(corpus, [text / "gone"], SIZES["smoke"])  # what is there is not built again
    assert again == record


def test_too_little_text_and_no_folder_are_refused_by_name(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # files are split by their paths
    few = Path("few")
    few.mkdir()
    with pytest.raises(StudyError, match="no text to train on"):
        build_corpus(Path("a"), [few], SIZES["smoke"])
    for number in (1, 2, 3):
        (few / f"{number}.py").write_bytes((text / f"file_{number}.py").read_bytes()[:300])
    with pytest.raises(StudyError, match=r"tokens of text in the split 'train', at least 297 .*--text"):
        build_corpus(Path("b"), [few], SIZES["smoke"])
    with pytest.raises(StudyError, match="gone is no folder"):
        build_corpus(Path("c"), [Path("gone")], SIZES["smoke"])
    assert not Path("b/corpus.json").exists()


def test_the_loss_falls_and_the_seed_decides(corpus: Path) -> None:
    recipe = Recipe(steps=12, batch=8, context=32, warmup=2)
    cpu = torch.device("cpu")
    model, record = train.train(TINY, recipe, corpus, cpu, seed=0)
    again, same = train.train(TINY, recipe, corpus, cpu, seed=0)
    _, other = train.train(TINY, recipe, corpus, cpu, seed=1)
    losses = [loss for _, loss, _ in record["losses"]]
    assert losses == [loss for _, loss, _ in same["losses"]] != [loss for _, loss, _ in other["losses"]]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert losses[-1] < losses[0] < math.log(TINY.vocabulary) + 0.1 and losses[-1] < 5.0
    text = HeldOut(corpus, 8, 32, cpu)
    measures, shares = evaluate(model, text, None)
    everywhere, _ = evaluate(model, text, RoutingKnobs(TINY.top_k, decode_from=16))
    assert measures["accuracy"] == pytest.approx(shares.mean().item(), abs=1e-5)
    assert everywhere["nats_per_token"] == pytest.approx(measures["nats_per_token"], abs=1e-3)


def test_a_loss_that_is_not_finite_ends_the_training(corpus: Path) -> None:
    with pytest.raises(TrainingDiverged, match="at step 5: lower the learning rates"):
        train.train(
            TINY, Recipe(steps=5, batch=8, context=32, adam_lr=math.inf), corpus, torch.device("cpu"), 0
        )


def test_gradients_through_weighed_experts_are_those_of_plain_products() -> None:
    with torch.no_grad():
        model = LanguageModel(TINY, torch.float32)
        initialise(model, torch.Generator().manual_seed(8))
    moe = model.layers()[0].moe
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    out, decision = moe(x, None)
    assert decision is not None and moe.router is not None
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(10))
    inputs = [x, moe.gate_up, moe.down, moe.router]
    found = torch.autograd.grad((out * probe).sum(), inputs)
    plain = torch.zeros_like(out)
    weights = (x[0] @ moe.router.T).topk(4).values.sigmoid()
    for token in range(6):
        for slot, e in enumerate(decision.experts[token].tolist()):
            gate, up = (x[0, token] @ moe.gate_up[e]).chunk(2)
            share = weights[token, slot] / weights[token].sum()
            plain = plain + F.pad(share * ((F.silu(gate) * up) @ moe.down[e])[None], (0, 0, token, 5 - token))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, torch.autograd.grad((plain * probe).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_orthogonalised_matrices_have_singular_values_about_one() -> None:
    g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(11)).bfloat16()
    for x in (g, g.mT.contiguous()):
        values = torch.linalg.svdvals(orthogonalise(x).float())
        assert 0.6 < values.min() and values.max() < 1.3


def test_the_smoke_size_makes_all_parts_and_continues(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WARM_S", "TIMED_S"):  # times need not be exact here
        monkeypatch.setattr(metering, name, 1e-3)
    out = tmp_path / "out"
    main(Arguments(text=(text,), out=out, parts=("corpus", "train")))
    with pytest.raises(StudyError, match="another seed"):
        main(Arguments(text=(text,), out=out, seed=1))
    weights = (out / "dense.safetensors").read_bytes()
    main(Arguments(text=(text,), out=out))
    assert (out / "dense.safetensors").read_bytes() == weights
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["sigmoid", "softmax", "sigmoid-top2", "dense"]
    rows = results["models"]["sigmoid"]["quality"]
    whole = [r for r in rows if r["kind"] == "everywhere" and r["top_k"] == 4 and r["renormalise"] == 1]
    assert whole[0]["minus_standard"] == 0.0
    for row in rows:
        if row["kind"] == "budget":
            assert row["top_k"] <= row["experts_read"] <= row["budget"]
    cost = results["cost"]
    assert {row["running"] for row in cost["decode"]} == {1, 8} and "mj_per_token" not in cost["decode"][0]
    assert all(row["step_ms"] > 0 and row["experts_read"] <= row["budget"] for row in cost["decode"])
    assert (out / "cost.png").stat().st_size > 5_000 < (out / "front.png").stat().st_size
    before = (out / "results.json").read_bytes()
    main(Arguments(text=(text,), out=out, parts=("corpus", "train", "quality", "cost")))  # nothing is missing
    assert (out / "results.json").read_bytes() == before


def test_parts_name_what_they_need(tmp_path: Path) -> None:
    for parts, missing in ((("train",), "corpus"), (("quality",), "train"), (("cost",), "train")):
        with pytest.raises(StudyError, match=f"lacks what the part '{missing}' makes"):
            main(Arguments(out=tmp_path, parts=parts))  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="is missing: measure first"):
        main(Arguments(out=tmp_path, parts=("figures",)))
    for content in ("{", '{"settings": 1}', '{"settings": 1, "models": {}}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(DataCorruptError, match=r"results\.json .*delete it and run again"):
            main(Arguments(out=tmp_path, parts=("figures",)))


def test_sizes_for_a_card_are_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GpuUnavailableError, match="--size base needs an NVIDIA GPU"):
        main(Arguments(size="base", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_committed_results_draw_the_committed_figures(tmp_path: Path) -> None:
    folder = Path(command.__file__).parents[2] / "docs" / "results" / "token_decode" / "base"
    results = command.read_results(folder / "results.json")
    names = {path.name for path in command.write_figures(results, tmp_path)}
    assert names == {path.name for path in folder.glob("*.png")}
