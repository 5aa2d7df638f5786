"""The study of models that read few experts: what it measures, compares, continues and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.lm.config import LmConfig
from moe.lm.model import LanguageModel, initialise
from moe.lm.text import documents
from studies import tasks
from studies.frugal_tokens.__main__ import STANDARD, Arguments, Study, Training, main, trainings
from studies.frugal_tokens.measure import measure
from studies.frugal_tokens.report import Target, cells_table, changes_of, findings
from studies.tasks import StudyError
from thermoe_env.configs import load_settings

MODEL = LmConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, n_experts=8, expert_width=16, top_k=2,
    tied=True, context=32,
)  # fmt: skip
TARGET = Target(running=32, accuracy_lost=0.01, joules_saved=0.15)


def test_accuracy_and_reads_are_those_of_whole_sequences() -> None:
    """The engine decodes token by token; here the model sees whole documents, and experts are counted."""
    model = initialise(LanguageModel(MODEL, torch.float32), torch.Generator().manual_seed(0)).serve()
    text, first, last = documents(), 16, 32
    (cell,) = measure(model, text, [(1.0, 0.0)], {4: 8}, [20], 0.01, None)
    chosen = np.linspace(0, len(text.domain) - 1, 8).round().astype(int)
    tokens = torch.from_numpy(text.tokens[chosen, : last + 1].astype(np.int64))
    stream, decisions = model(tokens[:, :-1])
    right = model.logits(stream).argmax(dim=-1) == tokens[:, 1:]
    reads = [
        len(decision.experts.view(8, 32, 2)[group : group + 4, position].unique())
        for decision in decisions
        for group in (0, 4)
        for position in range(first, last)
    ]
    assert cell["accuracy"] == pytest.approx(right[:, first:].float().mean().item())
    assert cell["experts_read"] == pytest.approx(np.mean(reads))
    assert cell["joules_per_token"] is None and cell["step_s"] > 0


def result(variant: str, seed: int, accuracy: float, reads: float, joules: float | None) -> dict[str, Any]:
    cell = {"running": 32, "top_k": 8, "top_k_share": 1.0, "routing_bias": 0.0, "step_s": 1e-3}
    return {
        "settings": {"variant": variant, "seed": seed}, "text": {"sha256": "a"}, "machine": "a card",
        "date": "2026-01-01", "cells": [cell | {"accuracy": accuracy, "experts_read": reads,
                                                "joules_per_token": joules}],
    }  # fmt: skip


def test_changes_are_paired_by_seed() -> None:
    """Seeds differ far more than the variants do; each seed's own ratio is the same."""
    results = [
        result(v, s, 0.5 * f, 40.0 * s * f, s * f)
        for s in (1, 2, 4)
        for v, f in ((STANDARD, 1.0), ("x", 0.8))
    ]
    changes = changes_of(cells_table(results), "standard, top_k 8, bias 0", "joules_per_token")
    assert changes[32, "x, top_k 8, bias 0"] == pytest.approx((-0.2, -0.2, -0.2))
    one = changes_of(cells_table(results[:2]), "standard, top_k 8, bias 0", "accuracy")[
        32, "x, top_k 8, bias 0"
    ]
    assert one.mean == pytest.approx(-0.2) and np.isnan(one.low)


@pytest.mark.parametrize(
    ("accuracy", "joules", "verdict"),
    [(0.497, 0.8, "met by x"), (0.49, 0.8, "not met"), (0.5, 0.9, "not met")],
)
def test_the_target_needs_both_accuracy_and_joules(accuracy: float, joules: float, verdict: str) -> None:
    results = {}
    for seed in (1, 2, 3):
        results[f"s{seed}"] = result(STANDARD, seed, 0.5, 60.0, 1.0 + 0.01 * seed)
        results[f"x{seed}"] = result("x", seed, accuracy, 40.0, joules)
    (sentence,) = findings(results, STANDARD, TARGET).answer
    assert verdict in sentence and "joules" in sentence


def test_results_that_do_not_compare_are_refused_by_name() -> None:
    with pytest.raises(StudyError, match="no result of 'standard' is there"):
        findings({"x": result("x", 0, 0.5, 40.0, 1.0)}, STANDARD, TARGET)
    other = result("x", 0, 0.5, 40.0, 1.0) | {"text": {"sha256": "b"}}
    with pytest.raises(StudyError, match="trained on different texts"):
        findings({"s": result(STANDARD, 0, 0.5, 60.0, 1.0), "x": other}, STANDARD, TARGET)
    with pytest.raises(StudyError, match=r"--only heavier: unknown variants; known: standard .* fewer"):
        trainings(load_settings(Study, "studies", "frugal_tokens"), Arguments(only=("heavier",)))


def test_the_small_form_runs_continues_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THERMALMOE_CACHE", str(tmp_path / "cache"))
    arguments: dict[str, Any] = {
        "size": "smoke", "device": "cpu", "out": tmp_path, "text": (Path(tasks.__file__).parent,)
    }  # fmt: skip
    ran = []
    run = Training.run
    monkeypatch.setattr(Training, "run", lambda task: (ran.append(task.name), run(task))[1])
    main(Arguments(only=(STANDARD, "light"), **arguments))
    assert ran == ["standard-seed0", "light-seed0"]
    assert "2 of" in capsys.readouterr().out
    main(Arguments(only=(STANDARD, "budget"), **arguments))
    assert ran == ["standard-seed0", "light-seed0", "budget-seed0"]
    main(Arguments(limit_s=1e-9, **arguments))  # begins none
    assert len(ran) == 3
    report = (tmp_path / "smoke" / "report.md").read_text(encoding="utf-8")
    assert "**light**" in report and "**budget**" in report and "no joules are claimed" in report
    assert (tmp_path / "smoke" / "front.png").stat().st_size > 0
