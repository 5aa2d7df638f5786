"""Which compiled service a problem is played with."""

from __future__ import annotations

from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.score import score_service
from thermoe_env.twin.service import Service


def make_service(problem: Problem) -> Service:
    """The service that the problem's scenario describes.

    Raises:
        ScenarioError: a service of tokens, which has no compiled form.
    """
    if problem.scenario.generate is not None:
        raise ScenarioError(
            f"scenario {problem.scenario.name!r} serves tokens, which the twin does not play: make "
            "ThermalMoELive-v0"
        )
    return score_service(problem)


def service_of(problem: Problem) -> Service:
    """The problem's service, which reads every knob that the problem controls.

    Raises:
        ScenarioError: it does not, and the knob would do nothing.
    """
    service = make_service(problem)
    unread = [name for name in problem.knobs.controlled if name not in service.knobs]
    if unread:
        raise ScenarioError(
            f"scenario {problem.scenario.name!r} controls {unread}, but its service reads only "
            f"{list(service.knobs)}: take the others out of `knobs`"
        )
    return service
