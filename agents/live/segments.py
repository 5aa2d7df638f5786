"""Live episodes and the telemetry trace recorded beside them, on one clock."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from typing import Any

import numpy as np

from agents.live.episodes import LiveEpisodes
from agents.play.rollout import Recording
from moe.workload import KNOB_NAMES
from thermoe_env.calibration.recorder import Recorder, RecorderError
from thermoe_env.calibration.traces import SEGMENT_COLUMNS, segments_path
from thermoe_env.env import ThermalMoEEnv

RECORDED_WORLDS = ("live",)
"""Worlds whose device NVML can record."""


class Segments:
    """What ran when, beside a trace and on its clock, as `traces.load_segments` reads it."""

    def __init__(self, recorder: Recorder | None, expert_counts: tuple[float, ...]) -> None:
        self._recorder, self._expert_counts = recorder, np.array(expert_counts)
        self._rows: list[list[Any]] = []

    def now_s(self) -> float:
        """Time of the trace; 0 where none is recorded."""
        return 0.0 if self._recorder is None else self._recorder.now_s

    def add(self, recording: Recording, t0: float) -> None:
        """Note an episode that began at `t0` of the trace and has just ended."""
        if self._recorder is None or not len(recording.reward):
            return
        load = _load(recording, self._expert_counts)
        name = [recording.policy, int(recording.seeds[0])]
        self._rows.append(["episode", round(t0, 3), round(self.now_s(), 3), *load, *name])
        with segments_path(self._recorder.path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*SEGMENT_COLUMNS, "policy", "seed"])
            writer.writerows(self._rows)


def _load(recording: Recording, expert_counts: np.ndarray) -> tuple[float, float, float, float, float, str]:
    """An episode as one load: experts per token, tokens per batch, busy share, batches, mean time, name."""
    work, seconds = recording.work[:, 0], len(recording.reward) * recording.interval_s
    k = float(expert_counts[recording.index[:, 0, KNOB_NAMES.index("expert_count")]].mean())
    layers = recording.tokens_per_expert.shape[2]  # [T, 1, L, E]
    tokens = float(recording.tokens_per_expert.sum()) / layers / k
    batches, busy_s = max(1.0, float(work["batches"].sum())), float(work["busy_s"].sum())
    return (
        round(k, 3), round(tokens / batches, 1), round(min(1.0, busy_s / seconds), 3), batches,
        round(busy_s / batches * 1e3, 3), "service",
    )  # fmt: skip


@contextlib.contextmanager
def recording_beside(env: ThermalMoEEnv, live: LiveEpisodes, samples_per_s: float) -> Iterator[Segments]:
    """Record the telemetry of a real device. Episodes matter more: they are played without it if need be."""
    counts = env.problem.knobs.levels["expert_count"]
    if env.world not in RECORDED_WORLDS:
        yield Segments(None, counts)
        return
    import torch

    from moe.device.torch_device import uuid_of

    uuid = uuid_of(torch.device("cuda"))
    number = next(i for i in range(1, 1000) if not (live.folder / f"live{i}_telemetry.csv").exists())
    recorder = Recorder(live.folder / f"live{number}_telemetry.csv", uuid, samples_per_s=samples_per_s)
    try:
        recorder.__enter__()
    except RecorderError as error:
        live.lose(str(error))
        yield Segments(None, counts)
        return
    try:
        yield Segments(recorder, counts)
    finally:
        try:
            recorder.__exit__(None, None, None)
        except RecorderError as error:
            live.lose(str(error))
