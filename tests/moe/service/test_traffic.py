"""Request streams: their seeds, their means, and replay of a trace against counts by hand."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from moe.service.queueing import SLOT_S
from moe.service.request_trace import TraceError
from moe.service.traffic import Kind, TrafficConfig, draw_stream, traffic_of
from thermoe_env.configs import config_path

SLOTS_PER_S = round(1 / SLOT_S)
KINDS = ("poisson", "bursts", "diurnal")

configs = st.builds(
    TrafficConfig,
    kind=st.sampled_from(KINDS),
    low_load=st.floats(0.1, 0.5),
    high_load=st.floats(0.5, 1.5),
    interactive_share=st.floats(0.0, 1.0),
    shifts=st.sampled_from([(0,), (0, 3), (1, 2, 5)]),
    shift_dwell_s=st.floats(2.0, 60.0),
)


def per_second(arrivals: np.ndarray) -> np.ndarray:
    return np.diff(arrivals[:, ::SLOTS_PER_S], axis=1).sum(axis=0)


@settings(max_examples=40)
@given(configs, st.integers(0, 1000))
def test_a_stream_follows_from_its_seed(config, seed):
    stream, again = draw_stream(config, seed, 60, 500.0), draw_stream(config, seed, 60, 500.0)
    other = draw_stream(config, seed + 1, 60, 500.0)
    assert np.array_equal(stream.arrivals, again.arrivals) and np.array_equal(stream.shift_id, again.shift_id)
    assert not np.array_equal(stream.arrivals, other.arrivals)


@settings(max_examples=40)
@given(configs, st.integers(0, 1000))
def test_a_stream_is_whole(config, seed):
    stream = draw_stream(config, seed, 60, 500.0)
    assert stream.arrivals.shape == (2, 60 * SLOTS_PER_S + 1) and stream.arrivals.dtype == np.int32
    assert np.all(stream.arrivals[:, 0] == 0) and np.all(np.diff(stream.arrivals) >= 0)
    assert stream.shift_id.shape == (60,) and set(stream.shift_id) <= set(config.shifts)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_load_and_share(kind):
    config = TrafficConfig(
        kind=kind, low_load=0.4, high_load=1.2, dwell_s=5.0, period_s=100.0, interactive_share=0.3
    )
    total = np.mean([draw_stream(config, seed, 400, 200.0).arrivals[:, -1] for seed in range(30)], axis=0)
    assert total.sum() / 400 == pytest.approx(0.8 * 200.0, rel=0.03)
    assert total[0] / total.sum() == pytest.approx(0.3, rel=0.02)


def test_bursts_stay_at_their_levels_for_at_least_three_seconds():
    config = TrafficConfig(kind="bursts", low_load=0.5, high_load=1.0, levels=2, dwell_s=4.0)
    rate = per_second(draw_stream(config, 3, 300, 1e5).arrivals) / 1e5
    level = np.where(rate > 0.75, 1.0, 0.5)
    assert np.allclose(rate, level, atol=0.02)
    lengths = np.diff(np.flatnonzero(np.diff(level, prepend=-1)))
    assert lengths.min() >= 3


def test_bursts_dwell_at_evenly_spaced_levels_for_the_stated_mean():
    config = TrafficConfig(kind="bursts", low_load=0.2, high_load=1.2, levels=6, dwell_s=15.0)
    spaced, lengths = np.linspace(0.2, 1.2, 6), []
    for seed in range(20):
        rate = per_second(draw_stream(config, seed, 1000, 1e5).arrivals) / 1e5
        level = np.abs(rate[:, None] - spaced).argmin(axis=1)
        assert np.allclose(rate, spaced[level], atol=0.02) and set(level) == set(range(6))
        lengths.extend(np.diff(np.flatnonzero(np.diff(level, prepend=-1))))
    # An exponential of mean m that is cut at c from below has mean c + m exp(-c / m).
    assert np.mean(lengths) == pytest.approx(3.0 + 15.0 * np.exp(-3.0 / 15.0), rel=0.05)


def test_a_day_is_a_sine_between_low_and_high_load():
    config = TrafficConfig(kind="diurnal", low_load=0.4, high_load=1.2, period_s=80.0)
    t, phases = np.arange(400), []
    for seed in range(10):
        rate = per_second(draw_stream(config, seed, 400, 1e6).arrivals) / 1e6
        angle = 2.0 * np.pi * t / 80.0
        basis = np.stack([np.ones(400), np.sin(angle), np.cos(angle)], axis=1)
        (mean, sine, cosine), *_ = np.linalg.lstsq(basis, rate)
        assert (mean, np.hypot(sine, cosine)) == pytest.approx((0.8, 0.4), rel=0.01)
        assert np.abs(rate - basis @ [mean, sine, cosine]).max() < 0.01
        phases.append(np.arctan2(cosine, sine))
    assert np.ptp(phases) > np.pi, "an episode begins at any time of day"


def test_shifts_stay_for_a_quarter_of_their_mean_time_at_least():
    config, lengths = TrafficConfig(shifts=(0, 1, 3), shift_dwell_s=40.0), []
    for seed in range(40):
        shift = draw_stream(config, seed, 2000, 1.0).shift_id
        lengths.extend(np.diff(np.flatnonzero(np.diff(shift, prepend=-1))))
    assert min(lengths) in (9, 10, 11)
    assert np.mean(lengths) == pytest.approx(10.0 + 40.0 * np.exp(-0.25), rel=0.06)


def test_shifts_take_turns():
    config = TrafficConfig(shifts=(0, 2), shift_dwell_s=10.0)
    shift = draw_stream(config, 0, 400, 10.0).shift_id
    changes = np.flatnonzero(np.diff(shift))
    assert 15 < len(changes) < 80
    assert np.bincount(shift)[[0, 2]].min() > 80


def write_trace(path: Path, stamps: list[str]) -> str:
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{s},100,10\n" for s in stamps))
    return str(path)


def test_trace_replay_has_the_trace_s_shape(tmp_path):
    # 8 requests in the first second, 2 in the next, none, 6 in the last: 16 in 4 s, mean 4.
    times = [0.0, *np.linspace(0.01, 0.9, 7), 1.2, 1.7, *np.linspace(3.0, 3.9, 6)]
    stamps = [f"2024-05-10 12:59:{56 + int(t)}.{round(t % 1 * 1e7):07d}" for t in times]
    path = write_trace(tmp_path / "trace.csv", stamps)
    config = TrafficConfig(kind="trace", trace=path, low_load=0.5, high_load=0.5)
    arrived = np.mean(
        [per_second(draw_stream(config, seed, 4, 1000.0).arrivals) for seed in range(50)], axis=0
    )
    assert arrived == pytest.approx([1000.0, 250.0, 0.0, 750.0], rel=0.03)


def test_shipped_trace_is_replayed_second_by_second():
    """An episode is a stretch of the trace: its counts by pandas, times load and capacity over their mean."""
    path = config_path("traces/requests", "azure-conv-2023", ".csv")
    table = pd.read_csv(path, parse_dates=["TIMESTAMP"])
    assert list(table) == ["TIMESTAMP", "ContextTokens", "GeneratedTokens"] and not table.isna().any(
        axis=None
    )
    counts = table.resample("s", on="TIMESTAMP", origin="start").size().to_numpy()
    assert len(counts) >= 3500 and counts.sum() == len(table) == 19_366
    capacity = 1e6  # so many that the Poisson noise of the replay is below that of the trace
    config = TrafficConfig(kind="trace", trace=str(path), low_load=0.2, high_load=1.2)
    stretches = sliding_window_view(0.7 * capacity * counts / counts.mean(), 120)  # [begins, seconds]
    begins = []
    for seed in range(20):
        arrived = per_second(draw_stream(config, seed, 120, capacity).arrivals)
        begins.append(int(np.abs(stretches - arrived).sum(axis=1).argmin()))
        expected = stretches[begins[-1]]
        assert np.all(np.abs(arrived - expected) <= 6.0 * np.sqrt(expected))
    assert len(set(begins)) > 15 and max(begins) - min(begins) > 900


def test_a_trace_shorter_than_an_episode_is_refused(tmp_path):
    path = write_trace(tmp_path / "trace.csv", [f"2024-05-10 00:00:{second:02d}" for second in range(10)])
    with pytest.raises(TraceError, match=r"trace\.csv: covers 10 s, the episode needs 30 s"):
        draw_stream(TrafficConfig(kind="trace", trace=path), 0, 30, 100.0)


def test_a_trace_that_changed_is_read_again(tmp_path):
    path = tmp_path / "trace.csv"
    lengths = []
    for minutes in (1, 2):
        stamps = [f"2024-05-10 00:{minute:02d}:{s:02d}" for minute in range(minutes) for s in range(60)]
        config = TrafficConfig(kind="trace", trace=write_trace(path, stamps))
        os.utime(path, (minutes, minutes))
        lengths.append(len(traffic_of(config, 1, 100.0).trace_rps))
    assert lengths == [60, 120]


def test_stamps_to_the_minute_give_no_spikes(tmp_path):
    """90 and 30 requests in two minutes: loads of 1.5 and 0.5 of the mean, second by second."""
    stamps = ["2024-05-10 12:00:00"] * 90 + ["2024-05-10 12:01:00"] * 30
    path = write_trace(tmp_path / "trace.csv", stamps)
    config = TrafficConfig(kind="trace", trace=path, low_load=0.5, high_load=0.5)
    arrived = per_second(draw_stream(config, 0, 120, 1e5).arrivals)
    assert arrived[:60] == pytest.approx(75_000, rel=0.03)
    assert arrived[60:] == pytest.approx(25_000, rel=0.03)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "storm"},
        {"low_load": 0.0},
        {"low_load": 1.4},
        {"high_load": math.inf},
        {"high_load": math.nan},
        {"interactive_share": 1.1},
        {"levels": 1},
        {"levels": 2.0},
        {"dwell_s": 0.0},
        {"dwell_s": "15"},
        {"period_s": 1e-300},
        {"shift_dwell_s": 1e-300},
        {"kind": "trace"},
        {"trace": "requests.csv"},
        {"shifts": ()},
    ],
)
def test_impossible_traffic_is_refused(values):
    with pytest.raises(ValueError, match=f"(?s)TrafficConfig.*{next(iter(values))}"):
        TrafficConfig(**values)


@pytest.mark.parametrize("kind", [*KINDS, "trace"])
def test_more_requests_than_are_counted_are_refused(kind: Kind, tmp_path: Path) -> None:
    stamps = [f"2024-05-10 12:{i // 240:02d}:{i // 4 % 60:02d}.{i % 4 * 25:02d}" for i in range(1600)]
    trace = write_trace(tmp_path / "t.csv", stamps) if kind == "trace" else None
    config = TrafficConfig(kind=kind, low_load=1.0, high_load=1.0, trace=trace, interactive_share=1.0)
    whole = draw_stream(config, 0, 100, 1.9e7)
    assert np.all(np.diff(whole.arrivals) >= 0) and whole.arrivals[0, -1] == pytest.approx(1.9e9, rel=0.01)
    with pytest.raises(ValueError, match=r"traffic\.high_load=1 means up to .*lower the loads or shorten"):
        draw_stream(config, 0, 100, 2.2e7)
