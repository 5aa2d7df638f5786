"""The seam of compiled services: the core around a second kind, whose sequences take several intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from moe.workload import Knobs
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import load_scenario
from thermoe_env.seeding import episode_seed
from thermoe_env.twin import services
from thermoe_env.twin.core import TwinBatch
from thermoe_env.twin.score import KNOBS_READ
from thermoe_env.twin.service import Service, implement
from thermoe_env.twin.telemetry import TwinTelemetry
from thermoe_env.twin.workload import TwinWorkload

MOST, LENGTH = 256, 10.0
"""Places for running sequences; tokens of each."""
STEP_S, STEP_J, TOKEN_J = 0.05, 2.0, 0.25
"""A decoding step: its time, its energy, and the energy of each token in it."""


class Tokens(NamedTuple):
    """What does not change in a service that writes tokens."""

    length: float
    slots: int


class TokenState(NamedTuple):
    """Sequences that run, and who is next."""

    left: np.ndarray  # float64 [n, MOST], tokens that a running sequence still needs; 0: a free place
    next: np.ndarray  # int64 [n, 2]


def start(fixed, seed, state, i):
    state.left[i] = 0.0
    state.next[i] = 0


def serve(
    fixed, knobs, index, arrivals, first_slot, shift, clocks, open_classes, promised_s, state, i, work,
    histogram, slot_energy,
):  # fmt: skip
    """Five steps in a slot: free places are filled, interactive requests first, then each writes a token."""
    for slot in range(first_slot, first_slot + fixed.slots):
        slot_energy[slot - first_slot, 0] = 0.0
        for _ in range(5):
            running = 0.0
            for place in range(int(knobs.batch_size)):
                for c in range(2):
                    if state.left[i, place] == 0.0 and state.next[i, c] < arrivals[c, slot]:
                        state.next[i, c] += 1
                        state.left[i, place] = fixed.length
                        work.answered[c] += 1.0
                if state.left[i, place] > 0.0:
                    state.left[i, place] -= 1.0
                    running += 1.0
            if running > 0.0:
                work.busy_s += STEP_S
                work.batches += 1.0
                work.correct += running
                slot_energy[slot - first_slot, 0] += STEP_J + TOKEN_J * running
    for c in range(2):
        work.arrived[c] = arrivals[c, first_slot + fixed.slots] - arrivals[c, first_slot]
        work.waiting[c] = arrivals[c, first_slot + fixed.slots] - state.next[i, c]
    work.sm_clock = clocks[0]


implement(Tokens, start, serve)


def token_service(problem: Problem) -> Service:
    def new_state(n: int) -> TokenState:
        return TokenState(np.zeros((n, MOST)), np.zeros((n, 2), np.int64))

    return Service(Tokens(LENGTH, 4), ("batch_size",), new_state)


@pytest.fixture
def tokens(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A problem that the token service is chosen for, with few requests and places for few sequences."""
    monkeypatch.setattr(services, "make_service", token_service)
    light = {"kind": "poisson", "low_load": 6e-4, "high_load": 6e-4}
    return Problem.of(load_scenario(problem.scenario, traffic=light, episode_s=30, knobs=["batch_size"]))


def by_hand(arrivals: np.ndarray, seconds: int, places: int) -> list[dict[str, Any]]:
    """The same service written plainly."""
    left, served, rows = [0.0] * places, [0, 0], []
    for second in range(seconds):
        row: dict[str, Any] = {"answered": [0, 0], "steps": 0, "tokens": 0}
        for slot in range(4 * second, 4 * second + 4):
            for _ in range(5):
                for place in range(places):
                    for c in range(2):
                        if left[place] == 0 and served[c] < arrivals[c, slot]:
                            served[c] += 1
                            row["answered"][c] += 1
                            left[place] = LENGTH
                running = [place for place in range(places) if left[place] > 0]
                for place in running:
                    left[place] -= 1
                row["steps"] += bool(running)
                row["tokens"] += len(running)
        row["waiting"] = [int(arrivals[c, 4 * second + 4]) - served[c] for c in range(2)]
        row["running"] = sum(x > 0 for x in left)
        rows.append(row)
    return rows


def test_the_core_plays_a_service_that_carries_sequences_over_intervals(tokens: Problem) -> None:
    batch = TwinBatch(tokens, 3)
    batch.reset([5, 6, 7])
    index = tokens.knobs.indices(np.zeros((3, 1), np.int64), "multi_discrete")
    places = int(tokens.knobs.levels["batch_size"][0])
    assert places <= MOST
    expected = [by_hand(arrivals, 29, places) for arrivals in batch.state.arrivals.copy()]
    carried = 0
    for second in range(29):
        batch.step(index)
        for i in range(3):
            row, work = expected[i][second], batch.work[i]
            assert work["answered"].tolist() == row["answered"]
            assert work["waiting"].tolist() == row["waiting"]
            assert (work["batches"], work["correct"]) == (row["steps"], row["tokens"])
            assert batch.slot_energy[i].sum() == pytest.approx(
                STEP_J * row["steps"] + TOKEN_J * row["tokens"]
            )
            assert (batch.servers.left[i] > 0).sum() == row["running"]
            carried += row["running"]
    assert carried > 20, "no sequence ran over an interval's end"


def test_one_server_is_the_same_alone_in_a_batch_and_behind_the_workload_seam(tokens: Problem) -> None:
    batch, alone = TwinBatch(tokens, 3), TwinBatch(tokens, 1)
    telemetry = TwinTelemetry(tokens)
    workload = TwinWorkload(tokens, lambda: telemetry.clocks)
    batch.reset([5, 6, 7])
    alone.reset([6])
    workload.reset(episode_seed(6, 0))
    telemetry.reset(episode_seed(6, 0))
    index = tokens.knobs.indices(np.zeros((3, 1), np.int64), "multi_discrete")
    knobs: Knobs = tokens.knobs.knobs(index[0])
    for _ in range(20):
        batch.step(index)
        alone.step(index[:1])
        stats = workload.run(knobs, 1.0)
        telemetry.read(stats, 1.0)
        assert batch.work[1].tobytes() == alone.work[0].tobytes()
        assert stats.row.tolist() == alone.work.view(np.float64).tolist()


def test_episodes_begin_with_no_sequence_of_the_one_before(tokens: Problem) -> None:
    batch = TwinBatch(tokens, 1)
    batch.reset([5])
    index = tokens.knobs.indices(np.zeros((1, 1), np.int64), "multi_discrete")
    for _ in range(30):
        step = batch.step(index)
    assert step.truncated[0] and not batch.servers.left.any() and not batch.servers.next.any()


def test_a_fork_carries_the_sequences_along(tokens: Problem) -> None:
    batch, copy = TwinBatch(tokens, 2), TwinBatch(tokens, 1)
    batch.reset([5, 6])
    index = tokens.knobs.indices(np.zeros((2, 1), np.int64), "multi_discrete")
    for _ in range(9):
        batch.step(index)
    copy.fork(batch, 1)
    for _ in range(9):
        batch.step(index)
        copy.step(index[:1])
        assert batch.work[1].tobytes() == copy.work[0].tobytes()


def test_a_knob_that_the_service_does_not_read_is_refused(tokens: Problem) -> None:
    """A knob that is shown and does nothing would be worse than none."""
    moved = Problem.of(load_scenario(tokens.scenario, knobs=["batch_size", "pace", "expert_count"]))
    for build in (lambda: TwinBatch(moved, 1), lambda: TwinWorkload(moved, lambda: 1.0)):
        with pytest.raises(ScenarioError, match=r"pace.*expert_count.*reads only.*batch_size"):
            build()


@pytest.mark.parametrize("name", KNOBS_READ)
def test_every_knob_has_its_own_effect(problem: Problem, name: str) -> None:
    """Each knob moved alone, from its lowest to its highest level, at half load."""
    traffic = {"kind": "poisson", "low_load": 0.5, "high_load": 0.5}
    alone = Problem.of(load_scenario(problem.scenario, traffic=traffic, knobs=[name]))
    levels = alone.knobs.levels[name]
    batch = TwinBatch(alone, 2)
    batch.reset([3, 3])
    index = alone.knobs.indices(np.array([[0], [len(levels) - 1]]), "multi_discrete")
    for _ in range(5):
        batch.step(index)
    low, high = batch.work
    if name == "pace":
        assert low["busy_s"] <= levels[0] * 1.0 + 1e-9 < high["busy_s"]
        assert low["sm_clock"] == high["sm_clock"] == 1.0
    elif name == "sm_clock":
        assert (low["sm_clock"], high["sm_clock"]) == (levels[0], levels[-1])
    elif name == "batch_size":
        assert low["batches"] > 1.5 * high["batches"]
    elif name == "ttt_steps":
        assert low["ttt_steps"] == 0.0 and high["ttt_steps"] == levels[-1] * high["batches"]
    else:  # energy per answer rises with the experts, falls with the bias
        energy = [batch.slot_energy[i].sum() / batch.work[i]["answered"].sum() for i in range(2)]
        assert (energy[1] > energy[0]) == (name == "expert_count")
        assert low["batches"] == pytest.approx(high["batches"], rel=0.3)
