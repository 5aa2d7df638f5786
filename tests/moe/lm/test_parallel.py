"""Two processes that share a model's experts, step by step, against one process that has them all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe.lm.engine.engine import Engine
from moe.lm.engine.parallel import DevicesLostError, ExpertGroup
from moe.placement import Placement, PlacementError
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens
from tests.moe.lm.test_engine import ALL, losses, rows
from tests.moe.ranks import N_RANKS, on_ranks

TOKENS = make_tokens(3, 61)
SETTINGS = ((4, ALL), (2, ALL), (4, 5), (2, 3))
PLACEMENTS = (
    Placement((0, 1) * 4, 2),
    Placement((0, 0, 0, 1, 0, 0, 1, 0), 2),
    Placement((1,) * 8, 2),  # all experts on the follower
)


def make_engine(device: str = "cpu", group: ExpertGroup | None = None) -> Engine:
    engine = Engine(make_model(TINY, device), TOKENS.numpy(), slots=8, max_rows=48, group=group)
    engine.capture()
    return engine


def played(engine: Engine) -> list[np.ndarray]:
    """Losses and use of the experts under several knobs."""
    found = []
    for top_k, readable in SETTINGS:
        found += [losses(engine, TOKENS, 40, 13, top_k, readable), *engine.usage()]
    return found


def on_rank(placement: Placement, device: str, rank: int) -> Any:
    engine = make_engine(f"{device}:{rank}" if device == "cuda" else device, ExpertGroup(placement))
    if rank:
        engine.follow()
        return None
    found = played(engine)
    engine.stop_followers()
    return [torch.from_numpy(array.copy()) for array in found]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_processes_answer_as_one(tmp_path: Path, placement: Placement) -> None:
    found, _ = on_ranks(partial(on_rank, placement, "cpu"), tmp_path)
    for here, alone in zip(found, played(make_engine()), strict=True):
        np.testing.assert_allclose(here, alone, rtol=1e-4, atol=1e-4)


def away_from_the_second(rank: int) -> Any:
    """Tokens that the experts of the second device get, without and with a penalty on it."""
    engine = make_engine(group=ExpertGroup(PLACEMENTS[0]))
    if rank:
        engine.follow()
        return None
    slots = [engine.reserve(60) for _ in range(3)]
    for slot in slots:
        engine.launch(rows((slot, slot, 0, 10)), 2, ALL)
    engine.usage()
    shares = []
    for penalty in (0.0, 100.0):
        engine.set_penalty(np.array((0.0, penalty) * 4))
        engine.launch(rows(*((slot, slot, 10, 11) for slot in slots)), 2, 4)
        tokens, _ = engine.usage()
        shares.append(torch.from_numpy(tokens[:, 1::2].copy()).sum() / tokens.sum())
    engine.stop_followers()
    return shares


def test_a_penalty_moves_tokens_from_a_device_to_the_other(tmp_path: Path) -> None:
    (without, with_penalty), _ = on_ranks(away_from_the_second, tmp_path)
    assert 0.0 < without < 1.0 and with_penalty == 0.0


def wrong_placement(rank: int) -> str:
    with pytest.raises(PlacementError, match="for 3 devices, 2 take part"):
        ExpertGroup(Placement((0, 1, 2) * 2, 3))
    return "refused"


def test_a_placement_for_another_number_of_devices_is_refused_on_every_rank(tmp_path: Path) -> None:
    assert on_ranks(wrong_placement, tmp_path) == ["refused"] * N_RANKS


def test_a_leader_that_is_gone_is_named() -> None:
    class Gone(ExpertGroup):
        def __init__(self) -> None:
            self.rank, self._ranks, self.placement = 1, 2, PLACEMENTS[0]

    def broadcast(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    engine = make_engine(group=Gone())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "broadcast", broadcast)
        with pytest.raises(DevicesLostError, match="rank 1: another device of the group does not answer"):
            engine.follow()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < N_RANKS, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_cards_answer_as_one_process(tmp_path: Path, placement: Placement) -> None:
    found, _ = on_ranks(partial(on_rank, placement, "cuda"), tmp_path, "cpu:gloo,cuda:nccl")
    for here, alone in zip(found[::3], played(make_engine())[::3], strict=True):
        np.testing.assert_allclose(here, alone, rtol=2e-3, atol=2e-3)
