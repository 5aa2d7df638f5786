"""The one loader of configuration: what it refuses, and what it says."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from agents.learning.config import load_train_config
from agents.policies.gates import GateConfig
from thermoe_env.configs import config_path, configs_dir, load_settings, merged, read_yaml, validated
from thermoe_env.device.parameters import load_twin
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.scenario import load_scenario

BAD_FILES = {
    "a key twice": (
        b"seed: 1\nn: 2\nseed: 3\n",
        r"line 3: key 'seed' is given twice, first in line 1",
    ),
    "twice on a line": (b"a: {b: 1, b: 1}\n", r"line 1: key 'b' is given twice"),
    "twice in a list": (b"a:\n- b: 1\n  'b': 2\n", r"line 3: key 'b' is given twice, first in line 2"),
    "a list": (b"- a\n- b\n", r"must be a mapping of keys \(`key: value`\), got list"),
    "nothing": (b"", r"must be a mapping .* got nothing"),
    "no YAML": (b"a: 1\nb: [1, 2\n", r"line 3: not YAML \(.*flow sequence"),
    "a tab": (b"a:\n\tb: 1\n", r"line 2: not YAML"),
    "two documents": (b"a: 1\n---\na: 2\n", r"not YAML"),
    "control characters": (b"a: \x01\n", r"not YAML \(.*special characters"),
    "no such day": (b"a: 2026-02-31\n", r"not YAML \(day"),
    "too deep": (b"a: " + b"[" * 5000, r"not YAML"),
    "an object": (
        b"a: !!python/object:os.system {}\n",
        r"line 1: not YAML \(could not determine",
    ),
    "not UTF-8": ("a: 20 °C\n".encode("latin-1"), r"not UTF-8 text \(.*save it as UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ScenarioError, match=message) as refusal:
        read_yaml(path)
    assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(ScenarioError, match=f"{path}: cannot be read .{message}"):
            read_yaml(path)
    secret = tmp_path / "secret.yaml"
    secret.write_text("a: 1")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(ScenarioError, match=r"secret\.yaml: cannot be read .Permission"):
            read_yaml(secret)


def test_what_is_written_plainly_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffa: &x {b: 1, c: °C}\nd: {<<: *x, b: 2}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"b": 1, "c": "°C"}, "d": {"b": 2, "c": "°C"}}
    for shipped in sorted(configs_dir().rglob("*.yaml")):
        assert read_yaml(shipped) == yaml.safe_load(shipped.read_text())


@pytest.mark.parametrize(
    "load",
    [
        load_scenario,
        load_twin,
        lambda path: load_train_config(path),
        lambda path: load_settings(GateConfig, "agents", path),
    ],
)
def test_every_kind_of_configuration_goes_through_it(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ScenarioError, match=r"mine\.yaml, line 2: key 'seed' is given twice"):
        load(path)


@dataclass(frozen=True)
class Leaf:
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    watts: float = 1.0


@dataclass(frozen=True)
class Tree:
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    leaf: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)
    pair: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"nme": 1},
            r"nme: is not known; known keys: \['also', 'by_name', 'leaf', 'leaves',",
        ),
        ({"leaf": {"wats": 1}}, r"leaf\.wats: is not known; known keys: \['watts'\]"),
        ({"leaves": [{}, {"wats": 1}]}, r"leaves\.1\.wats: is not known; known keys: \['watts'\]"),
        ({"by_name": {"a": {"wats": 1}}}, r"by_name\.a\.wats: is not known; known keys: \['watts'\]"),
        ({"leaf": {"watts": "hot"}}, r"leaf\.watts: .*valid number.*, got 'hot'"),
        ({"pair": [1, 2, 3]}, r"pair: .*at most 2 items"),
        ({"pair": [1, "b"]}, r"pair\.1: .*number.* got 'b'"),
        ({"leaf": 3}, r"leaf: .*, got 3"),
        ({1: 2}, r"1: .*"),
    ],
)
def test_what_is_wrong_is_named_with_the_keys_of_its_section(keys: dict[Any, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message) as refusal:
        validated(Tree, {"name": "x", **keys}, "mine.yaml", also=["also"])
    assert str(refusal.value).startswith("mine.yaml: ") and "\n" not in str(refusal.value)


def test_each_error_has_a_line() -> None:
    with pytest.raises(ScenarioError) as refusal:
        validated(Tree, {"nme": "x", "leaf": {"watts": None}}, "mine.yaml")
    lines = sorted(str(refusal.value).splitlines())
    assert [line.split(": ")[:2] for line in lines] == [
        ["mine.yaml", "leaf.watts"], ["mine.yaml", "name"], ["mine.yaml", "nme"]
    ]  # fmt: skip
    assert "is missing; known keys" in lines[1]


def test_a_shipped_name_goes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("default", "mine.yaml"):
        Path(name).write_text("a: 1")
    assert config_path("scenarios", "default", ".yaml") == configs_dir() / "scenarios" / "default.yaml"
    assert config_path("scenarios", "mine.yaml", ".yaml") == Path("mine.yaml")
    with pytest.raises(ScenarioError, match=r"no scenarios 'mine': give one of \['default',.*the path"):
        config_path("scenarios", "mine", ".yaml")


def test_mappings_merge_and_all_else_is_replaced() -> None:
    base = {"a": {"b": 1, "c": {"d": 1}}, "e": [1, 2], "f": {"g": 1}}
    over = {"a": {"c": {"x": 2}}, "e": [3], "f": None, "h": {}}
    assert merged(base, over) == {"a": {"b": 1, "c": {"d": 1, "x": 2}}, "e": [3], "f": None, "h": {}}
    assert base["a"] == {"b": 1, "c": {"d": 1}}
