"""The whole way in minutes: train PPO in the twin, compare it with the best rule on equal requests, report.

Run with `python -m agents.demo`; results in runs/demo-<time>.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

from agents.evaluation.command import EvaluateConfig, Results, evaluate
from agents.files import new_run_folder
from agents.play.metrics import summarize
from agents.policies.linear import weights_file
from moe.errors import one_line_errors
from thermoe_env.problem.scenario import load_scenario


def demo(
    scenario: str = "default", seeds: int = 100, total_timesteps: int | None = None, out: Path | None = None
) -> Results:
    """Train PPO in the twin and evaluate it beside `static`, `best_constant` and the best rule.

    That is `linear` where the scenario has weights for it, else `rule_based`.

    Args:
        scenario: name in configs/scenarios or path of a YAML file.
        seeds: episodes per policy in the comparison.
        total_timesteps: length of the training, in place of the one in configs/agents/ppo.yaml.
        out: folder for the results; runs/demo-<time> where none is given.
    """
    from agents.learning.config import load_train_config
    from agents.learning.training import train

    overrides: dict[str, Any] = {"scenario": scenario}
    if total_timesteps is not None:
        overrides["total_timesteps"] = total_timesteps
    config = load_train_config("ppo", **overrides)
    folder = new_run_folder("demo", out)
    print(f"1 of 2: training PPO in the twin, {config.total_timesteps} steps, into {folder / 'ppo'}")
    train(config, folder / "ppo")
    print(f"2 of 2: comparing policies on {seeds} episodes, into {folder / 'evaluation'}")
    rule = "linear" if weights_file(load_scenario(scenario).name).exists() else "rule_based"
    comparison = EvaluateConfig(
        policy=(rule, str(folder / "ppo")), scenario=scenario, seeds=seeds, out=folder / "evaluation"
    )
    results = evaluate(comparison)
    paired = summarize(results.episodes, results.problem.scenario.feasible, rule).set_index("policy")
    ratio, low, high = (paired.loc["ppo", f"j_per_good_vs_{rule}{end}"] for end in ("", "_low", "_high"))
    print(f"energy per good answer, ppo over {rule}, paired by seed: {ratio:.3f} ({low:.3f}-{high:.3f})")
    return results


def main() -> None:
    """Parse the command line and run the demonstration."""
    with one_line_errors():
        tyro.cli(demo)


if __name__ == "__main__":
    main()
