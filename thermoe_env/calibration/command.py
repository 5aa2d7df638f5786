"""From a card to its twin: `python -m thermoe_env.calibration record | fit | validate`."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

from moe.errors import one_line_errors
from moe.files import refuse_unwritable
from thermoe_env.calibration.driver_info import driver_info_path, load_driver_info
from thermoe_env.calibration.excitation import schedule
from thermoe_env.calibration.fit import fit_twin
from thermoe_env.calibration.traces import (
    SEGMENT_COLUMNS,
    load_segments,
    load_trace,
    refuse_foreign_temperature,
    segments_path,
)
from thermoe_env.calibration.validation import HORIZONS_S, Validation, validate_twin
from thermoe_env.configs import config_path
from thermoe_env.device.free_run import THERMAL
from thermoe_env.device.observer import NOISE
from thermoe_env.device.parameters import load_twin, save_twin
from thermoe_env.errors import GpuUnavailableError, TraceFormatError

BEFORE_CONTEXT_S = 8.0
"""Recorded before the CUDA context opens: the card at its lowest clock."""


def record(
    out: Path = Path("runs/gpu_telemetry.csv"),
    seconds: float = 480.0,
    seed: int = 0,
    device_index: int = 0,
    load: bool = True,
) -> None:
    """Record a telemetry trace of a GPU while a designed load takes it through its range.

    The process must be the card's only one. Interrupted, it keeps what was recorded.

    Args:
        out: the trace, X_telemetry.csv; what ran goes beside it into X_segments.csv, what the driver says of
            the card into X_nvml_info.json.
        seconds: length of the load; at least 240.
        seed: draws the load's random part.
        device_index: number of the GPU as CUDA counts it.
        load: run the load; with --no-load only listen, while a load of your own runs.
    """
    from moe.device.nvml import visible_uuid
    from thermoe_env.calibration.recorder import Recorder

    uuid = visible_uuid(device_index)
    levels = list(schedule(seconds, seed)) if load else []
    with Recorder(out, uuid) as recorder, tqdm(total=round(seconds), unit="s") as bar:
        if not load:
            while recorder.now_s < seconds:
                recorder.check()
                time.sleep(min(1.0, max(0.0, seconds - recorder.now_s)))
                bar.update(min(1, bar.total - bar.n))
            print(f"{out} and {driver_info_path(out)}")
            return
        time.sleep(BEFORE_CONTEXT_S)
        import torch

        from moe.device.torch_device import uuid_of
        from moe.profiling.load import LOAD_NAME, LoadStack

        device = torch.device("cuda", device_index)
        if uuid_of(device) != uuid:
            raise GpuUnavailableError(
                f"the recorder reads {uuid}, but the load would run on {uuid_of(device)}: set "
                "CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the card's UUID in CUDA_VISIBLE_DEVICES"
            )
        stack = LoadStack(device)
        stack.warm_up({(level.tokens, level.top_k) for level in levels if level.tokens})
        with segments_path(out).open("w", newline="", buffering=1, encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(SEGMENT_COLUMNS)
            for level in levels:
                recorder.check()
                begin_s = recorder.now_s
                work = stack.run(level.tokens, level.top_k, level.duty, level.seconds)
                times = [round(begin_s, 4), round(recorder.now_s, 4)]
                latency_ms = round(work.mean_latency_s * 1e3, 4)
                name = LOAD_NAME if level.tokens else ""
                writer.writerow(
                    [level.phase, *times, level.top_k, level.tokens, level.duty, work.steps, latency_ms, name]
                )
                bar.update(min(round(times[1] - times[0]), bar.total - bar.n))
    print(f"{out}, {segments_path(out)} and {driver_info_path(out)}")


def fit(
    traces: Positional[tuple[Path, ...]],
    out: Path = Path("runs/twin.yaml"),
    segments: tuple[Path, ...] = (),
    nvml_info: Path | None = None,
    judge: bool = True,
) -> None:
    """Fit a twin to traces of one kind of card.

    Each trace is judged by a fit to the others; a single one by a fit to its beginning.

    Args:
        traces: telemetry CSV files.
        out: the twin to write; in configs/twin its name becomes one for scenarios.
        segments: what ran, one file per trace in the same order; without it X_segments.csv beside each
            X_telemetry.csv, where there is one.
        nvml_info: what the driver said of the card; without it X_nvml_info.json beside the first
            X_telemetry.csv.
        judge: fit and judge again without each trace; --no-judge saves that time.
    """
    if not traces:
        raise TraceFormatError("name at least one trace")
    refuse_unwritable(out)
    if segments and len(segments) != len(traces):
        raise TraceFormatError(f"{len(traces)} traces need as many files of segments, got {len(segments)}")
    info = load_driver_info(nvml_info or driver_info_path(traces[0]))
    for path in traces[1:]:
        if other := _another_card(path, info.name):
            _warn(other)
    beside = [path if path.is_file() else None for path in map(segments_path, traces)]
    loads = [None if path is None else load_segments(path) for path in (segments or beside)]
    twin = fit_twin([load_trace(path) for path in traces], info, loads, judge)
    save_twin(twin, out)
    for name in ("idle_power_w", "leakage_per_c", "power_cap_w", *THERMAL, *NOISE):
        print(f"{name:20} {getattr(twin, name):10.5g}")
    if "mem_temp_c" in twin.provenance["missing"]:
        print(
            "No memory temperature in these traces: the memory's parameters are typical values, not fitted."
        )
    if "left_to_the_prior" in twin.provenance:
        print(f"Hardly determined by these traces: {', '.join(twin.provenance['left_to_the_prior'])}.")
    for part in twin.provenance["held_out"]:
        print(f"\n{part['file']}, by a fit to {part['fitted_to']}:")
        _print_errors(part)
    print(f"\nTwin of all: {out}")


def validate(
    trace: Positional[Path],
    twin: str = "h100",
    segments: Path | None = None,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Error of a twin on a trace that nobody fitted.

    Args:
        trace: a telemetry CSV file.
        twin: file in configs/twin (without .yaml) or a path.
        segments: what ran, for the errors of power and throughput.
        as_json: print one JSON document instead of a table.
    """
    recorded, model = load_trace(trace), load_twin(config_path("twin", twin, ".yaml"))
    intervals = recorded.intervals()
    refuse_foreign_temperature(recorded.path, intervals)
    if other := _another_card(trace, model.gpu):
        _warn(f"{other}: fit one to the card (calibrate record, fit)")
    loads = None if segments is None else load_segments(segments)
    errors = dataclasses.asdict(validate_twin(intervals, model, loads))
    fitted = recorded.sha256 in {part.get("sha256") for part in model.provenance.get("traces", [])}
    if as_json:
        errors |= {f"throttle_{name}": value for name, value in errors.pop("throttle").items()}
        errors |= errors.pop("power") or {"power_mape": None}
        print(json.dumps({"twin": model.gpu, "trace_was_fitted": fitted, **errors}, indent=1))
        return
    _print_errors(errors)
    if fitted:
        print("The twin was fitted to this very trace: these are not errors on unseen data.")


def _another_card(trace: Path, gpu: str) -> str | None:
    """Says so where what the driver said beside a trace names another card than `gpu`."""
    info = driver_info_path(trace)
    if not info.is_file() or (name := load_driver_info(info).name) == gpu:
        return None
    return f"{trace} is of a {name}, the twin of a {gpu}"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_errors(errors: dict[str, Any]) -> None:
    """A `Validation` as a table."""
    print(f"{'horizon in s':26}" + "".join(f"{h:>9}" for h in HORIZONS_S))
    for field in dataclasses.fields(Validation):
        cells = errors[field.name]
        if field.name in ("throttle", "power"):
            continue
        shown = ("-" if v is None else f"{v:d}" if isinstance(v, int) else f"{v:.2f}" for v in cells.values())
        print(f"{field.name:26}" + "".join(f"{cell:>9}" for cell in shown))
    for name, value in {**errors["throttle"], **(errors["power"] or {})}.items():
        shown = "-" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{name:26}{shown:>9}")


def main() -> None:
    """Run the command line."""
    commands = {"record": record, "fit": fit, "validate": validate}
    with one_line_errors(interrupted="interrupted; what was recorded is kept"):
        tyro.extras.subcommand_cli_from_dict(commands, prog=Path(sys.argv[0]).name)
