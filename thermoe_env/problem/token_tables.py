"""What the compiled service of tokens looks up: steps and answers at the knobs' levels, over rows.

A step that reads no prompt is told by its rows of answers. One that does is told by them and by the share of
the other rows that prompts take, on the mean: its cost is a mean over prompts drawn from the trace's own
lengths, where what finds no room in a step is read in the next.

Of several devices each runs every row and computes the experts it holds: its step has all of what is not the
experts', its share of what is, and in every layer the exchange of what the experts said.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from moe.lesson_fit import LessonFit
from moe.lm.config import ENGINE, readable_experts
from moe.profiles import ProfileError
from moe.service.generate.lengths import TokenLengths, token_lengths
from moe.step_cost import TERMS, StepCost, StepWork
from moe.token_profile import QualityCell, TokenProfile
from thermoe_env.problem.problem import Problem
from thermoe_env.problem.scenario import ExchangeConfig
from thermoe_env.problem.tokens import standard_accuracy

PER_OCTAVE = 2
"""Nodes of rows and of prompts in each octave."""
SHARES = 16
"""Intervals between the nodes of the share of rows that prompts take."""
_DRAWS, _MOST_PROMPTS = 128, 1024
"""Steps that are drawn for each node, and the most prompts of one."""
POSTERIOR = 8
"""Draws of what steps cost, of which an episode has one."""
_CLOCKED = np.array([name not in ("experts", "cache") for name in TERMS])
"""Terms that follow the clock of the SMs; the others that of the memory."""
_OF_EXPERTS = np.array([name in ("experts", "expert rows", "expert tiles") for name in TERMS])
"""Terms that a device takes its share of."""
_SUM_BYTES = 4
"""Experts of several devices are added up in float32."""


class TokenTables(NamedTuple):
    """Tables as compiled code reads them.

    G draws of what steps cost, S domains, K, B levels of top k and bias, N rows, V shares, D devices.
    """

    pure: np.ndarray
    """[G, S, K, B, N, D, 4] of a step of answers alone: s that follow the clock, s that do not, J alike."""
    mixed: np.ndarray
    """[G, S, K, N, V, D, 4] of a step that reads prompts as well."""
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
    lessons: LessonFit | None
    """How the head learns; None where the profile did not let it."""


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
    levels, devices = problem.knobs.levels, Devices.of(problem)
    split = problem.placement, devices.exchange
    top_ks, biases, power_w = levels["expert_count"], levels["routing_bias"], problem.serving_power_w
    spread = problem.scenario.randomize.steps
    key = *profile.digests().values(), generate.lengths, top_ks, biases, power_w, spread, *split
    if key not in _KNOWN:
        room = ENGINE["cpu" if profile.cost.copy_bytes_per_s is None else "cuda"]
        cost, lengths = StepCost(profile), token_lengths(generate.lengths, profile.cost.config["context"])
        tables = tables_of(
            profile,
            cost,
            lengths,
            room["max_rows"],
            tuple(map(int, top_ks)),
            biases,
            power_w,
            spread,
            devices,
        )
        lessons = None if profile.adaptation is None else LessonFit(profile.adaptation)
        _KNOWN[key] = TokenWork(tables, lengths, cost, profile, room["max_rows"], room["slots"], lessons)
    return _KNOWN[key]


_KNOWN: dict[tuple[Any, ...], TokenWork] = {}
"""What was tabulated in this process; a second or so each."""


@dataclass(frozen=True)
class Devices:
    """How steps are split among devices."""

    share: np.ndarray
    """Of the experts' work, at any bias.  # [K, D]"""
    exchange: ExchangeConfig | None
    """None: there is but one."""

    @classmethod
    def of(cls, problem: Problem) -> Devices:
        """Those of a problem of task `generate`."""
        share = problem.device_share[:, 0]
        if share.shape[-1] == 1:
            return cls(share, None)
        return cls(share, problem.scenario.exchange or ExchangeConfig())

    def rates(self, rates: np.ndarray, k: int, config: dict[str, int]) -> np.ndarray:
        """What each device takes of a step's amounts at a level of experts per token, [D, G, F, 4].

        Args:
            rates: those of one device, in the order of the tables' last axis.  # [G, F, 4]
            k: the level.
            config: of the model.
        """
        share = np.where(_OF_EXPERTS, self.share[k][:, None], 1.0)  # [D, F]
        own = rates * share[:, None, :, None]
        if self.exchange is not None:
            n, layers = len(share), config["n_layers"]
            moved = 2.0 * (n - 1) / n * config["d_model"] * _SUM_BYTES  # bytes of a row
            own[:, :, TERMS.index("launch"), 1] += layers * self.exchange.latency_s
            own[:, :, TERMS.index("rows"), 1] += layers * moved / self.exchange.bytes_per_s
        return own


def tables_of(
    profile: TokenProfile, cost: StepCost, lengths: TokenLengths, max_rows: int, top_ks: tuple[int, ...],
    biases: tuple[float, ...], busy_power_w: float, spread: float, devices: Devices,
) -> TokenTables:  # fmt: skip
    """Tabulate a fitted profile for requests of given lengths.

    `spread` is that of draws of what steps cost, see `Fit.draws`. Without a meter steps take `busy_power_w`
    above idle, as another device would while as busy.
    """
    n_experts = profile.cost.config["n_experts"]
    rows = nodes(max_rows)
    context = mean_context(lengths)
    n_devices = devices.share.shape[-1]

    rng, number = np.random.default_rng(0), POSTERIOR if spread else 1
    seconds = cost.time.draws(number, spread, rng)  # [G, F]
    joules = seconds * busy_power_w if cost.energy is None else cost.energy.draws(number, spread, rng)
    # [G, F, 4], in the order of the tables' last axis.
    whole = np.stack([of * part for of in (seconds, joules) for part in (_CLOCKED, ~_CLOCKED)], axis=-1)
    rates = [devices.rates(whole, i, profile.cost.config) for i in range(len(top_ks))]  # [D, G, F, 4] each
    domains = tuple(standard_accuracy(profile.quality, lengths, profile.cost.config["context"]))
    pure = np.empty((number, len(domains), len(top_ks), len(biases), len(rows), n_devices, 4))
    for (s, name), (i, k), (j, bias) in product(enumerate(domains), enumerate(top_ks), enumerate(biases)):
        read = cost.reads(rows, 0.0, k, readable_experts(bias, n_experts, k), name)
        amounts = cost.amounts(StepWork(rows, 0.0, rows * context, 0.0, k, read))  # [N, F]
        pure[:, s, i, j] = np.moveaxis(amounts @ rates[i], 0, 2)
    drawn = _prompt_rows(lengths, np.maximum(1.0, max_rows - rows))  # [N, V', draws]
    prompt = lengths.prompt.astype(float)
    attended = float((prompt * (prompt + 1) / 2).sum() / prompt.sum())  # positions of a prompt's row, mean
    mixed = np.empty((number, len(domains), len(top_ks), len(rows), SHARES + 1, n_devices, 4))
    for (s, name), (i, k), (n, row) in product(enumerate(domains), enumerate(top_ks), enumerate(rows)):
        beside = drawn[n]
        read = cost.reads(row, beside, k, n_experts, name)
        work = StepWork(row, beside, row * context + beside, beside * attended, k, read)
        amounts = cost.amounts(work).mean(axis=1)  # [V', F]
        share = beside.mean(axis=1) / max(1.0, max_rows - row)
        at = np.linspace(0.0, 1.0, SHARES + 1)
        amounts = np.stack([np.interp(at, share, part) for part in amounts.T], axis=-1)  # [V, F]
        mixed[:, s, i, n] = np.moveaxis(amounts @ rates[i], 0, 2)
    if not (np.isfinite(pure).all() and np.isfinite(mixed).all()):
        raise ProfileError(
            f"the steps measured on {profile.cost.device} give costs that are no numbers: measure them again "
            "(python -m moe.profiling tokens)"
        )
    return TokenTables(pure, mixed, *_answers(profile, lengths, rows, top_ks, biases))


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
    profile: TokenProfile, lengths: TokenLengths, rows: np.ndarray, top_ks: tuple[int, ...],
    biases: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """[S, K, B, N, 3] and [S], see `TokenTables`: the standard service's, and how far others are from it."""
    quality = profile.quality
    cells = {(c.running, c.top_k, c.routing_bias): c for c in quality.cells}
    running = sorted({c.running for c in quality.cells})
    standard = standard_accuracy(quality, lengths, profile.cost.config["context"])

    def cell_at(n: int, k: int, bias: float) -> QualityCell:
        """The measured cell that reads as much: biases that allow the same number are measured once."""
        known = [b for (m, q, b) in cells if (m, q) == (n, k) and b <= bias]
        return cells[n, k, max(known)]

    table = np.empty((len(standard), len(top_ks), len(biases), len(rows), 3))
    at = np.log(rows), np.log(running)
    for (i, k), (j, bias) in product(enumerate(top_ks), enumerate(biases)):
        row = [cell_at(n, k, bias) for n in running]
        for s, name in enumerate(standard):
            change = np.interp(*at, [c.by_domain[name].minus_standard for c in row])
            table[s, i, j, :, 0] = np.clip(standard[name] + change, 0.0, 1.0)
        for column, name in ((1, "confidence"), (2, "entropy")):
            table[:, i, j, :, column] = np.interp(*at, [getattr(c, name) for c in row])
    return table, np.array(list(standard.values()))
