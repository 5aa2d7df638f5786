"""The token decoding study: its corpus, its training, its decode step against a plain one, and its command.

The tests marked gpu hold the Triton kernels against the same plain decoder.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import GpuUnavailableError
from moe.training.fit import TrainingDiverged
from studies.tasks import StudyError
from studies.token_decode import __main__ as command
from studies.token_decode import decode_ops, metering, train
from studies.token_decode.__main__ import Arguments, main
from studies.token_decode.config import SIZES, LmConfig, Recipe
from studies.token_decode.corpus import END_ID, build_corpus, bytes_per_token
from studies.token_decode.decode import DecodeEngine
from studies.token_decode.lm import EPS, LanguageModel, initialise
from studies.token_decode.muon import orthogonalise
from studies.token_decode.quality import HeldOut, evaluate
from studies.token_decode.routing import RoutingKnobs, allowed_experts, choose, experts_read

TINY = LmConfig(
    vocabulary=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8,
    expert_width=32, top_k=4,
)  # fmt: skip
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


def make_model(config: LmConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Random weights with a router that decides and a head that answers."""
    with torch.device(device):
        model = LanguageModel(config, dtype)
    initialise(model, torch.Generator(device).manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            parameter.data.mul_(30)
        if name == "head.weight":
            parameter.data.normal_(std=0.05, generator=torch.Generator(device).manual_seed(2))
    return model.serve()


def make_tokens(b: int, length: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(TINY.vocabulary, (b, length), generator=generator, dtype=torch.int32).to(device)


# The plain decoder: position by position, head by head, expert by expert.


def plain_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    normal = x / torch.sqrt((x * x).mean() + EPS)
    return normal if gain is None else normal * gain


def plain_turn(x: Tensor, position: int) -> Tensor:
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def plain_wanted(logits: Tensor, gate: str) -> list[float]:
    """How strongly each expert is wanted, summing to one."""
    wanted = [1 / (1 + math.exp(-v)) if gate == "sigmoid" else math.exp(v) for v in logits.tolist()]
    return [w / sum(wanted) for w in wanted]


def plain_top(values: list[float], n: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def plain_allowed(logits: Tensor, top_k: int, budget: int, gate: str) -> list[int]:
    """Experts in most demand among the tokens of one step, [B, E]."""
    demand = [0.0] * logits.shape[1]
    for row in logits:
        wanted = plain_wanted(row, gate)
        for expert in plain_top(row.tolist(), top_k):
            demand[expert] += wanted[expert]
    return plain_top(demand, budget)


def plain_losses(model: LanguageModel, tokens: Tensor, first: int, top_k: int, budget: int) -> Tensor:
    """Losses of all positions, [B, S]: the prompt before `first` as in training, then under knobs."""
    c = model.config
    group = c.n_heads // c.n_kv_heads
    memory: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in tokens] for _ in range(c.n_layers)]
    losses = torch.zeros(len(tokens), tokens.shape[1] - 1)
    for position in range(tokens.shape[1] - 1):
        stream = [model.embed[int(row[position])] for row in tokens]
        k, allowed_count = (c.top_k, c.n_experts) if position < first else (top_k, budget)
        for block, seen in zip(model.layers(), memory, strict=True):
            for b, x in enumerate(stream):
                qkv = block.attention.qkv.weight @ plain_norm(x, block.attention_norm.weight)
                heads = qkv.view(-1, c.head_dim)
                keys = [
                    plain_turn(plain_norm(h), position) for h in heads[c.n_heads : c.n_heads + c.n_kv_heads]
                ]
                seen[b].append((torch.stack(keys), heads[c.n_heads + c.n_kv_heads :]))
                mixed = []
                for head in range(c.n_heads):
                    query = plain_turn(plain_norm(heads[head]), position)
                    scores = torch.stack([query @ ks[head // group] for ks, _ in seen[b]]) / c.head_dim**0.5
                    shares = torch.exp(scores - scores.max())
                    shares = shares / shares.sum()
                    mixed.append(
                        sum(s * vs[head // group] for s, (_, vs) in zip(shares, seen[b], strict=True))
                    )
                stream[b] = x + block.attention.out.weight @ torch.cat(mixed)  # type: ignore[arg-type]
            normed = [plain_norm(x, block.moe_norm.weight) for x in stream]
            assert block.moe.router is not None
            logits = torch.stack([block.moe.router @ h for h in normed])
            allowed = plain_allowed(logits, k, allowed_count, c.gate)
            for b, h in enumerate(normed):
                wanted = plain_wanted(logits[b], c.gate)
                chosen = sorted(allowed, key=lambda e: (-wanted[e], e))[:k]
                total = sum(wanted[e] for e in chosen)
                for e in chosen:
                    gate, up = (h @ block.moe.gate_up[e]).chunk(2)
                    stream[b] = stream[b] + wanted[e] / total * ((F.silu(gate) * up) @ block.moe.down[e])
        for b, x in enumerate(stream):
            answers = (model.embed if model.head is None else model.head.weight) @ plain_norm(
                x, model.norm.weight
            )
            losses[b, position] = F.cross_entropy(answers, tokens[b, position + 1].long())
    return losses


def decoded_losses(engine: DecodeEngine, top_k: int, budget: int) -> Tensor:
    """Losses of the engine's positions behind the prompt, all sequences in step, [B, S - first]."""
    engine.set(top_k, budget)
    engine.prefill()
    engine.clear()
    engine.pos.fill_(engine.first)
    losses = []
    for _ in range(engine.last - engine.first):
        before = engine.nll.clone()
        engine.replay()
        losses.append(engine.nll - before)
    return torch.stack(losses, dim=1).cpu()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("top_k", "budget"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_cached_decode_gives_every_token_the_loss_of_a_plain_decoder(
    gate: str, top_k: int, budget: int
) -> None:
    model = make_model(replace(TINY, gate=gate))
    tokens = make_tokens(3, 13)
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget)
    found = decoded_losses(DecodeEngine(model, tokens, 8), top_k, budget)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("top_k", "budget"), [(4, None), (2, None), (2, 3)])
def test_the_full_pass_under_knobs_gives_every_token_the_loss_of_a_plain_decoder(
    top_k: int, budget: int | None
) -> None:
    model = make_model(TINY)
    tokens = make_tokens(3, 13)
    knobs = RoutingKnobs(top_k, budget=budget, group=3, decode_from=8, prompt_top_k=TINY.top_k)
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget or TINY.n_experts)
        x, _ = model(tokens[:, :-1].long(), knobs)
        found = F.cross_entropy(model.logits(x).movedim(-1, 1), tokens[:, 1:].long(), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_knobs_turned_between_steps_take_effect_in_the_next() -> None:
    model = make_model(TINY)
    engine = DecodeEngine(model, make_tokens(4, 25), 8)
    read = []
    for top_k, budget in ((4, 8), (1, 8), (4, 4)):
        engine.set(top_k, budget)
        before = engine.used.item()
        engine.replay()
        read.append((engine.used.item() - before) / TINY.n_layers)
    assert read[0] > 4 and read[1] <= 4 and read[2] == 4
    with pytest.raises(ValueError, match="top_k must be 1 to 4"):
        engine.set(5, 8)
    with pytest.raises(ValueError, match="budget must be 2 to 8"):
        engine.set(2, 1)


def test_a_sequence_starts_again_behind_its_prompt_and_finds_the_same() -> None:
    engine = DecodeEngine(make_model(TINY), make_tokens(3, 17), 8)
    totals = []
    for _ in range(2):
        engine.nll.zero_()
        for _ in range(8):
            engine.replay()
        totals.append(engine.nll.clone())
        assert engine.pos.tolist() == engine.start.tolist()
    torch.testing.assert_close(totals[0], totals[1])


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_experts_are_selected_by_demand_as_a_plain_ranking_does(gate: str) -> None:
    logits = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(4))  # [B, S, E]
    for top_k, budget in ((4, 6), (2, 3), (1, 2)):
        allowed = allowed_experts(logits, RoutingKnobs(top_k, budget=budget, group=3), gate)  # type: ignore[arg-type]
        for group in range(2):
            for step in range(5):
                some = logits[3 * group : 3 * group + 3, step]
                found = allowed[group, 0, step].nonzero().flatten().tolist()
                assert found == sorted(plain_allowed(some, top_k, budget, gate))


def test_a_smaller_budget_allows_a_subset() -> None:
    logits = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(5))
    sets = [allowed_experts(logits, RoutingKnobs(4, budget=n, group=4), "sigmoid") for n in range(4, 9)]
    assert all((small <= large).all() for small, large in pairwise(sets))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_weights_are_renormalised_or_keep_what_they_had_under_the_trainings_top_k(gate: str) -> None:
    config = replace(TINY, gate=gate)
    logits = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(6))
    full = choose(logits, RoutingKnobs(4), config)[1]
    kept = choose(logits, RoutingKnobs(2, renormalise=0.0), config)[1]
    root = choose(logits, RoutingKnobs(2, renormalise=0.5), config)[1]
    summed = choose(logits, RoutingKnobs(2), config)[1]
    torch.testing.assert_close(full.sum(dim=-1), torch.ones(7))
    torch.testing.assert_close(kept, full[:, :2])
    torch.testing.assert_close(summed, kept / kept.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(root, kept / kept.sum(dim=-1, keepdim=True).sqrt())


def test_experts_read_are_counted_once_per_step_of_a_group() -> None:
    experts = torch.tensor([[0, 1], [0, 2], [1, 0], [8, 2], [3, 8], [3, 4]])  # [T, K]; 8 is a null slot
    # Two sequences of three positions: the steps from position 1 on read {0, 2, 3} and {0, 1, 3, 4}.
    assert experts_read(experts, 2, 1, 2, 8).tolist() == [3.5]


def test_the_table_lists_every_chosen_pair_under_its_expert() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    counts, table = torch.zeros(8, dtype=torch.int32), torch.zeros(8, 5, dtype=torch.int32)
    top_k, budget = torch.tensor(3), torch.tensor(8)
    weights = decode_ops.select(logits, torch.zeros(8), top_k, budget, counts, table, 4, "softmax")
    for token, row in enumerate(logits):
        for slot, expert in enumerate(plain_top(row.tolist(), 3)):
            assert token * 4 + slot in table[expert, : counts[expert]].tolist()
    assert counts.sum() == 15 and (weights[:, 3] == 0).all()


# Corpus and training


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


# The command


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
    (tmp_path / "results.json").write_text('{"settings": 1}')
    with pytest.raises(StudyError, match="is no result of this study"):
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


# On a card


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("top_k", "budget"), [(4, 8), (2, 8), (1, 8), (4, 5), (2, 3)])
def test_the_captured_kernels_give_every_token_the_loss_of_a_plain_decoder(
    gate: str, top_k: int, budget: int
) -> None:
    model = make_model(replace(TINY, gate=gate), "cuda")
    tokens = make_tokens(3, 13, "cuda")
    with torch.no_grad():
        expected = plain_losses(model, tokens, 8, top_k, budget)
    found = decoded_losses(DecodeEngine(model, tokens, 8).capture(), top_k, budget)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_training_kernels_give_the_gradients_and_steps_of_torch_operators(corpus: Path) -> None:
    from studies.token_decode import train_kernels

    generator = torch.Generator("cuda").manual_seed(12)
    grad, buffer, parameter = (torch.randn(3, 70, 50, device="cuda", generator=generator) for _ in range(3))
    expected_buffer = buffer.lerp(grad, 0.1)
    ahead = train_kernels.momentum_step(grad, buffer, 0.9)
    torch.testing.assert_close(buffer, expected_buffer)
    torch.testing.assert_close(ahead, grad.lerp(expected_buffer, 0.9).bfloat16())
    expected = 0.5 * parameter - 0.2 * ahead.float()
    train_kernels.scaled_add(parameter, ahead, 0.5, -0.2)
    torch.testing.assert_close(parameter, expected)
    losses = []
    for device in ("cpu", "cuda"):
        model = LanguageModel(TINY, torch.float32)
        model = initialise(model, torch.Generator().manual_seed(13)).to(device)
        answer, total = model.loss(make_tokens(2, 17).long().to(device))
        total.backward()
        layer = model.layers()[0].moe
        assert layer.gate_up.grad is not None and layer.router is not None and layer.router.grad is not None
        losses.append((answer.item(), layer.gate_up.grad.cpu(), layer.router.grad.cpu()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    for on_cpu, on_cuda in zip(losses[0][1:], losses[1][1:], strict=True):
        torch.testing.assert_close(on_cpu, on_cuda, rtol=1e-2, atol=1e-4)
