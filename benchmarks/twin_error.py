"""How far the shipped twin is from the card: `python -m benchmarks.twin_error`.

Heat on traces that nobody fitted (benchmarks/traces), and on each fitted one by a fit to the others. Power
and throughput on the end of each trace whose loads are known, by their costs in its beginning. Writes
docs/twin_error.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from moe.errors import one_line_errors
from moe.files import read_json, refuse_unwritable
from thermoe_env.calibration.driver_info import driver_info_path, load_driver_info
from thermoe_env.calibration.power import fit_power
from thermoe_env.calibration.traces import (
    load_segments,
    load_trace,
    segments_path,
)
from thermoe_env.calibration.validation import HORIZONS_S, PowerErrors, validate_twin
from thermoe_env.configs import config_path, configs_dir
from thermoe_env.device.parameters import TwinParams, load_twin

HELD_OUT_FOLDER = Path(__file__).parent / "traces"
AIMS_C = (0.45, 0.75, 1.3, 1.6)
FITTED_SHARE = 0.6
"""Part of a trace, at its beginning, from which the costs of its loads are taken."""


def power_errors(path: Path, twin: TwinParams) -> PowerErrors:
    """Errors of power on the end of a trace, by the costs of loads in its beginning.

    Raises:
        TraceFormatError: the end holds loads that the beginning lacks, and nothing else.
    """
    intervals, segments = load_trace(path).intervals(), load_segments(segments_path(path))
    cut = round(FITTED_SHARE * len(intervals))
    cut_s = intervals.t_s[cut - 1]
    early = [segment for segment in segments if segment.t1 <= cut_s]
    info = load_driver_info(driver_info_path(path))
    values, _ = fit_power([intervals.until(cut)], [early], info)
    judged = dataclasses.replace(twin, **values)
    late = [segment for segment in segments if segment.t0 >= cut_s]
    errors = validate_twin(intervals.slice(cut, len(intervals)), judged, late).power
    assert errors is not None
    return errors


def main(twin: str = "h100", out: Path = Path("docs/twin_error.md")) -> None:
    """Measure and write.

    Args:
        twin: name in configs/twin or path.
        out: document to write.
    """
    refuse_unwritable(out)
    model = load_twin(config_path("twin", twin, ".yaml"))
    lines = [
        "# Error of the twin",
        "",
        f"Written by `python -m benchmarks.twin_error --twin {twin}`. Root mean square error of the die's",
        "temperature in °C after so many seconds, restarted every second in the observer's state and running",
        "freely on the true power; in brackets persistence (the temperature stays as it is). The card's own",
        "sensor shows whole degrees.",
        "",
        "| trace | card | day | fitted to | " + " | ".join(f"{h} s" for h in HORIZONS_S) + " |",
        "|---|---|---|---|" + "---|" * len(HORIZONS_S),
        "| aim | | | | " + " | ".join(f"{aim:g}" for aim in AIMS_C) + " |",
    ]
    for path in sorted(HELD_OUT_FOLDER.glob("*_telemetry.csv")):
        errors = dataclasses.asdict(validate_twin(load_trace(path).intervals(), model))
        lines.append(_row(path, "the traces below", errors))
    folder = configs_dir() / "traces"
    for held in model.provenance["held_out"]:
        lines.append(_row(folder / held["file"], held["fitted_to"], held))
    lines += [
        "",
        f"Power from the workload's own record alone: costs of the loads from the first {FITTED_SHARE:.0%}",
        "of the trace, errors on the rest, over windows of 5 s.",
        "",
        "| trace | seconds judged | power, mean absolute error | energy | tokens |",
        "|---|---|---|---|---|",
        "| aim | | 4% | 2% | 3% |",
    ]
    for source in model.provenance["traces"]:
        path = folder / source["file"]
        if segments_path(path).is_file():
            errors = power_errors(path, model)
            lines.append(
                f"| {path.name} | {errors.seconds} | {errors.power_mape:.1%} | {errors.energy_error:+.1%} | "
                f"{errors.throughput_error:+.1%} |"
            )
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\nwrote {out}")


def _row(path: Path, fitted_to: str, errors: dict) -> str:
    about = read_json(driver_info_path(path), "put a whole copy in its place", ("measured_on",))
    cells = []
    for h in map(str, HORIZONS_S):
        rmse, stays = errors["temp_rmse_c"][h], errors["persistence_rmse_c"][h]
        cells.append("-" if rmse is None else f"{rmse:.2f} ({stays:.1f})")
    card = about.get("card", "not noted")
    return f"| {path.name} | {card} | {about['measured_on']} | {fitted_to} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
