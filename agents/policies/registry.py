"""The shipped policies by name."""

from __future__ import annotations

from collections.abc import Callable

from agents.policies.gates import GATES, Gated, load_gate_config
from agents.policies.policy import ConstantPolicy, Policy, RandomPolicy
from agents.policies.throttles import THROTTLES, Throttle, ThrottleConfig
from thermoe_env.configs import load_settings
from thermoe_env.problem.problem import Problem


def _static(problem: Problem) -> Policy:
    return ConstantPolicy(problem.knobs.action())


def _best_constant(problem: Problem) -> Policy:
    from agents.policies.search import best_constant

    return ConstantPolicy(best_constant(problem))


def _rule_based(problem: Problem) -> Policy:
    from agents.policies.rules import RuleBased, load_rule_config

    return RuleBased(problem, load_rule_config())


def _random(problem: Problem) -> Policy:
    return RandomPolicy(problem.knobs.nvec)


def _gated(rule: str) -> Callable[[Problem], Policy]:
    def make(problem: Problem) -> Policy:
        config = load_gate_config()
        return Gated(problem, POLICIES[config.base_of(rule)](problem), rule, config)

    return make


def _greedy(problem: Problem) -> Policy:
    from agents.policies.greedy import Greedy, GreedyConfig

    return Greedy(problem, load_settings(GreedyConfig, "agents", "greedy"))


def _mpc(problem: Problem) -> Policy:
    from agents.policies.belief import MpcConfig
    from agents.policies.mpc import Mpc

    return Mpc(problem, load_settings(MpcConfig, "agents", "mpc"))


def _oracle(problem: Problem) -> Policy:
    from agents.policies.planner import Oracle, PlanConfig

    return Oracle(problem, load_settings(PlanConfig, "agents", "oracle"))


def _linear(problem: Problem) -> Policy:
    from agents.policies.linear import load_linear

    return load_linear(problem)


def _throttle(name: str) -> Callable[[Problem], Policy]:
    def make(problem: Problem) -> Policy:

        return Throttle(problem, load_settings(ThrottleConfig, "agents", name), name)

    return make


POLICIES: dict[str, Callable[[Problem], Policy]] = {
    "static": _static,
    "best_constant": _best_constant,
    "rule_based": _rule_based,
    "linear": _linear,
    "random": _random,
    **{f"gate-{rule}": _gated(rule) for rule in GATES},
    **{name: _throttle(name) for name in THROTTLES},
    "greedy": _greedy,
    "mpc": _mpc,
    "oracle": _oracle,
}
"""Policies by name: the standard MoE service, the best fixed setting, the staged rules, a score per knob (of
scenarios for which one was searched), chance, gates that
decide when a base policy adapts, PID control of several knobs and of single ones, the best next interval,
plans on forecasts and on the true future."""


def make_policy(name: str, problem: Problem) -> Policy:
    """Build a policy by name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in POLICIES:
        raise ValueError(
            f"unknown policy {name!r}; known: {sorted(POLICIES)}, or the path of a trained run, or "
            "package.module:Class"
        )
    return POLICIES[name](problem)
