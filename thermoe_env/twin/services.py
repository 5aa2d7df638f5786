"""Which compiled service a problem is played with."""

from __future__ import annotations

from thermoe_env.errors import ScenarioError
from thermoe_env.problem.problem import Problem
from thermoe_env.twin.generate import generate_service
from thermoe_env.twin.score import score_service
from thermoe_env.twin.service import Service


def make_service(problem: Problem) -> Service:
    """The service that the problem's scenario describes."""
    return score_service(problem) if problem.scenario.generate is None else generate_service(problem)


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
