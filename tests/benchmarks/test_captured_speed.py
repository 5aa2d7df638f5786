"""The comparison of captured with launched batches runs, and counts what it says."""

import json

from benchmarks.captured_speed import FORMS, TIMES, Options, main


def test_every_size_and_count_of_experts_is_timed_in_both_forms(tmp_path, capsys):
    out = tmp_path / "captured.json"
    main(
        Options(
            size="tiny", device="cpu", batch_sizes=(1, 5), expert_counts=(1, 4), rounds=2, batches=3,
            sleep_s=1e-4, out=out,
        )
    )  # fmt: skip
    record = json.loads(out.read_text())
    assert [(row["expert_count"], row["batch_size"]) for row in record["rows"]] == [
        (1, 1),
        (1, 5),
        (4, 1),
        (4, 5),
    ]
    assert record["graph_memory_bytes"] == 0  # a CPU has none
    for row in record["rows"]:
        for name in (f"{form}_{time}" for form in FORMS for time in TIMES):
            median, most = row[name]
            assert 0.0 < median <= most
        # On a CPU a launch returns when the batch is done.
        assert row["launched_call_ms"][0] >= row["launched_device_ms"][0] * 0.5
    assert json.dumps(record) in capsys.readouterr().out
