"""What the compiled service of tokens looks up: steps and answers at the knobs' levels, over rows.

A step that reads no prompt is told by its rows of answers. One that does is told by them and by the share of
the other rows that prompts take, on the mean: its cost is a mean over prompts drawn from the trace's own
lengths, where what finds no room in a step is read in the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moe.lm.config import ENGINE, readable_experts
from moe.lm.text import DOMAINS
from moe.service.generate.lengths import TokenLengths, token_lengths
from moe.step_cost import TERMS, StepCost, StepWork
from moe.token_profile import QualityCell, TokenProfile
from thermoe_env.problem.problem import Problem

PER_OCTAVE = 2
"""Nodes of rows and of prompts in each octave."""
SHARES = 16
"""Intervals between the nodes of the share of rows that prompts take."""
_DRAWS, _MOST_PROMPTS = 256, 1024
"""Steps that are drawn for each node, and the most prompts of one."""
_CLOCKED = np.array([name not in ("experts", "cache") for name in TERMS])
"""Terms that follow the clock of the SMs; the others that of the memory."""


class TokenTables(NamedTuple):
    """Tables as compiled code reads them. K, B levels of experts per token and bias, N rows, V shares."""

    pure: np.ndarray
    """[K, B, N, 4] of a step of answers alone: s that follow the clock, s that do not, J likewise."""
    mixed: np.ndarray
    """[K, N, V, 4] of a step that reads prompts as well."""
    answers: np.ndarray
    """[S, K, B, N, 3] accuracy, confidence and entropy of tokens."""
    reference: np.ndarray
    """[S] accuracy of the standard service."""


@dataclass(frozen=True)
class TokenWork:
    """What a scenario's requests are, and what they cost."""

    tables: TokenTables
    lengths: TokenLengths
    cost: StepCost
    profile: TokenProfile
    max_rows: int
    slots: int


def nodes(most: float) -> np.ndarray:
    """1 to `most` and beyond, `PER_OCTAVE` evenly in each octave."""
    step = np.arange(int(np.ceil(np.log2(most))) * PER_OCTAVE + 2)
    return 2.0 ** (step // PER_OCTAVE) * (1.0 + step % PER_OCTAVE / PER_OCTAVE)


def token_work(problem: Problem) -> TokenWork:
    """The work of a problem of task `generate`.

    Raises:
        ProfileError: the profile holds too little.
    """
    generate, profile = problem.scenario.generate, problem.tokens
    assert generate is not None and profile is not None
    levels = problem.knobs.levels
    top_ks, biases, power_w = levels["expert_count"], levels["routing_bias"], problem.serving_power_w
    key = *profile.digests().values(), generate.lengths, top_ks, biases, power_w
    if key not in _KNOWN:
        room = ENGINE["cpu" if profile.cost.copy_bytes_per_s is None else "cuda"]
        cost, lengths = StepCost(profile), token_lengths(generate.lengths, profile.cost.config["context"])
        tables = tables_of(profile, cost, lengths, room["max_rows"], tuple(map(int, top_ks)), biases, power_w)
        _KNOWN[key] = TokenWork(tables, lengths, cost, profile, room["max_rows"], room["slots"])
    return _KNOWN[key]


_KNOWN: dict[tuple[Any, ...], TokenWork] = {}
"""What was tabulated in this process; a second or so each."""


def tables_of(
    profile: TokenProfile, cost: StepCost, lengths: TokenLengths, max_rows: int, top_ks: tuple[int, ...],
    biases: tuple[float, ...], busy_power_w: float,
) -> TokenTables:  # fmt: skip
    """Tabulate a fitted profile for requests of given lengths.

    Without a meter steps take `busy_power_w` above idle, as another device would while as busy.
    """
    n_experts = profile.cost.config["n_experts"]
    rows = nodes(max_rows)
    context = mean_context(lengths)

    def split(work: StepWork) -> np.ndarray:
        """[..., 4] of steps."""
        amounts = cost.amounts(work)
        seconds = cost.time.rate
        rates = seconds, seconds * busy_power_w if cost.energy is None else cost.energy.rate
        return np.stack(
            [amounts @ (rate * part) for rate in rates for part in (_CLOCKED, ~_CLOCKED)], axis=-1
        )

    pure = np.empty((len(top_ks), len(biases), len(rows), 4))
    for i, k in enumerate(top_ks):
        for j, bias in enumerate(biases):
            read = cost.reads(rows, 0.0, k, readable_experts(bias, n_experts, k))
            pure[i, j] = split(StepWork(rows, 0.0, rows * context, 0.0, k, read))
    drawn = _prompt_rows(lengths, np.maximum(1.0, max_rows - rows))  # [N, V', draws]
    prompt = lengths.prompt.astype(float)
    attended = float((prompt * (prompt + 1) / 2).sum() / prompt.sum())  # positions of a prompt's row, mean
    mixed = np.empty((len(top_ks), len(rows), SHARES + 1, 4))
    for i, k in enumerate(top_ks):
        for n, row in enumerate(rows):
            beside = drawn[n]
            read = cost.reads(row, beside, k, n_experts)
            work = StepWork(row, beside, row * context + beside, beside * attended, k, read)
            costs = split(work).mean(axis=1)  # [V', 4]
            share = beside.mean(axis=1) / max(1.0, max_rows - row)
            for part in range(4):
                mixed[i, n, :, part] = np.interp(np.linspace(0.0, 1.0, SHARES + 1), share, costs[:, part])
    return TokenTables(pure, mixed, *_answers(profile, rows, top_ks, biases))


def mean_context(lengths: TokenLengths) -> float:
    """Position that a row of an answer attends to, mean over such rows."""
    prompt, decoded = lengths.prompt.astype(float), lengths.output - 1.0
    total = decoded.sum()
    return float((decoded * (prompt + (decoded + 1) / 2)).sum() / total) if total else float(prompt.mean())


def _prompt_rows(lengths: TokenLengths, room: np.ndarray) -> np.ndarray:
    """Rows of prompts of drawn steps that read some, from few prompts to many.  # [N, V', draws].

    Args:
        lengths: of requests.
        room: rows that are left for prompts.  # [N]
    """
    rng = np.random.default_rng(0)
    prompts = nodes(_MOST_PROMPTS)
    # Each column has lengths of all ranks, so that means are those of the trace.
    ranks = np.sort(lengths.prompt)[((np.arange(_DRAWS) + 0.5) / _DRAWS * len(lengths.prompt)).astype(int)]
    drawn = np.stack([rng.permutation(ranks) for _ in range(int(np.ceil(prompts[-1])))], axis=-1)
    ends = np.cumsum(drawn, axis=-1, dtype=float)  # [draws, prompts]
    # As many prompts as a node says, between two whole numbers by chance.
    number = np.arange(_DRAWS)
    begun = np.floor(prompts)[:, None].astype(int) + (number < prompts[:, None] % 1.0 * _DRAWS)  # [V', draws]
    return np.minimum(room[:, None, None], ends[number, begun - 1])


def _answers(
    profile: TokenProfile, rows: np.ndarray, top_ks: tuple[int, ...], biases: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """[S, K, B, N, 3] and [S], see `TokenTables`.

    What a domain's answers are worth is measured with the most sequences, which score all documents; with
    fewer, how far the same tokens are from the standard service.
    """
    quality = profile.quality
    cells = {(c.running, c.top_k, c.routing_bias): c for c in quality.cells}
    running = sorted({c.running for c in quality.cells})
    most = running[-1]
    domains = [name for name in DOMAINS if name in cells[most, quality.top_k, 0.0].by_domain]

    def cell_at(n: int, k: int, bias: float) -> QualityCell:
        """The measured cell that reads as much: biases that allow the same number are measured once."""
        known = [b for (m, q, b) in cells if (m, q) == (n, k) and b <= bias]
        return cells[n, k, max(known)]

    table = np.empty((len(domains), len(top_ks), len(biases), len(rows), 3))
    at = np.log(rows)
    for i, k in enumerate(top_ks):
        for j, bias in enumerate(biases):
            row = [cell_at(n, k, bias) for n in running]
            change = np.array([c.minus_standard for c in row]) - row[-1].minus_standard
            changes = np.interp(at, np.log(running), change)
            for s, name in enumerate(domains):
                table[s, i, j, :, 0] = row[-1].by_domain[name] + changes
            for column, name in ((1, "confidence"), (2, "entropy")):
                table[:, i, j, :, column] = getattr(row[-1], name)
    standard = cells[most, quality.top_k, 0.0]
    return table, np.array([standard.by_domain[name] for name in domains])
