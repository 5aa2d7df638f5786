"""Training a language model: its loss, its schedule, its gradients, its optimiser."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moe.errors import DataMissingError
from moe.lm import fit
from moe.lm.config import LmConfig, Recipe
from moe.lm.model import LanguageModel, initialise
from moe.lm.muon import orthogonalise
from moe.training.fit import TrainingDiverged

SMALLEST = LmConfig(
    vocabulary=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, n_experts=8, expert_width=32,
    top_k=4, context=32,
)  # fmt: skip
RECIPE = Recipe(steps=12, batch=8, warmup=2)
CPU = torch.device("cpu")
TEXT = (np.arange(6000) * np.arange(6000) % 61).astype(np.uint16)


@pytest.mark.parametrize("config", [SMALLEST, replace(SMALLEST, tied=True), SMALLEST.dense()])
def test_the_loss_falls_and_the_seed_decides(config: LmConfig) -> None:
    model, record = fit.train(config, RECIPE, TEXT, CPU, seed=0)
    again, same = fit.train(config, RECIPE, TEXT, CPU, seed=0)
    _, other = fit.train(config, RECIPE, TEXT, CPU, seed=1)
    losses = [loss for _, loss, _ in record["losses"]]
    assert losses == [loss for _, loss, _ in same["losses"]] != [loss for _, loss, _ in other["losses"]]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert losses[-1] < losses[0] and losses[-1] < 0.9 * math.log(config.vocabulary)
    assert record["steps"] == 12 and record["tokens"] == 12 * 8 * 32
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_each_epoch_shows_every_token_once_in_other_windows() -> None:
    tokens = torch.arange(1000)
    batches = fit.windows(tokens, batch=4, length=10, generator=torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(batches) for _ in range(24)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (96, 10) and epoch.unique().numel() == 960
        assert torch.equal(epoch - epoch[:, :1], torch.arange(10).expand(96, 10))
    assert not torch.equal(*epochs)


def test_a_clock_that_runs_out_shortens_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))  # a second passes between any two looks at the clock
    monkeypatch.setattr(fit.time, "perf_counter", lambda: float(next(seconds)))
    factors = []
    step = fit.Optimiser.step

    def recorded(self: fit.Optimiser, factor: float, momentum: float) -> None:
        factors.append(factor)
        step(self, factor, momentum)

    monkeypatch.setattr(fit.Optimiser, "step", recorded)
    _, record = fit.train(SMALLEST, replace(RECIPE, steps=1000), TEXT, CPU, limit_s=20.0)
    assert record["steps"] == len(factors) < 20
    assert factors[0] == 0.5 and factors[1:3] == [1.0, 1.0]
    assert all(np.diff(factors[len(factors) // 2 :]) < 0) and factors[-1] < 0.15


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    with pytest.raises(TrainingDiverged, match="at step 5: lower the learning rates"):
        fit.train(SMALLEST, replace(RECIPE, adam_lr=math.inf), TEXT, CPU)


def test_too_little_text_is_refused_by_name() -> None:
    with pytest.raises(DataMissingError, match=r"296 tokens of text, a batch needs at least 297; .*--text"):
        fit.train(SMALLEST, RECIPE, TEXT[:296], CPU)
    fit.train(SMALLEST, replace(RECIPE, steps=2), TEXT[:297], CPU)


def test_gradients_through_weighed_experts_are_those_of_plain_products() -> None:
    with torch.no_grad():
        model = initialise(LanguageModel(SMALLEST, torch.float32), torch.Generator().manual_seed(8))
    moe = model.layers()[0].moe
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    out, decision = moe(x, 4)
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
