"""The study of control: its small form end to end, and its losses against a second copy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from studies import value_of_control as command
from studies import value_of_control_search as search
from studies.tasks import StudyError, read_result
from studies.value_of_control import Arguments
from thermoe_env.errors import ScenarioError
from thermoe_env.problem.scenario import load_scenario

KNOBS = ("routing_bias", "batch_size", "expert_count", "admission", "pace")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    arguments = Arguments(small=True, out=tmp_path_factory.mktemp("control"))
    command.main(arguments)
    return arguments


def test_the_document_says_what_each_knob_and_signal_is_worth(finished):
    document = json.loads(json.dumps(command.main(finished)))
    assert set(document) == {"rack"}
    own = document["rack"]
    assert tuple(own["held"]) == KNOBS and tuple(own["blind"]) == ("heat", "power", "queue")
    assert set(own["feasible"]) == {"static", "best_constant", "best_rule"}
    assert isinstance(own["passed"], bool)
    searches = finished.out / "searches"
    sighted, held = (
        read_result(searches / f"rack-{name}-0.json") for name in ("sighted", "held-expert_count")
    )
    lost = (np.array(sighted["returns"]) - held["returns"]) / np.mean(sighted["gross"])
    loss, low, high = own["held"]["expert_count"]
    assert (
        loss == pytest.approx(lost.mean()) and lost.min() - 1e-12 <= low <= loss <= high <= lost.max() + 1e-12
    )
    report = (finished.out / "report.md").read_text()
    assert "`expert_count` held" in report and "blind to power" in report and "Simulated" in report
    assert (finished.out / "losses.png").stat().st_size > 10_000


def test_searches_that_are_there_are_not_made_again(finished, monkeypatch):
    monkeypatch.setattr(search, "tune", lambda *_: pytest.fail("searched again"))
    before = (finished.out / "report.md").read_bytes()
    command.main(finished)
    assert (finished.out / "report.md").read_bytes() == before
    with pytest.raises(StudyError, match="made with other settings"):
        command.main(replace(finished, seed=6000))


def test_a_held_knob_is_held_and_a_hidden_signal_weighs_nothing(finished):
    held = np.array(read_result(finished.out / "searches" / "rack-held-pace-0.json")["weights"])
    assert np.all(held[KNOBS.index("pace"), 1:] == 0.0)


def test_calm_is_the_scenario_without_what_happens_to_it():
    for name in ("rack", "hot-aisle", "premium"):
        scenario = load_scenario(name)
        calm = search.calm_of(scenario)
        assert calm.inlet is None and calm.price is None and calm.power_budget.event_w == (700.0, 700.0)
        assert calm.generate is not None and calm.generate.strict is None
        assert calm.traffic == scenario.traffic and calm.reward == scenario.reward


def test_what_cannot_be_studied_is_refused(tmp_path):
    with pytest.raises(StudyError, match="price must be above 0, got 0"):
        Arguments(price=0.0)
    with pytest.raises(ScenarioError, match="no scenarios 'rak'"):
        command.main(Arguments(small=True, scenarios=("rak",), out=tmp_path))
    with pytest.raises(StudyError, match="lacks"):
        command.main(Arguments(small=True, report_only=True, out=tmp_path))
