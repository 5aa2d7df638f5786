"""Lengths of requests: how a trace's tokens are brought down to a context, and what is refused."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from moe.service.generate.lengths import row_of, token_lengths
from moe.service.request_trace import TraceError

TRACES = Path(__file__).parents[4] / "configs/traces/requests"


def write(path: Path, rows: list[tuple[int, int]]) -> Path:
    lines = [f"2024-05-12 00:00:{n / 10:05.2f},{prompt},{output}" for n, (prompt, output) in enumerate(rows)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


@pytest.mark.parametrize(("name", "rows"), [("azure-conv-2023", 19_366), ("azure-code-2023", 8_819)])
def test_the_azure_traces_are_whole_and_99_of_100_requests_fit(name: str, rows: int) -> None:
    path = TRACES / f"{name}.csv"
    with path.open(newline="") as file:
        asked = np.array([(int(r["ContextTokens"]), int(r["GeneratedTokens"])) for r in csv.DictReader(file)])
    assert len(asked) == rows and b"\r" not in path.read_bytes()
    served = token_lengths(path, 1024)
    assert len(served.prompt) == len(served.output) == rows and served.without_output == 0
    assert served.prompt.min() >= 1 and served.output.min() >= 1
    assert (served.prompt + served.output).max() == 1024
    # One factor for all: what was not cut is the trace's own number times it.
    whole = np.maximum(1, np.rint(asked * served.factor)).astype(int)
    fits = whole.sum(axis=1) <= 1024
    assert served.truncated == np.count_nonzero(~fits) and 0.98 < fits.mean() < 0.995
    assert np.array_equal(np.stack([served.prompt, served.output], axis=1)[fits], whole[fits])
    assert served.factor == pytest.approx(1024 / np.quantile(asked.sum(axis=1), 0.99))


def test_short_requests_keep_their_lengths_and_a_single_long_prompt_is_cut_and_counted(
    tmp_path: Path,
) -> None:
    rows = [(10, 5)] * 400 + [(5000, 7)]
    served = token_lengths(write(tmp_path / "t.csv", rows), 64)
    assert served.factor == 1.0 and served.truncated == 1
    assert served.prompt[:400].tolist() == [10] * 400 and served.output[:400].tolist() == [5] * 400
    assert (served.prompt[400], served.output[400]) == (57, 7)


def test_an_output_longer_than_the_context_leaves_room_for_a_prompt(tmp_path: Path) -> None:
    served = token_lengths(write(tmp_path / "t.csv", [(10, 5)] * 400 + [(20, 9000)]), 64)
    assert (served.prompt[400], served.output[400], served.truncated) == (1, 63, 1)


def test_requests_without_output_are_left_out_and_counted(tmp_path: Path) -> None:
    served = token_lengths(write(tmp_path / "t.csv", [(10, 5), (11, 0), (12, 6), (0, 7), (13, 0)]), 64)
    assert served.without_output == 2
    assert served.prompt.tolist() == [10, 12, 1] and served.output.tolist() == [5, 6, 7]
    with pytest.raises(TraceError, match="no request asks for output tokens"):
        token_lengths(write(tmp_path / "none.csv", [(10, 0), (11, 0)]), 64)


def test_a_trace_without_token_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("TIMESTAMP\n2024-05-12 00:00:00\n2024-05-12 00:00:01\n")
    with pytest.raises(TraceError, match="no columns of prompt and output tokens"):
        token_lengths(path, 64)
    path.write_text("TIMESTAMP,ContextTokens\n2024-05-12 00:00:00,5\n2024-05-12 00:00:01,5\n")
    with pytest.raises(TraceError, match="no columns of prompt and output tokens"):
        token_lengths(path, 64)
    with pytest.raises(TraceError, match="no such trace"):
        token_lengths(tmp_path / "absent.csv", 64)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [(10, 5)] * 3)
    assert token_lengths(path, 64) is token_lengths(path, 64)
    before = token_lengths(path, 64)
    write(path, [(20, 5)] * 3)
    os.utime(path, ns=(1, 1))
    assert before.prompt.tolist() == [10] * 3 and token_lengths(path, 64).prompt.tolist() == [20] * 3


def test_the_seed_says_which_row_a_request_has_and_classes_differ() -> None:
    draws = {
        (seed, c): [int(row_of(np.uint64(seed), c, number, 1000)) for number in range(2000)]
        for seed in (1, 2) for c in (0, 1)
    }  # fmt: skip
    assert draws[1, 0] == [int(row_of(np.uint64(1), 0, number, 1000)) for number in range(2000)]
    assert len({tuple(rows) for rows in draws.values()}) == 4
    for rows in draws.values():
        assert min(rows) >= 0 and max(rows) < 1000
        assert np.mean(rows) == pytest.approx(499.5, abs=35)  # five standard errors
