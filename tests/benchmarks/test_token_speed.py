"""The benchmark of tokens: its floor by hand, the class it compares with, and a short run of everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import token_speed, token_speed_hf
from benchmarks.token_speed import (
    OUTPUT,
    PROMPT,
    Options,
    floor_s,
    main,
    mean_context,
    random_engine,
    step_bytes,
    verdicts,
)
from benchmarks.token_speed_hf import Form, HfDecoder, HfPlan, make_hf, measure_hf
from moe.lm.config import SIZES, LmConfig
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens

CPU = torch.device("cpu")


def test_bytes_of_a_step_by_hand() -> None:
    """TINY is 2 layers of width 64; 4 query and 2 key heads of 16; 8 experts of 32; 512 tokens, untied."""
    found = step_bytes(make_model(TINY), running=3, context=10, experts_read=5.5)
    experts = 2 * 5.5 * (64 * 64 + 32 * 64)
    per_layer = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 8 * 64 + 2 * 64
    other = 2 * per_layer + 64 + 512 * 64 + 3 * 64
    cached = 3 * 11 * 2 * 2 * 2 * 16
    assert found == {"experts": 4 * experts, "other_weights": 4 * other, "keys_and_values": 4 * cached}


def test_the_floor_by_hand() -> None:
    assert floor_s(2_000_000_000, 4e12, 8) == pytest.approx(500e-6 + 192e-6)


def test_mean_context_of_answers_that_begin_anew() -> None:
    assert mean_context(0.0, 11.0) == PROMPT + 5
    assert mean_context(OUTPUT - 2.0, OUTPUT + 1.0) == PROMPT + round((898 + 899 + 0) / 3)
    assert mean_context(7.2, 7.4) == PROMPT + 7  # less than a token


def test_verdicts() -> None:
    found = verdicts(
        [{"running": 8, "over_floor": 9.0}, {"running": 32, "over_floor": 2.5}],
        [{"running": 1, "share": 0.95}],
        [
            {"form": "eager", "experts": "eager", "running": 32, "over_engine": 5.5},
            {"form": "compiled", "experts": "grouped_mm", "running": 32, "over_engine": 0.9},
            {"form": "compiled", "experts": "batched_mm", "running": 32, "over_engine": None},
        ],
    )
    assert [(row["found"], row["met"]) for row in found] == [
        (2.5, False), (0.95, True), (5.5, True), (0.9, False), (None, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config", [TINY, SIZES["small"][0], replace(TINY, head_dim=32)], ids=["untied", "tied", "wide heads"]
)
def test_the_class_has_the_shape_of_the_model(config: LmConfig) -> None:
    hf = make_hf(config, CPU, torch.float32, seed=0)
    gains = 2 * config.n_layers * config.head_dim  # of queries and keys, which the product's model has not
    ours = sum(p.numel() for p in make_model(config).parameters())
    assert sum(p.numel() for p in hf.parameters()) == ours + gains


@torch.no_grad()
def test_decoded_with_the_cache_the_class_says_what_it_says_of_the_whole_text() -> None:
    hf, tokens = make_hf(TINY, CPU, torch.float32, seed=0), make_tokens(3, 12).long()
    decoder = HfDecoder(hf, tokens, first=5)
    decoded = torch.cat([decoder.step(hf).logits for _ in range(7)], dim=1)
    torch.testing.assert_close(decoded, hf(tokens).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_form_that_does_not_compile_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(token_speed_hf.torch, "compile", refuse)
    forms = (Form("grouped_mm", compiled=True), Form("eager"))
    tokens = make_tokens(2, 10).long()
    failed, eager = measure_hf(TINY, tokens, torch.float32, 0, forms, HfPlan(warm_ups=1, rounds=2, steps=2))
    assert failed["failed"] == "RuntimeError: no compiler here" and "ms" not in failed
    assert eager["range_ms"][0] <= eager["ms"] <= eager["range_ms"][1]
    assert TINY.top_k <= eager["experts_read"] <= 2 * TINY.top_k


def test_random_routers_decide() -> None:
    engine, _ = random_engine("small", CPU, seed=3)
    model = engine.model
    tokens = engine.documents[:4, :64].long()
    with torch.no_grad():
        _, decisions = model(tokens)
    for decision in decisions:
        gates = decision.logits.sigmoid()
        assert (gates.max(dim=-1).values - gates.min(dim=-1).values).mean() > 0.9
        assert len(decision.experts.unique()) > model.config.n_experts // 2


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "speed.json"
    main(Options(device="cpu", rounds=1, compiled=False, out=out))
    found = json.loads(out.read_text())
    config = SIZES["small"][0]
    assert found["run"]["seed"] == 0 and found["run"]["date"] and found["run"]["machine"]
    assert found["model"]["weights"] == "trained"  # `small` is shipped
    assert found["run"]["copy_bytes_per_s"] is None  # a CPU has no floor: nothing is put in its place
    assert [row["floor_ms"] for row in found["engine"]] == [None, None]
    alone, eight = found["engine"]
    assert alone["experts_read"] == config.top_k
    assert config.top_k < eight["experts_read"] <= config.n_experts
    assert eight["tokens_per_s"] == pytest.approx(8 / (eight["ms"] / 1e3))
    for row in found["service"]:
        (counts,) = row["counts"]
        assert counts["prompts"] == row["running"] and counts["answered"] == 0
        # The last row of a prompt is also the first of its answer.
        rows = counts["prompts"] * (PROMPT - 1) + counts["output_tokens"]
        assert counts["expert_tokens"] == [config.top_k * rows] * config.n_layers
        assert row["share"] == pytest.approx(row["tokens_per_s"] / row["engine_tokens_per_s"])
        assert PROMPT <= row["context"] < PROMPT + OUTPUT
    assert [(row["form"], row["experts"]) for row in found["hf"]] == [
        ("eager", "eager"), ("eager", "grouped_mm"), ("eager", "batched_mm")
    ]  # fmt: skip
    assert len({row["experts_read"] for row in found["hf"]}) == 1  # same weights, same text
    assert [row["over_engine"] for row in found["hf"]] == [row["ms"] / eight["ms"] for row in found["hf"]]
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Engine, steps", "Service at full load", "Hugging Face class"))


def test_a_run_that_is_cut_keeps_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_speed, "measure_service", cut)
    out = tmp_path / "speed.json"
    with pytest.raises(KeyboardInterrupt):
        main(Options(device="cpu", rounds=1, out=out))
    assert set(json.loads(out.read_text())) == {"run", "model", "engine"}


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="--rounds must be 1 or more, got 0"):
        Options(rounds=0)
