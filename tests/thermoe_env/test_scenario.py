"""Scenarios that are based on others, and copies of scenarios that load from anywhere."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from agents.files import plain
from thermoe_env.configs import configs_dir, merged
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import DeviceConfig, Scenario, load_scenario

DIFFERENCES = {
    "restless": {"traffic": {"shift_dwell_s": 8.0}},
    "language": {
        "task": "language", "profile": "h100-language", "static": {"batch_size": 256},
        "knobs": ("routing_bias", "batch_size", "expert_count"), "traffic": {"shifts": (0, 1)},
    },
    "two-devices": {
        "devices": tuple(
            asdict(DeviceConfig(inlet_offset_c=offset_c, experts=tuple(range(first, first + 8))))
            for offset_c, first in ((0.0, 0), (6.0, 8))
        ),
        "limits": {"temperature_c": 63.0}, "power_budget": {"normal_w": 1000.0, "event_w": (355.0, 465.0)},
    },
}  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    """Write scenario files; returns the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_shipped_scenario_differs_from_the_default_in_what_it_states(name: str) -> None:
    expected = merged(asdict(load_scenario("vision")), {"name": name, **DIFFERENCES[name]})
    assert asdict(load_scenario(name)) == expected


def test_the_default_scenario_states_every_key_but_those_of_several_devices() -> None:
    raw = yaml.safe_load((configs_dir() / "scenarios" / "default.yaml").read_text())
    assert {field.name for field in fields(Scenario)} - set(raw) == {"devices", "exchange"}


def test_bases_of_bases_merge_and_lists_replace(tmp_path: Path) -> None:
    top = write(
        tmp_path,
        top="name: top\nbase: middle.yaml\ntraffic: {shifts: [1]}\n",
        middle="name: middle\nbase: vision\ntraffic: {low_load: 0.1, shifts: [0, 2]}\nepisode_s: 60\n",
    )
    found, default = load_scenario(top), load_scenario("vision")
    assert (found.name, found.episode_s) == ("top", 60)
    assert (found.traffic.low_load, found.traffic.shifts) == (0.1, (1,))
    assert found.traffic.high_load == default.traffic.high_load and found.limits == default.limits


def test_a_base_begins_in_the_folder_of_the_file_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, low="name: low\nbase: vision\nepisode_s: 30\n")
    top = write(tmp_path / "sub", top="name: top\nbase: ../low.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_scenario(top).episode_s == load_scenario("../sub/top.yaml").episode_s == 30


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("base: defualt", r"a\.yaml: base: no scenarios 'defualt' in .*give one of \['default'"),
        ("base: [default]", r"a\.yaml: base must be the name or the path of one scenario, got \['default'\]"),
        ("base: a.yaml", r"a\.yaml: base 'a\.yaml' leads in a circle \(.*a\.yaml -> .*a\.yaml\): leave"),
        ("base: b.yaml", r"b\.yaml: base 'a\.yaml' leads in a circle \(.*a.* -> .*b.* -> .*a\.yaml\)"),
        ("base: vision\nepsiode_s: 9", r"a\.yaml: epsiode_s: is not known; .*'base', .*'episode_s'"),
        ("base: vision\ntraffic: {lowload: 1}", r"a\.yaml: traffic\.lowload: is not known.*'low_load'"),
        ("base: typo.yaml", r"typo\.yaml: limits\.temprature_c: is not known; .*'temperature_c'"),
        ("base: typo.yaml\nlimits: {temprature_c: 3}", r"a\.yaml: limits\.temprature_c: is not known"),
        ("base: vision\nprofile: no.json", r"a\.yaml: profile: no profiles 'no\.json' in "),
        ("base: vision\nbase: restless", r"a\.yaml, line 3: key 'base' is given twice"),
    ],
)
def test_a_wrong_base_or_key_is_named_with_its_file(tmp_path: Path, keys: str, message: str) -> None:
    path = write(
        tmp_path,
        a=f"name: a\n{keys}\n",
        b="name: b\nbase: a.yaml\n",
        typo="name: typo\nbase: vision\nlimits: {temprature_c: 60}\n",
    )
    with pytest.raises(ScenarioError, match=message) as refusal:
        load_scenario(path)
    assert "\n" not in str(refusal.value)


def test_a_scenario_has_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"mine\.yaml: name: is missing"):
        load_scenario(write(tmp_path, mine="base: vision\nepisode_s: 30\n"))


def test_what_overrides_state_is_told_from_what_the_file_states() -> None:
    with pytest.raises(ScenarioError, match=r"overrides of .*vision\.yaml: traffic\.lod: is not known"):
        load_scenario("vision", traffic={"lod": 1.0})
    with pytest.raises(ScenarioError, match=r"overrides of .*vision\.yaml: base: is not known"):
        load_scenario("vision", base="restless")


def test_files_begin_in_the_scenario_s_folder_and_a_copy_loads_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(configs_dir() / "profiles" / "h100-vision.json", tmp_path / "mine.json")
    shutil.copy(configs_dir() / "twin" / "h100.yaml", tmp_path / "card.yaml")
    shutil.copy(configs_dir() / "traces" / "requests" / "azure-conv-2023.csv", tmp_path / "mine.csv")
    files = "profile: mine.json\ntwin: card.yaml\ntraffic: {kind: trace, trace: mine.csv}\n"
    named = load_scenario(write(tmp_path, mine=f"name: mine\nbase: vision\n{files}"))
    copy = tmp_path / "run" / "scenario.yaml"
    copy.parent.mkdir()
    copy.write_text(yaml.safe_dump(plain(asdict(named))))
    monkeypatch.chdir(tmp_path / "run")
    again = load_scenario("scenario.yaml")
    assert again == named and again.profile == str(tmp_path / "mine.json")
    assert again.traffic.trace == str(tmp_path / "mine.csv")
    assert Problem.of(again).capacity_rps == Problem.of(load_scenario("vision")).capacity_rps


def test_overrides_begin_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(configs_dir() / "twin" / "h100.yaml", tmp_path / "card.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_scenario("vision", twin="card.yaml").twin == str(tmp_path / "card.yaml")
    assert load_scenario("vision", twin=str(configs_dir() / "twin" / "h100.yaml")).twin == "h100"


def test_a_knob_of_which_the_profile_has_one_level_is_named() -> None:
    with pytest.raises(ScenarioError, match=r"controls \['ttt_steps'\], of which profile 'h100-language'"):
        Problem.of(load_scenario("language", knobs=["batch_size", "ttt_steps"]))
