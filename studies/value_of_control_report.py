"""What the searches of the study of control say: losses with intervals, a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents.evaluation.figures import save_figure
from agents.files import write_file
from agents.play.metrics import summarize
from studies.repeats import markdown_table, range_text
from thermoe_env.problem.scenario import Scenario

LEAST_BELOW = 0.10
"""How far the best constant must be below the best policy, over its gross value, where control is needed."""
_RESAMPLES = 2000
LOSS = ("loss", "low", "high")
Loss = tuple[float, float, float]
"""Mean and 95% interval, over the best policy's gross value."""


@dataclass
class Worth:
    """What a scenario came to."""

    constant: Loss
    knobs: dict[str, float]
    """Levels of the best constant."""
    returns: dict[str, float]
    """Mean return on the episodes that judge, by policy."""
    gross: float
    feasible: dict[str, str]
    """By policy why it is not, or nothing; `static` outside events."""
    steps: int
    """Twin intervals that searches played."""
    held: dict[str, Loss] = field(default_factory=dict)
    blind: dict[str, Loss] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether control is needed, of a service that can be run at all."""
        return self.constant[0] >= LEAST_BELOW and not self.feasible["static"]


def worth_of(
    scenario: Scenario,
    baselines: dict[str, Any],
    firsts: Sequence[dict[str, Any]],
    agains: Sequence[dict[str, Any]],
) -> Worth:
    """Reduce the results of one scenario.

    Args:
        scenario: What was played.
        baselines: Result of `Baselines`.
        firsts: Of the searches from the best constant.
        agains: Of those from the best rule, restarts of a variant beside each other.
    """
    by_variant: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in agains:
        by_variant.setdefault((result["variant"]["kind"], result["variant"]["name"]), []).append(result)
    sighted = by_variant.pop(("sighted", ""))
    own = _returns(sighted)  # [R, M]
    gross = float(np.mean([result["gross"] for result in sighted]))
    best = max(sighted, key=lambda result: result["value"])
    policies = {"static": baselines["static"], "best_constant": baselines["constant"], "best_rule": best}
    levels = [row[0] for row in baselines["weights"]]
    worth = Worth(
        constant=_loss(own, np.broadcast_to(baselines["constant"]["returns"], own.shape), gross),
        knobs=dict(zip(scenario.knobs, levels, strict=True)),
        returns={name: float(np.mean(judged["returns"])) for name, judged in policies.items()},
        gross=gross,
        feasible=_broken(policies, scenario) | _broken({"static": baselines["calm"]}, scenario),
        steps=sum(result["steps"] for result in (baselines, *firsts, *agains)),
    )
    for (kind, name), results in by_variant.items():
        losses = worth.held if kind == "held" else worth.blind
        losses[name] = _loss(own, _returns(results), gross)
    return worth


def write_report(found: Mapping[str, Worth], folder: Path, command: str) -> dict[str, Any]:
    """Write report.md, losses.csv and losses.png; return the document of `--json`."""
    rows = [
        {"scenario": scenario, "without": kind, "name": name} | dict(zip(LOSS, loss, strict=True))
        for scenario, worth in found.items()
        for kind, losses in (("control", {"": worth.constant}), ("knob", worth.held), ("signal", worth.blind))
        for name, loss in losses.items()
    ]
    table = pd.DataFrame(rows)
    write_file(folder / "losses.csv", table.to_csv(index=False))
    save_figure(lambda: _figure(table), folder / "losses.png")
    lines = [
        "# What control is worth", "",
        f"Written by `{command}`. Simulated. Losses are shares of the best policy's gross value (what good "
        "answers earn), mean and 95% interval over restarts of the search and paired episodes that no search "
        "saw. A knob is held at its best level, a signal shows its mean, and the rest is searched again; so "
        "is the best rule with nothing held.", "",
        "![Losses](losses.png)", "",
    ]  # fmt: skip
    for scenario, worth in found.items():
        lines += [f"## {scenario}", "", *_scenario_lines(worth)]
    write_file(folder / "report.md", "\n".join(lines))
    print(f"wrote report.md, losses.csv and losses.png to {folder}")
    return {name: _document(worth) for name, worth in found.items()}


def _scenario_lines(worth: Worth) -> list[str]:
    levels = ", ".join(f"{name} {level:g}" for name, level in worth.knobs.items())
    needs = "Needs" if worth.passed else "Does not need"
    lines = [
        f"{needs} control: the best constant loses {_text(worth.constant)}, asked are {LEAST_BELOW:.0%}. Its "
        f"levels: {levels}. {worth.steps / 1e6:.1f} million twin intervals were searched.", "",
    ]  # fmt: skip
    lines += markdown_table(
        ["policy", "return", "kept its promises"],
        [(name, f"{value:.1f}", worth.feasible.get(name) or "yes") for name, value in worth.returns.items()],
    )
    lines += ["`static` is judged outside events.", ""]
    rows = [(f"`{name}` held", _text(loss)) for name, loss in worth.held.items()]
    rows += [(f"blind to {name}", _text(loss)) for name, loss in worth.blind.items()]
    return [*lines, *markdown_table(["without", "loss"], rows)]


def _document(worth: Worth) -> dict[str, Any]:
    return {
        "passed": worth.passed,
        "best_constant": worth.returns["best_constant"],
        "best_rule": worth.returns["best_rule"],
        "planner": None,
        "held": {name: list(loss) for name, loss in worth.held.items()},
        "blind": {name: list(loss) for name, loss in worth.blind.items()},
        "feasible": {name: not why for name, why in worth.feasible.items()},
    }


def _loss(own: np.ndarray, other: np.ndarray, gross: float) -> Loss:
    """Loss of one policy against another: returns [R, M] each, paired in both, both drawn anew."""
    loss, source = (own - other) / gross, np.random.default_rng(0)
    n_restarts, n_episodes = loss.shape
    restarts = source.integers(n_restarts, size=(_RESAMPLES, n_restarts, 1))
    episodes = source.integers(n_episodes, size=(_RESAMPLES, 1, n_episodes))
    low, high = np.quantile(loss[restarts, episodes].mean(axis=(1, 2)), (0.025, 0.975))
    return float(loss.mean()), float(low), float(high)


def _returns(results: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([result["returns"] for result in results])


def _broken(policies: Mapping[str, dict[str, Any]], scenario: Scenario) -> dict[str, str]:
    """By policy why it does not count beside `static`, or nothing."""
    tables = [pd.DataFrame(judged["episodes"]).assign(policy=name) for name, judged in policies.items()]
    table = summarize(pd.concat(tables), scenario.feasible).set_index("policy")
    return {name: str(table.loc[name, "infeasible"]) for name in policies}


def _text(loss: Loss) -> str:
    return range_text(*loss, factor=100, unit="%", sign="+")


def _figure(table: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(table.scenario))
    figure = Figure(figsize=(4.2 * len(names), 4.0), layout="constrained")
    for axes, scenario in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = table[table.scenario == scenario].iloc[::-1]
        texts = {"control": "constant", "knob": "{} held", "signal": "blind to {}"}
        places = np.arange(len(own))
        spread = np.abs(own[["low", "high"]].to_numpy() - own[["loss"]].to_numpy()).T
        axes.barh(places, 100 * own.loss, xerr=100 * spread, color="tab:blue", ecolor="black", capsize=3)
        axes.set_yticks(
            places, [texts[kind].format(name) for kind, name in zip(own.without, own.name, strict=True)]
        )
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlabel("loss, % of the best policy's gross value")
        axes.set_title(f"{scenario} (simulated)")
    return figure
