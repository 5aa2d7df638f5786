"""Streams of shifts: what comes when, and how it is played."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.data import datasets as data
from moe.data.corruptions import KINDS, corrupt
from moe.data.pools import CHUNK_BYTES, TEXT_OF_SHIFT, SamplePool, TextPool
from moe.data.streams import (
    SCHEDULES,
    STREAM_KINDS,
    ShiftStream,
    StreamConfig,
    StreamError,
    draw_shifts,
    play,
)
from moe.model.config import Task

N, CLASSES = 600, 10
LABELS = np.random.default_rng(0).integers(CLASSES, size=N)
seeds = st.integers(0, 2**63 - 1)


def make(**changes: Any) -> StreamConfig:
    fields: dict[str, Any] = {"task": "vision", "kinds": ("blur", "fog", "contrast"), "batches": 30}
    fields |= {"batch_size": 20, **changes}
    return StreamConfig(**fields)


@st.composite
def configs(draw: Any, task: Task = "vision") -> StreamConfig:
    """Streams that fit a pool of N samples."""
    kinds = tuple(draw(st.lists(st.sampled_from(STREAM_KINDS[task]), min_size=1, max_size=4, unique=True)))
    allowed = SCHEDULES if task == "vision" else ("per_shift", "recurring", "mixed")
    cycles = draw(st.integers(1, 3))
    steps = len(kinds) * 9 * cycles  # at least as many as any schedule has
    schedule = draw(st.sampled_from(allowed))
    smallest = len(kinds) if (task, schedule) == ("language", "mixed") else 1
    return StreamConfig(
        task=task, kinds=kinds, schedule=schedule, cycles=cycles, batches=steps + draw(st.integers(0, 20)),
        batch_size=draw(st.integers(smallest, 10 if task == "vision" else 8)),
        severity=draw(st.integers(1, 5)), concentration=draw(st.floats(1e-6, 1e6)),
    )  # fmt: skip


def label_entropy(stream: ShiftStream) -> float:
    """Mean over batches of the entropy of their labels, nats."""
    share = np.stack([np.bincount(LABELS[row], minlength=CLASSES) / len(row) for row in stream.index])
    return float(-(share * np.log(np.where(share > 0, share, 1))).sum(1).mean())


@given(config=configs(), seed=seeds)
def test_a_stream_follows_its_schedule_and_shows_a_sample_once_a_pass(config, seed):
    stream = draw_shifts(config, LABELS, seed)
    assert len(stream) == config.batches
    assert stream.index.shape == stream.shift_id.shape == (config.batches, config.batch_size)
    lengths = Counter(config.step_of_batch.tolist())
    assert sorted(lengths) == list(range(len(config.steps)))  # every step is played
    assert max(lengths.values()) - min(lengths.values()) <= 1
    for step, allowed in enumerate(config.steps):
        rows = config.step_of_batch == step
        shown = stream.index[rows].flatten()
        assert len(set(shown)) == len(shown) and 0 <= shown.min() and shown.max() < N
        count = Counter(stream.shifts[i] for i in stream.shift_id[rows].flatten())
        assert set(count) <= set(allowed)
        assert max(count.values()) - min(count[shift] for shift in allowed) <= 1
    again = draw_shifts(config, torch.from_numpy(LABELS), seed)
    assert (again.index == stream.index).all() and (again.shift_id == stream.shift_id).all()
    assert (draw_shifts(config, LABELS, seed ^ 1).index != stream.index).any()


@given(config=configs("language"), seed=seeds)
def test_lanes_of_text_read_on_and_share_nothing(config, seed):
    stream = draw_shifts(config, LABELS, seed)
    assert stream.index.shape == stream.shift_id.shape == (config.batches, config.batch_size)
    seen = set()
    for lane in range(config.batch_size):
        assert len(set(stream.shift_id[:, lane])) == 1 or config.schedule != "mixed"
        for shift in set(stream.shift_id[:, lane]):
            chunks = stream.index[stream.shift_id[:, lane] == shift, lane]
            assert (np.diff(chunks) == 1).all() and 0 <= chunks[0] and chunks[-1] < N
            assert not seen & {(shift, chunk) for chunk in chunks}
            seen |= {(shift, chunk) for chunk in chunks}
    for batch, step in enumerate(config.step_of_batch):
        names = {stream.shifts[shift] for shift in stream.shift_id[batch]}
        assert names == set(config.steps[step])  # a mixed batch holds them all
    if config.schedule == "mixed":
        lanes = Counter(stream.shift_id[0].tolist())
        assert max(lanes.values()) - min(lanes.values()) <= 1
    again = draw_shifts(config, LABELS, seed)
    assert (again.index == stream.index).all() and (again.shift_id == stream.shift_id).all()


def test_seeds_begin_lanes_of_text_elsewhere():
    config = make(task="language", kinds=("clean", "code"), batches=20, batch_size=10)
    first, second = (draw_shifts(config, LABELS, seed).index for seed in (0, 1))
    assert (first != second).all(axis=0).mean() > 0.8
    full = dataclasses.replace(config, batches=120)
    assert sorted(draw_shifts(full, LABELS, 0).index[:60].flat) == list(range(N))  # it just fits
    with pytest.raises(StreamError, match="610 chunks, the pool holds 600"):
        draw_shifts(dataclasses.replace(full, batches=121), LABELS, 0)


@given(seed=seeds, concentration=st.floats(1e-3, 1e3), batches=st.integers(3, 90))
def test_correlation_reorders_the_samples_of_each_shift_and_no_more(seed, concentration, batches):
    """So the labels of the whole stream, and of every shift, are those of an independent stream."""
    correlated = make(schedule="label_correlated", concentration=concentration, batches=batches)
    independent = dataclasses.replace(correlated, schedule="per_shift")
    streams = [draw_shifts(config, LABELS, seed) for config in (correlated, independent)]
    assert (streams[0].shift_id == streams[1].shift_id).all()
    for step in range(3):
        rows = correlated.step_of_batch == step
        assert sorted(streams[0].index[rows].flat) == sorted(streams[1].index[rows].flat)
    whole = [np.bincount(LABELS[stream.index.flat], minlength=CLASSES) for stream in streams]
    assert (whole[0] == whole[1]).all()
    if batches == 90:  # all of the pool under every shift
        assert (whole[0] == 3 * np.bincount(LABELS)).all()


@given(seed=seeds)
def test_labels_mix_within_a_batch_as_concentration_grows(seed):
    entropies = [
        label_entropy(
            draw_shifts(make(schedule="label_correlated", concentration=value, batches=90), LABELS, seed)
        )
        for value in (1e-3, 0.1, 10.0, 1e3)
    ]
    assert entropies == sorted(entropies)
    assert entropies[0] < 0.8  # hardly more than one label a batch
    independent = label_entropy(draw_shifts(make(batches=90), LABELS, seed))
    assert entropies[-1] == pytest.approx(independent, abs=0.3)


def test_the_schedules_read_as_documented():
    assert make().steps == (("blur@5",), ("fog@5",), ("contrast@5",))
    assert make(severity=2, kinds=("clean", "blur")).steps == (("clean",), ("blur@2",))
    assert make(schedule="gradual", kinds=("blur",)).steps == tuple(
        (f"blur@{s}",) for s in (1, 2, 3, 4, 5, 4, 3, 2, 1)
    )
    assert make(schedule="recurring", kinds=("blur", "fog")).steps == (("blur@5",), ("fog@5",)) * 2
    assert make(schedule="mixed", kinds=("blur", "fog")).steps == (("blur@5", "fog@5"),) * 2
    assert make(schedule="label_correlated").steps == make().steps
    text = make(task="language", kinds=("clean", "code"), batches=7)
    assert text.steps == (("clean",), ("code",))
    assert text.step_of_batch.tolist() == [0, 0, 0, 0, 1, 1, 1]  # from prose to code midway


def test_the_shift_of_a_batch_has_a_name():
    stream = draw_shifts(make(), LABELS, 0)
    assert [stream.shift_name(i) for i in (0, 9, 10, 29)] == ["blur@5", "blur@5", "fog@5", "contrast@5"]
    assert draw_shifts(make(schedule="mixed"), LABELS, 0).shift_name(0) == "mixed"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"task": "audio"}, "task must be one of"),
        ({"kinds": ("snow",)}, "kinds must name"),
        ({"kinds": ()}, "kinds must name"),
        ({"kinds": ("blur", "blur")}, "each once"),
        ({"kinds": ("code",)}, "kinds must name"),
        ({"schedule": "random"}, "schedule must be one of"),
        ({"task": "language", "kinds": ("code",), "schedule": "gradual"}, "for images"),
        ({"task": "language", "kinds": ("code",), "schedule": "label_correlated"}, "for images"),
        ({"task": "language", "kinds": ("clean", "code"), "schedule": "mixed", "batch_size": 1}, "a lane"),
        ({"severity": 0}, "severity"),
        ({"severity": 2.5}, "severity"),
        ({"batch_size": 0}, "batch_size"),
        ({"cycles": 0}, "cycles"),
        ({"concentration": 0.0}, "concentration"),
        ({"concentration": float("nan")}, "concentration"),
        ({"batches": 2}, "shorter than its schedule.*3 steps"),
        ({"schedule": "gradual", "batches": 26}, "shorter than its schedule.*27 steps"),
    ],
)
def test_broken_streams_are_refused(changes, rule):
    with pytest.raises(StreamError, match=rule):
        make(**changes)


def test_a_step_larger_than_the_pool_is_refused():
    assert len(draw_shifts(make(batches=90), LABELS, 0)) == 90  # exactly the pool under each of 3 shifts
    with pytest.raises(StreamError, match="needs 620 different samples, the pool holds 600"):
        draw_shifts(make(batches=91), LABELS, 0)
    for seed in (-1, 2**63):
        with pytest.raises(StreamError, match="seed"):
            draw_shifts(make(), LABELS, seed)


@pytest.fixture(scope="module")
def images():
    return SamplePool("vision", ("clean",), "cpu")


@pytest.fixture(scope="module")
def text():
    return TextPool(("clean", "code"), "cpu")


def test_images_are_corrupted_as_they_are_played(images):
    """A kind without randomness: each image must be its clean one corrupted, wherever it is in a batch."""
    config = make(kinds=("clean", "contrast", "gamma"), schedule="mixed", batches=6, batch_size=16)
    stream = draw_shifts(config, images.targets[0], 3)
    for batch, (inputs, targets, shift) in enumerate(play(stream, images)):
        assert shift == "mixed" and inputs.dtype == torch.uint8 and inputs.shape == (16, 28, 28)
        assert torch.equal(targets, images.targets[0][torch.from_numpy(stream.index[batch])])
        for place in range(16):
            clean = images.inputs[0, stream.index[batch, place]][None]
            kind = stream.shifts[stream.shift_id[batch, place]].partition("@")[0]
            want = clean if kind == "clean" else corrupt(clean, kind, 5, torch.Generator())
            assert (inputs[place].int() - want[0].int()).abs().max() <= 1  # sums depend on the batch


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_playing_twice_gives_the_same_and_another_seed_other_noise(images, schedule):
    config = make(kinds=KINDS[:2], schedule=schedule, batches=20, batch_size=8)
    first, second = (draw_shifts(config, images.targets[0], 5) for _ in range(2))
    played = list(play(first, images))
    for (a, b, c), (d, e, f) in zip(played, play(second, images), strict=True):
        assert torch.equal(a, d) and torch.equal(b, e) and c == f
    assert [shift for _, _, shift in played] == [first.shift_name(batch) for batch in range(20)]
    other = dataclasses.replace(first, seed=6)  # the same samples
    assert not torch.equal(next(play(other, images))[0], played[0][0])


@pytest.mark.parametrize("schedule", ["per_shift", "recurring", "mixed"])
def test_each_lane_plays_one_stretch_of_each_text(text, schedule):
    """Glued together, what a lane shows of a domain is found in that domain's file as one piece."""
    config = make(task="language", kinds=("clean", "code"), schedule=schedule, batches=8, batch_size=5)
    stream = draw_shifts(config, text.targets[0], 0)
    sources = {name: bytes(data.load_language(TEXT_OF_SHIFT[name], "test").tolist()) for name in text.shifts}
    read: dict[tuple[int, str], bytes] = {}
    for batch, (inputs, targets, shift) in enumerate(play(stream, text)):
        assert inputs.shape == (5, CHUNK_BYTES) and targets.dtype == torch.int64
        for lane, row in enumerate(inputs.tolist()):
            name = stream.shifts[stream.shift_id[batch, lane]]
            assert shift in (name, "mixed")
            read[lane, name] = read.get((lane, name), b"") + bytes(row)
            assert read[lane, name] + bytes([int(targets[lane])]) in sources[name]
    assert sum(len(part) for part in read.values()) == 8 * 5 * CHUNK_BYTES


def test_a_text_pool_is_the_text_in_its_order():
    cases: tuple[tuple[data.Split, int], ...] = (("test", 64), ("validation", 100))
    for split, length in cases:
        pool = TextPool(("code", "clean"), "cpu", split, length)
        texts = [data.load_language(domain, split) for domain in ("code", "prose")]
        assert len(pool) == (min(len(text) for text in texts) - 1) // length
        for shift, text in enumerate(texts):
            assert torch.equal(pool.inputs[shift].flatten(), text[: len(pool) * length])
            assert torch.equal(pool.targets[shift, :-1], pool.inputs[shift, 1:, 0].long())
            assert pool.targets[shift, -1] == text[len(pool) * length]
    with pytest.raises(ValueError, match="chunk_bytes must be within"):
        TextPool(("clean",), "cpu", chunk_bytes=0)


def test_a_pool_that_does_not_fit_is_refused(images, text):
    stream = draw_shifts(make(), images.targets[0], 0)
    with pytest.raises(StreamError, match="vision stream plays on a pool of"):
        play(stream, text)
    code = make(task="language", kinds=("code",), batches=2)
    with pytest.raises(StreamError, match="'code'"):
        play(draw_shifts(code, text.targets[0], 0), TextPool(("clean",), "cpu"))
    with pytest.raises(StreamError, match="scattered chunks of a SamplePool"):
        play(draw_shifts(code, text.targets[0], 0), SamplePool("language", ("code",), "cpu"))
    with pytest.raises(StreamError, match="pool of more than"):
        play(draw_shifts(make(), np.zeros(10**6), 0), images)


@pytest.mark.gpu
def test_a_gpu_plays_the_same_stream(images):
    stream = draw_shifts(make(schedule="mixed", batches=6), images.targets[0], 0)
    on_gpu = play(stream, SamplePool("vision", ("clean",), "cuda"))
    for (here, a, _), (there, b, _) in zip(play(stream, images), on_gpu, strict=True):
        assert there.is_cuda and torch.equal(a, b.cpu())
        assert (there.cpu().int() - here.int()).abs().float().mean() < 0.05
