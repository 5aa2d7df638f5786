"""From traces to a twin: `python -m thermoe_env.calibrate record | fit | validate`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm
from tyro.conf import Positional, arg

from thermoe_env.calibration import load_twin, save_twin
from thermoe_env.errors import ScenarioError, ThermoeError, TraceFormatError
from thermoe_env.fitting import fit_twin
from thermoe_env.free_run import THERMAL, Validation, validate_twin
from thermoe_env.scenario import config_path
from thermoe_env.traces import driver_info_path, load_driver_info, load_trace


def record(out: Path = Path("runs/gpu_telemetry.csv"), seconds: float = 300.0, device_index: int = 0) -> None:
    """Record a telemetry trace of a GPU while something else loads it.

    A fit needs steps between idle and full load, each held for a minute or more, and a CUDA context that
    stays open while the card idles.

    Args:
        out: the trace; what the driver says of the card goes beside it, into X_nvml_info.json.
        seconds: length of the trace.
        device_index: number of the GPU as CUDA counts it.
    """
    from thermoe_env.recorder import Recorder

    with Recorder(out, device_index) as recorder, tqdm(total=round(seconds), unit="s") as bar:
        while recorder.now_s < seconds:
            recorder.check()
            time.sleep(min(1.0, max(0.0, seconds - recorder.now_s)))
            bar.update(min(1, bar.total - bar.n))
    print(f"{out} and {driver_info_path(out)}")


def fit(
    traces: Positional[tuple[Path, ...]],
    out: Path = Path("runs/twin.yaml"),
    nvml_info: Path | None = None,
) -> None:
    """Fit a twin to traces of one card; the end of each trace judges a fit to its beginning.

    Args:
        traces: telemetry CSV files.
        out: the twin to write; in configs/twin its name becomes one for scenarios.
        nvml_info: what the driver said of the card; without it X_nvml_info.json beside the first
            X_telemetry.csv.
    """
    if not traces:
        raise TraceFormatError("name at least one trace")
    info = load_driver_info(nvml_info or driver_info_path(traces[0]))
    twin = fit_twin([load_trace(path) for path in traces], info)
    save_twin(twin, out)
    for name in ("idle_power_w", "leakage_per_c", "power_cap_w", *THERMAL, "inlet_drift_c"):
        print(f"{name:20} {getattr(twin, name):10.5g}")
    if "at_bound" in twin.provenance:
        print(
            f"Not identified, held at a bound: {', '.join(twin.provenance['at_bound'])}. Record longer steps."
        )
    for part in twin.provenance["held_out"]:
        print(f"\nFitted to {part['file']} before {part['fitted_before_s']} s, error after it:")
        _print_errors(Validation(**{f.name: part[f.name] for f in dataclasses.fields(Validation)}))
    print(f"\nTwin of the whole: {out}")


def validate(
    trace: Positional[Path],
    twin: str,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Error of a twin on a trace that nobody fitted.

    Args:
        trace: a telemetry CSV file.
        twin: file in configs/twin (without .yaml) or a path.
        as_json: print JSON instead of a table.
    """
    recorded, model = load_trace(trace), load_twin(config_path("twin", twin, ".yaml"))
    errors = validate_twin(recorded.intervals(), model)
    fitted = recorded.sha256 in {part.get("sha256") for part in model.provenance.get("traces", [])}
    if as_json:
        print(json.dumps({"trace_was_fitted": fitted, **dataclasses.asdict(errors)}, indent=1))
    else:
        _print_errors(errors)
        if fitted:
            print("The twin was fitted to this very trace: these are not errors on unseen data.")


def _print_errors(errors: Validation) -> None:
    table = dataclasses.asdict(errors)
    print(f"{'horizon in s':26}" + "".join(f"{h:>9}" for h in errors.restarts))
    for name, cells in table.items():
        shown = ("-" if v is None else f"{v:d}" if isinstance(v, int) else f"{v:.2f}" for v in cells.values())
        print(f"{name:26}" + "".join(f"{cell:>9}" for cell in shown))


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"record": record, "fit": fit, "validate": validate}, prog="python -m thermoe_env.calibrate"
        )
    except (ScenarioError, TraceFormatError, ThermoeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
