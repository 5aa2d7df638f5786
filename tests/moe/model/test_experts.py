"""Experts and dispatch against a plain loop over tokens and choices."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.model.dispatch import make_dispatch
from moe.model.experts import Experts
from moe.model.router import Routing
from tests.conftest import no_host_wait


def make_experts(
    d_model: int, widths: tuple[int, ...], generator: torch.Generator, kinds: tuple[Any, ...] = ()
) -> Experts:
    experts = Experts(d_model, widths, kinds or ("zero",) * widths.count(0))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return experts


def make_routing(experts: Tensor, n_experts: int, generator: torch.Generator) -> Routing:
    weights = torch.rand(experts.shape, generator=generator)
    weights = torch.where(experts < n_experts, weights, 0)
    return Routing(torch.zeros(len(experts), n_experts), weights / weights.sum(-1, keepdim=True), experts)


def random_choice(n_tokens: int, top_k: int, allowed: list[int], generator: torch.Generator) -> Tensor:
    ranks = torch.rand(n_tokens, len(allowed), generator=generator).argsort(dim=-1)[:, :top_k]
    return torch.tensor(allowed)[ranks]  # [T, K]


def loop_reference(experts: Experts, x: Tensor, routing: Routing, kinds: tuple[str, ...] = ()) -> Tensor:
    """Each token, each choice: one SwiGLU network with all the hidden units of its expert, or its kind."""
    outputs = []
    kind_of_expert = dict(enumerate(kinds, start=experts.n_experts - len(kinds)))
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for weight, expert in zip(routing.weights[token], routing.experts[token].tolist(), strict=True):
            parts: list[Any] = [part for part in experts.slices if expert < part.n_experts]
            if not parts:
                kind = kind_of_expert.get(expert)  # none in a null slot
                if kind == "copy":
                    total = total + weight * x[token]
                elif kind == "constant":
                    mixed: Any = experts.free.constants[str(expert)]
                    shares = torch.exp(mixed.shares @ x[token])
                    shares = shares / shares.sum()
                    total = total + weight * (shares[0] * x[token] + shares[1] * mixed.vector)
                continue
            gate = torch.cat([part.gate_up[expert].chunk(2, dim=-1)[0] for part in parts], dim=-1)  # [D, F]
            up = torch.cat([part.gate_up[expert].chunk(2, dim=-1)[1] for part in parts], dim=-1)  # [D, F]
            down = torch.cat([part.down[expert] for part in parts], dim=0)  # [F, D]
            total = total + weight * ((F.silu(x[token] @ gate) * (x[token] @ up)) @ down)
        outputs.append(total)
    return torch.stack(outputs)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    seed = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return list(torch.autograd.grad(output, inputs, seed.to(output.dtype)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[str, ...], int, list[int], int, int, int, bool]:
    widths = tuple(
        sorted(draw(st.lists(st.sampled_from([0, 8, 16, 24]), min_size=2, max_size=6)), reverse=True)
    )
    widths = (max(8, widths[0]), *widths[1:])
    allowed = sorted(draw(st.sets(st.integers(0, len(widths) - 1), min_size=1)))  # the others stay empty
    top_k = draw(st.integers(1, len(allowed)))
    kinds = tuple(draw(st.sampled_from(["zero", "copy", "constant"])) for _ in range(widths.count(0)))
    return (
        widths,
        kinds,
        top_k,
        allowed,
        draw(st.integers(1, 9)),
        draw(st.sampled_from([8, 16])),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
    )


@settings(max_examples=60)
@given(cases())
def test_grouped_experts_equal_the_loop_in_value_and_gradient(case):
    widths, kinds, top_k, allowed, n_tokens, d_model, seed, null_slots = case
    generator = torch.Generator().manual_seed(seed)
    experts = make_experts(d_model, widths, generator, kinds)
    x = torch.randn(n_tokens, d_model, generator=generator).requires_grad_()
    choice = random_choice(n_tokens, top_k, allowed, generator)
    if null_slots:
        choice = torch.cat([choice, torch.full((n_tokens, 2), len(widths))], dim=-1)
    routing = make_routing(choice, len(widths), generator)
    routing.weights.requires_grad_()

    output = experts(x, routing)
    expected = loop_reference(experts, x, routing, kinds)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    if expected.requires_grad:
        inputs = [x, routing.weights, *experts.parameters()]
        seed_gradient = torch.linspace(-1, 1, output.numel()).view_as(output)
        found = torch.autograd.grad(output, inputs, seed_gradient)
        wanted = torch.autograd.grad(expected, inputs, seed_gradient, allow_unused=True)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                got, torch.zeros_like(got) if want is None else want, rtol=1e-3, atol=1e-4
            )


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 999))
def test_dispatch_is_a_permutation_that_groups_rows_by_expert(n_tokens, top_k, seed):
    choice = random_choice(n_tokens, top_k, list(range(8)), torch.Generator().manual_seed(seed))
    dispatch = make_dispatch(choice, 8)
    n_rows = n_tokens * top_k
    assert dispatch.spare_row == n_rows
    assert sorted(dispatch.pair_of_row.tolist()) == list(range(n_rows))
    start = 0
    for expert, end in enumerate(dispatch.expert_ends.tolist()):
        for row in range(start, end):
            pair = int(dispatch.pair_of_row[row])
            assert int(choice.flatten()[pair]) == expert
            assert int(dispatch.token_of_row[row]) == pair // top_k
            assert int(dispatch.row_of_pair.flatten()[pair]) == row
        start = end
    assert start == n_rows


def test_uninitialised_rows_never_reach_a_result(monkeypatch):
    """Whatever grouped_mm leaves behind the last group, here NaN, stays out of values and gradients."""
    real = F.grouped_mm

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, ends):
            ctx.save_for_backward(a, b, ends)
            return poison(real(a, b, offs=ends), ends)

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            a, b, ends = ctx.saved_tensors
            with torch.enable_grad():
                a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
                grad_a, grad_b = torch.autograd.grad(real(a, b, offs=ends), [a, b], grad.contiguous())
            return poison(grad_a, ends), grad_b, None

    def poison(rows, ends):
        unused = torch.arange(len(rows)) >= ends[-1]
        return torch.where(unused[:, None], torch.nan, rows)

    generator = torch.Generator().manual_seed(0)
    experts = make_experts(16, (24, 16, 8, 0), generator)
    x = torch.randn(20, 16, generator=generator).requires_grad_()
    routing = make_routing(random_choice(20, 2, [0, 1, 2, 3], generator), 4, generator)
    routing.weights.requires_grad_()
    inputs = [x, routing.weights, *experts.parameters()]
    clean = experts(x, routing)
    clean_gradients = gradients(clean, inputs)
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: Poisoned.apply(a, b, offs))
    poisoned = experts(x, routing)
    torch.testing.assert_close(poisoned, clean)
    for got, want in zip(gradients(poisoned, inputs), clean_gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_cuda_agrees_with_cpu(top_k):
    """Triton and CUDA grouped_mm in bfloat16 against float32 on the CPU, with one expert left empty."""
    generator = torch.Generator().manual_seed(0)
    experts = make_experts(64, (160,) * 5 + (96,) * 4, generator)
    x = torch.randn(333, 64, generator=generator).requires_grad_()
    routing = make_routing(random_choice(333, top_k, [0, 1, 2, 3, 5, 6, 7, 8], generator), 9, generator)
    routing.weights.requires_grad_()
    expected = experts(x, routing)
    wanted = gradients(expected, [x, routing.weights, *experts.parameters()])

    on_gpu = Experts(64, (160,) * 5 + (96,) * 4).cuda()
    on_gpu.load_state_dict(experts.state_dict())
    x_gpu = x.detach().cuda().bfloat16().requires_grad_()
    weights = routing.weights.detach().cuda().requires_grad_()
    output = on_gpu(x_gpu, Routing(routing.router_logits.cuda(), weights, routing.experts.cuda()))
    found = gradients(output, [x_gpu, weights, *on_gpu.parameters()])
    for got, want in zip([output, *found], [expected, *wanted], strict=True):
        error = (got.float().cpu() - want).norm() / want.norm()
        assert error < 0.02, f"relative error {error}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_cuda_never_waits_for_the_device():
    generator = torch.Generator().manual_seed(0)
    experts = make_experts(64, (160,) * 4 + (96,) * 4, generator).cuda().bfloat16()
    choice = random_choice(100, 4, list(range(8)), generator)
    routing = make_routing(choice, 8, generator)
    routing = Routing(routing.router_logits.cuda(), routing.weights.cuda(), routing.experts.cuda())
    x = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
    experts(x, routing)
    with no_host_wait():
        experts(x, routing)
