"""Request traces: every way to write the same requests is the same trace, and none makes spikes silently."""

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.service.request_trace import RequestTrace, TraceError, read_request_trace

BEGIN = datetime(2024, 5, 12, tzinfo=UTC)
EPOCH_S = 1_715_472_000
ARRIVAL_S = (0.0, 0.25, 0.75, 1.5, 3.25, 3.5)
PROMPT, OUTPUT = (10, 20, 30, 40, 50, 60), (1, 2, 0, 4, 5, 6)
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def trace_of(arrival_s: Sequence[float]) -> RequestTrace:
    arrival_us = np.round(1e6 * np.sort(arrival_s)).astype(np.int64)
    return RequestTrace(
        path="x.csv", arrival_us=arrival_us - arrival_us[0], prompt_tokens=None, output_tokens=None
    )


def csv_text(head: str, stamps: Sequence[object], end: str = "\n") -> str:
    rows = [f"{s},{p},{o}" for s, p, o in zip(stamps, PROMPT, OUTPUT, strict=True)]
    return end.join([head, *rows, ""])


def iso(form: str = "%Y-%m-%d %H:%M:%S.%f", hours: int = 0) -> list[str]:
    return [f"{BEGIN + timedelta(seconds=s, hours=hours):{form}}" for s in ARRIVAL_S]


def json_lines(time_ms: Sequence[float]) -> str:
    rows = [
        json.dumps({"timestamp": t, "input_length": p, "output_length": o, "hash_ids": [1, 2]})
        for t, p, o in zip(time_ms, PROMPT, OUTPUT, strict=True)
    ]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        csv_text(AZURE, iso()),
        csv_text(AZURE, iso(), "\r\n"),
        csv_text(AZURE, [f"{s}+00:00" for s in iso()]),
        csv_text(AZURE, [f"{s}Z" for s in iso("%Y-%m-%dT%H:%M:%S.%f")]),
        csv_text(AZURE, [f"{s}+05:30" for s in iso("%Y-%m-%d %H:%M:%S.%f", hours=5)]),
        csv_text(AZURE, [f"{s}000000000" for s in iso()]),
        csv_text(AZURE, [s.rstrip("0").rstrip(".") for s in iso()]),
        csv_text(AZURE, [f'"{s}"' for s in iso()]),
        csv_text(AZURE, iso()).replace(",", ", "),
        csv_text(AZURE, iso()).replace("\n", "\n\n"),
        csv_text(AZURE, [EPOCH_S + s for s in ARRIVAL_S]),
        csv_text(AZURE, [round(1e3 * (EPOCH_S + s)) for s in ARRIVAL_S]),
        csv_text(AZURE, [round(1e6 * (EPOCH_S + s)) for s in ARRIVAL_S]),
        csv_text(AZURE, [round(1e3 * (EPOCH_S + s)) * 10**6 for s in ARRIVAL_S]),
        csv_text("Timestamp,Request tokens,Response tokens", ARRIVAL_S),
        csv_text("Timestamp,Request tokens,Response tokens", [20_240_512 + s for s in ARRIVAL_S]),
        csv_text("Timestamp,Request tokens,Response tokens", iso()),
        json_lines([1e3 * s for s in ARRIVAL_S]),
        json_lines([round(1e3 * s) for s in ARRIVAL_S]).replace("\n", "\r\n\r\n"),
        json_lines([round(1e3 * (EPOCH_S + s)) for s in ARRIVAL_S]),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_way_to_write_the_same_requests_is_the_same_trace(tmp_path: Path, content: str, mark: str):
    path = tmp_path / "trace.csv"
    path.write_bytes((mark + content).encode())
    trace = read_request_trace(path)
    assert trace.arrival_us.tolist() == [round(1e6 * s) for s in ARRIVAL_S] and trace.step_us == 250_000
    assert trace.prompt_tokens is not None and trace.prompt_tokens.tolist() == list(PROMPT)
    assert trace.output_tokens is not None and trace.output_tokens.tolist() == list(OUTPUT)
    assert trace.relative_rate().tolist() == [2.0, 2 / 3, 0.0, 4 / 3]  # 3, 1, none and 2 in four seconds


def test_the_order_of_rows_does_not_matter(tmp_path: Path):
    head, *rows = csv_text(AZURE, iso()).splitlines()
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([head, *rows[::-1]]))
    trace = read_request_trace(path)
    assert trace.arrival_us.tolist() == [round(1e6 * s) for s in ARRIVAL_S]
    assert trace.output_tokens is not None and trace.output_tokens.tolist() == list(OUTPUT)


@pytest.fixture
def berlin(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_the_zone_of_the_machine_does_not_matter(tmp_path: Path, berlin: None):
    # In Berlin an hour lies between the first two on that night; in UTC, as the traces have it, a second.
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP\n2023-10-29 02:59:59\n2023-10-29 03:00:00\n2023-10-29 03:00:01.5\n")
    assert read_request_trace(path).arrival_us.tolist() == [0, 1_000_000, 2_500_000]


@given(
    st.lists(st.integers(0, 39), min_size=2, max_size=400),
    st.sampled_from([0.001, 0.3, 0.5, 0.7, 1.0, 1.5, 3.0, 60.0, 90.0, 600.0]),
)
def test_coarse_stamps_spread_their_requests_and_keep_the_mean(steps, step_s):
    """Rounded down to any step, at most the fullest step's share falls into a second of it."""
    trace = trace_of([step_s * step for step in steps])
    if trace.step_us == 0:
        return
    try:
        rate = trace.relative_rate()
    except TraceError as error:
        assert "less than one per" in str(error) or "moment of the minute" in str(error)
        return
    assert rate.mean() == pytest.approx(1.0)
    fullest = np.unique(trace.arrival_us, return_counts=True)[1].max() / (trace.step_us / 1e6)  # per second
    assert rate.max() <= fullest / (len(steps) / (len(rate) + 1)) * (1.0 + 1e-9)


def test_a_step_that_does_not_divide_a_second_makes_no_ripple():
    """Ten requests every 0.7 s: 14.3 per second, never 10 in one and 20 in the next."""
    rate = trace_of(np.repeat(0.7 * np.arange(300), 10).tolist()).relative_rate()
    assert rate == pytest.approx(np.ones(210))


def test_few_requests_are_refused_with_a_step_that_helps(tmp_path: Path):
    """A request every two minutes: second by second it would be one at 117 times the mean load."""
    arrival_s = 120.0 * np.arange(60) + np.random.default_rng(0).uniform(0.0, 60.0, 60)
    with pytest.raises(TraceError, match=r"60 requests in 7045 s .* steps of 236 s or more"):
        trace_of(arrival_s.tolist()).relative_rate()
    rounded = trace_of((236.0 * np.floor(arrival_s / 236.0)).tolist()).relative_rate()
    assert rounded.mean() == pytest.approx(1.0) and rounded.max() < 2.0


def test_moments_that_stand_for_a_minute_are_refused():
    """Two logs in one, stamped to the minute and to the second."""
    minutes = np.repeat(60.0 * np.arange(10), 100)
    with pytest.raises(TraceError, match="1000 of 1007 times lie on one moment of the minute"):
        trace_of([*minutes.tolist(), *range(1, 8)]).relative_rate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIME,ContextTokens\n1,2\n", r"no column TIMESTAMP or Timestamp in the header \['TIME', 'Con"),
        ("", "no column TIMESTAMP or Timestamp"),
        ("timestamp\n0\n1\n", "no column TIMESTAMP or Timestamp"),  # of seconds, most likely
        ('{"time": 0}\n{"time": 1}\n', r"no column timestamp in the header \['time'\]"),
        ('{"timestamp": 0}\n{"timestamp": 1\n', "line 2: not JSON"),
        ('{"timestamp": 0}\n\n[1]\n', "line 3: not a JSON object"),
        ('{"timestamp": 0}\n{}\n', "line 2: timestamp None"),
        ('{"timestamp": 0}\n{"timestamp": NaN}\n', "line 2: timestamp 'NaN'"),
        ('{"timestamp": 0}\n{"timestamp": true}\n', "line 2: timestamp True"),
        ("TIMESTAMP\n2024-05-10 00:00:00\n", "holds 1 requests"),
        ("TIMESTAMP\n2024-05-10 00:00:00\nyesterday\n", "line 3: TIMESTAMP 'yesterday'"),
        ("TIMESTAMP\n2024-05-10 00:00:00\n\n\nyesterday\n", "line 5: TIMESTAMP 'yesterday'"),
        ("A,TIMESTAMP\n1,2024-05-10 00:00:00\n2\n", "line 3: TIMESTAMP None"),
        ("TIMESTAMP\n20240510\n20240511\n", "line 2: TIMESTAMP 20240510 is a number, but no epoch time"),
        ("TIMESTAMP\n0\n1\n", "line 2: TIMESTAMP 0 is a number, but no epoch time"),
        ("TIMESTAMP\n1e999999999\n1\n", "line 2: TIMESTAMP 1e999999999 is a number"),
        ("Timestamp\n0\n-1\n", "line 3: Timestamp -1 is a number"),
        ("Timestamp\n0\n1715472000\n", "spans 19855 days"),  # seconds from the start, then of the epoch
        ("TIMESTAMP\n2014-05-10 00:00:00\n2024-05-10 00:00:00\n", "spans 3653 days"),
        ("Timestamp\n7\n7\n7\n", "all 3 requests have the same time"),
        ("Timestamp,Request tokens\n0,5\n1,-5\n", "line 3: Request tokens must be a whole .* got '-5'"),
        ("Timestamp,Request tokens\n0,5\n1,nan\n", "line 3: Request tokens .* got 'nan'"),
        ("Timestamp,Request tokens\n0,5\n1,1.5\n", r"line 3: Request tokens .* got '1\.5'"),
        ("Timestamp,Response tokens\n0,5\n1\n", "line 3: Response tokens .* got None"),
        ("Timestamp,Request tokens\n0,5\n1,1,000\n", "line 3: more fields than the header names"),
    ],
)
def test_malformed_traces_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        read_request_trace(path).relative_rate()
    assert str(path) in str(caught.value)


def test_missing_and_binary_traces_are_refused(tmp_path: Path):
    for missing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(TraceError, match="no such trace"):
            read_request_trace(missing)
    path = tmp_path / "trace.csv"
    for content in (b"TIMESTAMP\n\xff\xfe\x00\n", "TIMESTAMP\n1\n".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"trace\.csv: not a CSV file or JSON lines in UTF-8"):
            read_request_trace(path)
