"""Two processes that share the experts, against one process that has all of them."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moe.model.distributed import (
    DistributedExperts,
    OutOfStepError,
    _Link,
    distribute,
    follow,
    leading,
    tokens_per_device,
)
from moe.model.experts import Experts
from moe.model.router import Routing, route
from moe.model.usage import tokens_per_expert
from moe.placement import Placement, PlacementError
from moe.training.weights import load_model
from tests.moe.ranks import N_RANKS, on_ranks

D_MODEL = 16
SEEDS = range(12)


def total(of_ranks: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(of_ranks)).sum(dim=0)


def close(found: Tensor, want: Tensor | None, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol)


class Case:
    """A layer with its tokens, drawn from a seed: widths with ties and zeros, empty experts, null choices."""

    def __init__(self, seed: int) -> None:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.top_k = seed % 8 + 1
        n_experts = draw.randint(max(2, self.top_k), 10)
        widths = sorted((draw.choice([0, 8, 16, 24]) for _ in range(n_experts)), reverse=True)
        self.widths = (max(8, widths[0]), *widths[1:])
        everything_on_one = seed % 4 == 0
        self.placement = Placement(
            tuple(1 if everything_on_one else draw.randrange(2) for _ in range(n_experts)), N_RANKS
        )
        self.n_tokens = [draw.randint(1, 9), draw.choice([0, draw.randint(1, 9)])]
        if seed % 3 == 1:
            self.n_tokens.reverse()
        self.experts = Experts(D_MODEL, self.widths)
        for parameter in self.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        self.router = torch.randn(n_experts, D_MODEL, generator=generator)
        total = sum(self.n_tokens)
        self.x = torch.randn(total, D_MODEL, generator=generator)
        self.null = torch.rand(total, self.top_k, generator=generator) < 0.2
        self.direction = torch.randn(total, D_MODEL, generator=generator)

    def rows(self, rank: int) -> slice:
        start = sum(self.n_tokens[:rank])
        return slice(start, start + self.n_tokens[rank])

    def choice(self) -> Tensor:
        """Chosen experts, [T, K], -1 where null."""
        return route(self.x @ self.router.T, self.top_k).experts.masked_fill(self.null, -1)

    def run(self, experts: Any, rows: slice, null_id: int) -> dict[str, Any]:
        """Forward and backward of some tokens; null choices get ``null_id`` and no weight."""
        x, router = self.x[rows].requires_grad_(), self.router.clone().requires_grad_()
        chosen = route(x @ router.T, self.top_k)
        null = self.null[rows]
        routing = Routing(
            chosen.router_logits,
            torch.where(null, 0.0, chosen.weights),
            torch.where(null, null_id, chosen.experts),
        )
        output = experts(x, routing)
        (output * self.direction[rows]).sum().backward()
        return {
            "output": output.detach(),
            "x": x.grad,
            "router": router.grad,
            "counts": tokens_per_expert(Routing(chosen.router_logits, chosen.weights, routing.experts)),
            "experts": {name: p.grad for name, p in experts.named_parameters() if "slices" in name},
        }


def play_cases(rank: int) -> list[dict[str, Any]]:
    results = []
    for seed in SEEDS:
        case = Case(seed)
        experts = DistributedExperts(case.experts, case.placement, 0, _Link(None))
        results.append(case.run(experts, case.rows(rank), null_id=len(case.widths)))
    return results


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(play_cases, tmp_path_factory.mktemp("ranks"))


def test_cases_reach_the_corners() -> None:
    cases = [Case(seed) for seed in SEEDS]
    assert {case.top_k for case in cases} >= {1, 2, 3, 4, 5, 6, 7, 8}
    assert {case.n_tokens.index(0) for case in cases if 0 in case.n_tokens} == {0, 1}
    assert any(0 in case.widths for case in cases)
    assert any(len(set(case.widths) - {0}) == 3 for case in cases)
    assert any(not case.placement.experts_on(0) for case in cases)
    unused = [set(range(len(c.widths))) - set(c.choice().flatten().tolist()) for c in cases]
    assert any(c.widths[e] > 0 for c, experts in zip(cases, unused, strict=True) for e in experts)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_ranks_equal_one_in_value_and_gradient(played: list[Any], seed: int) -> None:
    case = Case(seed)
    want = case.run(case.experts, slice(None), null_id=0)  # weight 0 makes any expert a null one
    found = [results[seed] for results in played]
    close(torch.cat([f["output"] for f in found]), want["output"])
    close(torch.cat([f["x"] for f in found]), want["x"])
    close(total(f["router"] for f in found), want["router"])
    counts = total(f["counts"] for f in found)
    assert counts.tolist() == [int((case.choice() == e).sum()) for e in range(len(case.widths))]
    for rank in range(N_RANKS):
        got = list(found[rank]["experts"].items())
        for whole in want["experts"].values():
            own = [e for e in case.placement.experts_on(rank) if e < len(whole)]
            if own:
                close(got.pop(0)[1], whole[own])
        assert not got


def images(n: int) -> Tensor:
    return torch.randint(256, (n, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def texts(n: int) -> Tensor:
    return torch.randint(256, (n, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


PLACEMENT = Placement((0, 1, 1, 0, 1, 1, 1, 1), N_RANKS)
COST = PLACEMENT.thermal_cost([160.0] * 4 + [96.0] * 4, [0.2, 0.9])
PARTS = ([5, 3], [0, 6])
"""Images of each rank, per call."""


def answer_on_both(rank: int) -> dict[str, Any]:
    model = load_model("vision", "tiny", "cpu").requires_grad_()
    distribute(model, PLACEMENT)
    found: dict[str, Any] = {"logits": [], "counts": [], "devices": []}
    for parts in PARTS:
        output = model(images(sum(parts)).split(parts)[rank], 3, 0.5, COST)
        output.logits.square().sum().backward()
        found["logits"].append(output.logits.detach())
        found["counts"].append(output.tokens_per_expert)
        found["devices"].append(tokens_per_device(output, PLACEMENT))
    found["grads"] = {name: p.grad for name, p in model.named_parameters() if "experts" not in name}
    with pytest.raises(PlacementError, match="3 devices, the group 2 ranks"):
        distribute(model, Placement((0,) * 8, 3))
    with pytest.raises(PlacementError, match="8 experts and device_of_expert places 4"):
        distribute(model, Placement((0, 1, 0, 1), 2))
    layer = cast(Any, model.blocks)[rank].moe.experts
    if rank == 0:
        layer.agree(None)
    else:
        routing = Routing(torch.zeros(1, 8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
        with pytest.raises(OutOfStepError, match=r"in layer 1, rank 0 in layer 0; .* call follow\(\)"):
            layer(torch.zeros(1, 64), routing)
    return found


def test_the_shipped_model_on_two_ranks_equals_one(tmp_path: Path) -> None:
    found = on_ranks(answer_on_both, tmp_path)
    model = load_model("vision", "tiny", "cpu").requires_grad_()
    for call, parts in enumerate(PARTS):
        output = model(images(sum(parts)), 3, 0.5, COST)
        output.logits.square().sum().backward()
        logits = torch.cat([f["logits"][call] for f in found])
        close(logits, output.logits, atol=1e-4)
        counts = total(f["counts"][call] for f in found)
        assert torch.equal(counts, output.tokens_per_expert)
        devices = total(f["devices"][call] for f in found)
        assert torch.equal(devices[:, 0], counts[:, [0, 3]].sum(dim=1))
        assert devices.sum(dim=1).tolist() == [sum(parts) * 16 * 3] * 2
    for name, parameter in model.named_parameters():
        if "experts" not in name:
            close(total(f["grads"][name] for f in found), parameter.grad, rtol=1e-3, atol=1e-3)


CALLS = ((4, 1), (1, 8), (7, 4))
"""Texts and experts per token of each call."""


def lead_and_follow(rank: int) -> Any:
    model = distribute(load_model("language", "tiny", "cpu"), PLACEMENT)
    if rank != 0:
        with pytest.raises(ValueError, match="rank 0 leads, this is rank 1"), leading(model):
            pass
        return follow(model)
    with pytest.raises(ValueError, match="cannot follow"):
        follow(model)
    answers = []
    with leading(model), torch.no_grad():
        for n, top_k in CALLS:
            answers.append(model(texts(n), top_k).logits)
            with pytest.raises(ValueError, match="top_k"):  # an error that the caller survives
                model(texts(n), 9)
            with torch.enable_grad(), pytest.raises(OutOfStepError, match="no part in a backward"):
                model.requires_grad_(True)(texts(n), 1)
            model.requires_grad_(False)
    return answers


class LeaderFailedError(Exception):
    pass


def fail_between_layers(rank: int) -> str | int:
    model: Any = distribute(load_model("vision", "tiny", "cpu"), PLACEMENT)
    if rank != 0:
        return follow(model)

    def fail(_: Any, arguments: Any) -> None:
        raise LeaderFailedError

    model.blocks[1].attention.register_forward_pre_hook(fail)
    try:
        with leading(model), torch.no_grad():
            model(images(2))
    except LeaderFailedError:
        return "failed"
    return "answered"


def lead(rank: int) -> tuple[Any, str | int]:
    return lead_and_follow(rank), fail_between_layers(rank)


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(lead, tmp_path_factory.mktemp("led"))


def test_a_leader_s_answers_are_those_of_one_device(led: list[Any]) -> None:
    (answers, _), (computed, _) = led
    model = load_model("language", "tiny", "cpu")
    for logits, (n, top_k) in zip(answers, CALLS, strict=True):
        close(logits, model(texts(n), top_k).logits, atol=1e-4)
    assert computed == len(CALLS) * model.config.n_layers


def test_an_error_of_the_leader_ends_the_follower(led: list[Any]) -> None:
    """In the midst of a forward pass, with layer 0 computed and layer 1 awaited."""
    (_, leader), (_, computed) = led
    assert (leader, computed) == ("failed", 1)


def test_a_model_that_is_not_distributed_is_refused() -> None:
    with pytest.raises(TypeError, match="call distribute"), leading(load_model("vision", "tiny", "cpu")):
        pass


def answer_on_gpus(rank: int) -> dict[str, Tensor]:
    """Uneven parts, then none on rank 0, in the types that are served; then led."""
    model = distribute(load_model("vision", "tiny", f"cuda:{rank}"), PLACEMENT)
    found = {}
    with torch.no_grad():
        for parts in PARTS:
            own = images(sum(parts)).split(parts)[rank].cuda()
            found[str(parts)] = model(own, 3, 0.5, COST.cuda()).logits.cpu()
        if rank != 0:
            found["layers"] = torch.tensor(follow(model))
            return found
        with leading(model):
            found["led"] = model(images(4).cuda(), 2).logits.cpu()
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < N_RANKS, reason="needs two CUDA GPUs")
def test_two_gpus_equal_one(tmp_path: Path) -> None:
    """Against float32 on the CPU; bfloat16 may route a token elsewhere, so by norm and not by logit."""
    found = on_ranks(answer_on_gpus, tmp_path, "nccl")
    model = load_model("vision", "tiny", "cpu")
    for parts in PARTS:
        logits = torch.cat([f[str(parts)] for f in found])
        want = model(images(sum(parts)), 3, 0.5, COST).logits
        assert (logits - want).norm() / want.norm() < 0.05
    want = model(images(4), 2).logits
    assert (found[0]["led"] - want).norm() / want.norm() < 0.05
    assert found[1]["layers"] == model.config.n_layers
