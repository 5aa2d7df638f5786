"""The live proof for readers: live_proof.md, live_proof.json and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from agents.evaluation.figures import colours, power_temperature, save_figure
from agents.evaluation.results import markdown_text
from agents.files import write_file
from agents.live.compare import live_problem
from agents.live.episodes import ASIDE, LiveEpisodes
from benchmarks.live_proof_results import NUMBERS, TWIN_PERCENT, Proof

_BARS = ("j_per_good", "mean_power_w", "quality", "peak_c")


def write_proof(folder: Path, live: LiveEpisodes, proof: Proof) -> Path:
    """Write live_proof.md, live_proof.json, and the figures into the folder `live_proof` beside them."""
    pictures = folder / "live_proof"
    problem = live_problem(live.scenario, live.episodes[0].recording.world)
    seed = int(next(iter(proof.examples.values())).seeds[0])
    where = f"{proof.origin}; scenario {live.scenario.name}"
    save_figure(
        lambda: power_temperature(problem, proof.examples, f"{where}, seed {seed}"), pictures / "time.png"
    )
    save_figure(lambda: by_seed(proof, where), pictures / "seeds.png")
    save_figure(lambda: bars(proof, where), pictures / "twin.png")
    write_file(folder / "live_proof.json", json.dumps(proof.document(), indent=1) + "\n")
    path = folder / "live_proof.md"
    write_file(path, _markdown(live, proof, seed))
    return path


# ---------------------------------------------------------------- figures


def by_seed(proof: Proof, where: str) -> Figure:
    """Live energy per good answer, a line per policy over the paired seeds."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    axes, relative = figure.subplots(1, 2)
    colour = colours(proof.policies)
    seeds = sorted(proof.live.seed.unique())
    for policy in proof.policies:
        own = proof.of(policy)
        at = [seeds.index(seed) for seed in own.seed]
        style = {"color": colour[policy], "marker": "o", "ms": 5}
        axes.plot(at, own.j_drawn_per_good * 1e3, label=policy, **style)
        pairs = proof.paired(policy, "static")
        ratio = 100.0 * (pairs.j_drawn_per_good_own / pairs.j_drawn_per_good_base - 1.0)
        relative.plot([seeds.index(seed) for seed in pairs.seed], ratio, **style)
    for each in (axes, relative):
        each.set_xticks(range(len(seeds)), [str(seed) for seed in seeds])
        each.set_xlabel("seed")
    axes.set(title="energy per good answer (mJ)", ylim=(0.0, None))
    relative.set_title("against static (%)")
    relative.axhline(-25.0, color="black", ls="--", lw=0.9)
    relative.annotate("25% less", (0.0, -25.0), (2, 3), textcoords="offset points", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(f"Paired seeds, {where}")
    return figure


def bars(proof: Proof, where: str) -> Figure:
    """Live against twin, a pair of bars per policy."""
    figure = Figure(figsize=(10.0, 5.6), layout="constrained")
    policies, at = proof.policies, np.arange(len(proof.policies))
    for axes, quantity in zip(
        figure.subplots(2, 2).flat, (q for q in NUMBERS if q.name in _BARS), strict=True
    ):
        live = [proof.estimate(policy, quantity.name) for policy in policies]
        mean = np.array([e.mean for e in live]) * quantity.factor
        spread = [[(e.mean - e.low) * quantity.factor, (e.high - e.mean) * quantity.factor] for e in live]
        error = np.nan_to_num(np.array(spread).T)
        axes.bar(at - 0.2, mean, 0.38, yerr=error, color="#444444", capsize=3, label="live, 95% interval")
        twin = [proof.predicted(policy, quantity.name) * quantity.factor for policy in policies]
        axes.bar(at + 0.2, twin, 0.38, color="#D55E00", label="twin (simulated)")
        axes.set_xticks(at, policies)
        axes.set_title(quantity.head)
        axes.grid(False, axis="x")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Live and as the twin predicts it, {where}")
    return figure


# ---------------------------------------------------------------- the document


def _markdown(live: LiveEpisodes, proof: Proof, shown_seed: int) -> str:
    scenario, rows = live.scenario, proof.live
    seeds = sorted(int(seed) for seed in rows.seed.unique())
    machines = list(dict.fromkeys(tuple(e.machine.items()) for e in live.episodes))
    agents = ", ".join(f"`{name}`" for name in proof.agents) or "none"
    parts = [
        "# Live proof",
        "Policies on the same requests, live, and the twin's prediction of each. Written by a command from "
        "recorded episodes; nothing here is typed by hand.",
        "```\npython -m benchmarks.live_proof --agent RUN\n```",
        "\n".join(
            [
                f"* Origin: {proof.origin}."
                + (
                    " **Power and temperature are simulated: this is a rehearsal, not the proof.**"
                    if live.episodes[0].recording.world != "live"
                    else ""
                ),
                f"* Scenario `{scenario.name}`, {scenario.episode_s} s per episode in place of its own "
                f"length; seeds {', '.join(map(str, seeds))}. The temperature limit of {proof.limit_c:g} °C "
                "is virtual: the scenario sets it, far below the hardware's.",
                f"* Trained only in the twin: {agents}. The order in which policies play a seed is drawn.",
                *(f"* Machine: {', '.join(f'{k} {v[:12]}' for k, v in machine)}." for machine in machines),
                *(f"* Interrupted: {reason}." for reason in live.lost),
                *_aside(live),
            ]
        ),
        "## Verdicts",
        *(_verdicts(proof, policy) for policy in proof.candidates),
        "Saving and intervals: geometric mean of the ratios of paired seeds, 95% Student interval of their "
        "logarithms. `met` goes by the mean for the saving and for quality, by the whole interval against "
        "the rules, and by every seed for the virtual limit. The twin's error is that of the mean over "
        f"seeds, at most {TWIN_PERCENT:g}% for each number below; where live is 0, only 0 will do.",
        "![paired seeds](live_proof/seeds.png)",
        "## Live and twin",
        "The twin plays the same requests twice over: begun at the temperature at which the card began, in a "
        "room in which it idles as the card does; and as calibrated, told nothing of the day. Live: mean "
        "and 95% Student interval over seeds.",
        *(_numbers(proof, policy) for policy in proof.policies),
        "![live and twin](live_proof/twin.png)",
        f"## Power and temperature, seed {shown_seed}",
        "![power and temperature over time](live_proof/time.png)",
        "## Episodes",
        "In the order of play. The service's clock stands still while a policy decides, so no request waits "
        "for it. A card cools in that time, and its mean power falls: this makes the recorded energy of a "
        "slow policy too low. The verdicts on energy therefore count all that the card drew while a policy "
        "decided; the tables of live and twin do not. The card is named by a hash of its identity, and the "
        "weights by theirs.",
        _episodes(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _aside(live: LiveEpisodes) -> list[str]:
    aside = LiveEpisodes.load(live.folder / ASIDE)
    if aside is None:
        return []
    names = ", ".join(f"{e.recording.policy} on {e.recording.seeds[0]}" for e in aside.episodes)
    return [
        "* Set aside, because their seed was played again whole on another card or with other weights: "
        f"{names}."
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _verdicts(proof: Proof, policy: str) -> str:
    kind = "trained in the twin" if policy in proof.agents else "not trained"
    rows = [
        [v.requirement, "met" if v.met else "**not met**", v.found] for v in proof.verdicts(policy)
    ]  # fmt: skip
    return f"### {markdown_text(policy)} ({kind})\n\n" + _table(("requirement", "", "found"), rows)


def _numbers(proof: Proof, policy: str) -> str:
    rows = [
        [
            q.head,
            proof.estimate(policy, q.name).text(q.factor, q.digits),
            *(
                text
                for blind in (False, True)
                for text in (
                    f"{proof.predicted(policy, q.name, blind) * q.factor:,.{q.digits}f}",
                    _percent(proof.error_percent(policy, q.name, blind)),
                )
            ),
        ]
        for q in NUMBERS
    ]
    head = ("", "live", "twin, start temperature set", "error", "twin as calibrated", "error")
    return f"### {markdown_text(policy)}\n\n" + _table(head, rows)


def _percent(value: float) -> str:
    if not math.isfinite(value):
        return "live is 0"
    return f"{value:+.1f}%" if abs(value) <= TWIN_PERCENT else f"**{value:+.1f}%**"


def _episodes(rows: pd.DataFrame) -> str:
    head = (
        "seed", "policy", "began (UTC)", "card/weights", "start °C", "mJ per good answer", "quality %",
        "mean W", "peak °C", "decision p50, p95 ms", "wall-clock s",
    )  # fmt: skip
    table = [
        [
            f"{r['seed']}", markdown_text(r["policy"]), r["began"].removesuffix("+00:00"), r["card"],
            f"{r['start_c']:g}",
            f"{1e3 * r['j_per_good']:.2f}", f"{100 * r['quality']:.2f}", f"{r['mean_power_w']:.1f}",
            f"{r['peak_c']:g}", f"{r['decision_p50_ms']:.2f}, {r['decision_p95_ms']:.2f}",
            f"{r['wall_s']:.1f}",
        ]
        for r in rows.sort_values("began", kind="stable").to_dict("records")
    ]  # fmt: skip
    return _table(head, table)
