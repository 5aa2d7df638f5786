"""What corruptions cost the shipped model."""

import pytest
import torch

from moe.data import datasets as data
from moe.data.corruptions import KINDS
from moe.training import robustness
from moe.training.robustness import Arguments, accuracy_by_kind
from moe.training.weights import load_model


@pytest.fixture
def part(monkeypatch):
    """Part of the shipped test images, whatever else is installed."""
    images, labels = data.load_vision("test", full=False)
    monkeypatch.setattr(data, "load_vision", lambda split, full=None: (images[:500], labels[:500]))
    return images[:500], labels[:500]


def test_every_kind_costs_the_shipped_model_accuracy_at_severity_5(part):
    model = load_model("vision", "tiny", "cpu")
    accuracy = accuracy_by_kind(model, 5)
    clean = accuracy.pop("clean")
    assert clean == (model(part[0]).predictions == part[1]).sum().item() / 500
    assert tuple(accuracy) == KINDS and len(KINDS) >= 12
    lost = {kind: clean - value for kind, value in accuracy.items()}
    assert sum(lost.values()) / len(lost) > 0.4
    assert min(lost.values()) > 0.15, lost


def test_the_command_prints_the_mean_of_its_rows(monkeypatch, capsys):
    values = {kind: number / 100 for number, kind in enumerate(KINDS, 1)}
    monkeypatch.setattr(robustness, "accuracy_by_kind", lambda model, severity: {"clean": 0.9, **values})
    robustness.main(Arguments(device="cpu"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [*KINDS, "mean"]
    assert all(float(row[1]) + float(row[2]) == pytest.approx(90) for row in rows)
    assert float(rows[-1][1]) == pytest.approx((1 + len(KINDS)) / 2)


def test_a_model_for_text_is_refused():
    with pytest.raises(ValueError, match="vision"):
        accuracy_by_kind(load_model("language", "tiny", torch.device("cpu")), 5)
