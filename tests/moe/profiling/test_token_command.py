"""How `python -m moe.profiling tokens` resumes, what it refuses, and what it says."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moe.lm.engine.engine import Engine
from moe.lm.text import DOMAINS, documents
from moe.lm.weights import identity, reference
from moe.profiles import ProfileError
from moe.profiling import tokens
from moe.profiling.cli import cli
from moe.profiling.token_cost import Place, measure_place
from moe.profiling.tokens import TokenOptions, measure
from moe.token_profile import Learned, TokenAdaptation, Visit, load_token_profile

H200 = Path(__file__).parents[3] / "configs/profiles/h200-generate.json"
CELLS = [Place(1, 0, 40, 4, 16), Place(2, 0, 40, 4, 16), Place(2, 0, 40, 4, 4), Place(2, 8, 40, 2, 16)]


def learned() -> TokenAdaptation:
    """Made up."""
    nothing = Learned(accuracy=0.0, confidence=0.0, entropy=0.0, loss=0.0)
    return TokenAdaptation(
        lesson_rows=512, margin=0.005, lesson_s=0.1, lesson_j=None,
        curve=dict.fromkeys(DOMAINS, ((0.0, 0.0), (2.0, -0.01))),
        changed={about: dict.fromkeys(DOMAINS, nothing) for about in DOMAINS},
        visits=((Visit(domain="c", lessons=3, loss=0.01, accuracy=0.0),),), provenance={},
    )  # fmt: skip


class Killed(Exception):
    pass


def shortened(patch: pytest.MonkeyPatch, folder: Path) -> TokenOptions:
    """The shipped model on few tokens and cells."""
    patch.setattr(tokens, "PLAN", {"cpu": {2: 1}})
    patch.setattr(tokens, "SCORED_TOKENS", {"cpu": 4})
    patch.setattr(tokens, "ENGINE", {"cpu": {"slots": 4, "max_rows": 64}})
    patch.setattr(tokens, "places", lambda engine, *, thorough: CELLS)
    patch.setattr(tokens, "_measure_adaptation", lambda *_: learned())  # a test of its own
    return TokenOptions(size="small", device="cpu", out=folder / "cpu-generate.json", window_s=0.001)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TokenOptions:
    return shortened(monkeypatch, tmp_path)


def partial_of(options: TokenOptions) -> Path:
    return options.out.with_suffix(".partial.json")


class Continued(NamedTuple):
    """A measurement that was killed and then ended."""

    out: Path
    measured: list[Place | str]
    """In order, and when it was killed."""
    kept: dict[str, Any]
    """What the kill left."""
    shown: str


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Continued:
    measured: list[Place | str] = []

    def measure_place_(engine: Engine, place: Place, *rest: Any) -> Any:
        if measured.count("quality") == 1 and len(measured) == 4:
            raise Killed
        measured.append(place)
        return measure_place(engine, place, *rest)

    def measure_quality_(*arguments: Any) -> Any:
        measured.append("quality")
        return measure_quality(*arguments)

    def measure_adaptation_(*arguments: Any) -> TokenAdaptation:
        measured.append("adaptation")
        return learned()

    measure_quality = tokens.measure_quality
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as shown:
        options = shortened(patch, tmp_path_factory.mktemp("continued"))
        patch.setattr(tokens, "_measure_adaptation", measure_adaptation_)
        patch.setattr("moe.profiling.token_cost.measure_place", measure_place_)
        patch.setattr(tokens, "measure_quality", measure_quality_)
        with pytest.raises(Killed):
            tokens.main(options)
        assert not options.out.exists()
        kept = json.loads(partial_of(options).read_text())
        measured.append("killed")
        tokens.main(options)
    assert not partial_of(options).exists()
    return Continued(options.out, measured, kept, shown.getvalue())


def test_an_interrupted_measurement_goes_on_and_measures_nothing_twice(continued: Continued) -> None:
    out, measured, kept, shown = continued
    assert len(kept["cells"]) == 2 and kept["quality"]["size"] == "small"
    assert sorted(map(str, measured)) == sorted(map(str, [*CELLS, "quality", "adaptation", "killed"]))
    profile = load_token_profile(out)
    times_s = {cell.step_s for cell in profile.cost.cells}
    assert {float(f"{cell['step_s']:.6g}") for cell in kept["cells"]} <= times_s
    assert {Place(*(getattr(cell, f) for f in Place._fields)) for cell in profile.cost.cells} == set(CELLS)
    assert profile.adaptation == learned()
    assert profile.quality.weights_sha256 == identity("small")["weights_sha256"]
    assert "accuracy by experts per token" in shown and f"wrote {out}" in shown
    assert "mJ" not in shown  # no meter on a CPU


def test_the_shipped_model_serves_its_reference(continued: Continued) -> None:
    quality = load_token_profile(continued.out).quality
    cell = next(cell for cell in quality.cells if (cell.top_k, cell.routing_bias) == (4, 0.0))
    assert cell.minus_standard == pytest.approx(0.0, abs=1 / 40)  # roundings turn single tokens
    assert tuple(cell.by_domain) == tuple(quality.standard) == DOMAINS
    assert np.mean(quality.standard["c"]) == pytest.approx(
        reference("small")[documents().domain == DOMAINS.index("c")].mean()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"window_s": 0.002, "thorough": True}, "another thorough, window_s"),
    ],
)
def test_what_another_run_kept_is_refused(quick: TokenOptions, change: dict[str, Any], message: str) -> None:
    keep(quick)
    with pytest.raises(ProfileError, match=message):
        measure(replace(quick, **change))


def keep(options: TokenOptions) -> dict[str, Any]:
    """What a run that measured no cell keeps."""
    kept = tokens._Kept(options, torch.device("cpu"))
    kept.save()
    return json.loads(partial_of(options).read_text())


def test_what_was_kept_of_other_weights_or_another_card_is_refused(quick: TokenOptions) -> None:
    for key in ("weights_sha256", "documents_sha256", "device", "torch"):
        document = keep(quick)
        document["run"][key] = "another"
        partial_of(quick).write_text(json.dumps(document))
        with pytest.raises(ProfileError, match=f"another {key}: .*delete the file"):
            measure(quick)
        partial_of(quick).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "",
        lambda d: "[]",
        lambda d: json.dumps(d)[:50],
        lambda d: json.dumps({**d, "run": None}),
        lambda d: json.dumps({**d, "cells": [{"decode_rows": 1}]}),
        lambda d: json.dumps({**d, "cells": 3}),
        lambda d: json.dumps({**d, "quality": "good"}),
        lambda d: json.dumps({**d, "adaptation": {"curve": 1}}),
        lambda d: json.dumps({key: value for key, value in d.items() if key != "idle_w"}),
    ],
)
def test_what_was_kept_and_is_damaged_is_refused_in_a_line(quick: TokenOptions, damage: Any) -> None:
    document = keep(quick)
    partial_of(quick).write_text(damage(document))
    with pytest.raises(ProfileError, match=r"damaged .*delete it") as refused:
        measure(quick)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("window_s", [0.0, -1.0, float("nan"), 61.0])
def test_a_window_that_measures_nothing_is_refused(window_s: float) -> None:
    with pytest.raises(ValueError, match="--window-s must lie in"):
        TokenOptions(size="small", device="cpu", out=Path("x.json"), window_s=window_s)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m moe.profiling", *map(str, arguments)])
    cli()


def test_json_has_the_documented_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, H200, "--json")
    shown = json.loads(capsys.readouterr().out)
    profile = load_token_profile(H200)
    assert shown.keys() == {
        "quality_by_k", "quality_by_bias", "energy_per_token_by_k", "energy_per_token_by_bias",
        "cost", "quality", "adaptation",
    }  # fmt: skip
    assert {name: shown[name] for name in ("cost", "quality", "adaptation")} == profile.digests()
    assert list(shown["quality_by_k"]) == ["1", "2", "4", "8"]
    assert list(shown["quality_by_bias"]["32"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    cell = next(
        c for c in profile.cost.cells
        if (c.decode_rows, c.prefill_rows, c.context, c.top_k, c.readable) == (32, 0, 300, 8, 16)
    )  # fmt: skip
    assert cell.energy_j is not None
    assert shown["energy_per_token_by_bias"]["32"]["1.0"] == cell.energy_j / 32
    assert shown["energy_per_token_by_k"]["8"]["2"] < shown["energy_per_token_by_k"]["8"]["8"]


def test_a_profile_is_shown_in_words_and_others_have_no_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(monkeypatch, H200)
    shown = capsys.readouterr().out
    assert "NVIDIA H200, base" in shown and "mJ per token by routing bias, 32 sequences: 0: 9.77" in shown
    with pytest.raises(SystemExit, match="--json is for profiles of tokens"):
        run(monkeypatch, H200.with_name("h100-vision.json"), "--json")
    with pytest.raises(SystemExit, match="is no profile"):
        run(monkeypatch, tmp_path / "absent.json")
    odd = tmp_path / "odd.json"
    odd.write_text('{"kind": "generate"}')
    with pytest.raises(SystemExit, match="cost: Field required"):
        run(monkeypatch, odd)


def test_a_card_that_is_not_there_and_a_place_that_cannot_be_written_are_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="IsADirectoryError"):
        run(monkeypatch, "tokens", "--size", "small", "--device", "cpu", "--out", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
            run(monkeypatch, "tokens", "--size", "small", "--device", "cuda", "--out", tmp_path / "x.json")
