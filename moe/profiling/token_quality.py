"""How good answers are under knobs: every document's second half, decoded by the engine that serves.

Documents decode together in groups of so many running sequences, all at one position, since what a step may
read depends on who runs. Each token is compared with its own entry under the trained knobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.service.generate.sequences import Texts
from moe.token_profile import QualityCell

BIASES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Routing biases; of those that allow a step the same number of experts the lowest is measured."""


class Score(NamedTuple):
    """How documents were answered."""

    right: np.ndarray
    """Bool.  # [N', tokens]"""
    confidence: float
    entropy: float
    experts_read: float
    """Of a layer by a decode step, mean over layers and steps."""


def measure_token_quality(
    engine: Engine, texts: Texts, domain: np.ndarray, names: Sequence[str], plan: dict[int, int], tokens: int
) -> tuple[QualityCell, ...]:
    """Measure the grid of (running sequences, experts per token, routing bias).

    Args:
        engine: captured and empty, over the documents of `texts`.
        texts: what is answered, and what the standard service has right.
        domain: of each document.  # [N]
        names: of the domains.
        plan: documents to score by running sequences, of which they are a multiple, at least 2; those of a
            group are of all domains. With one sequence a bias is not measured: its top k are read anyway.
        tokens: output tokens of each document that are scored, from its middle on.

    Raises:
        ValueError: documents to score that make no whole groups, or no error over documents.
    """
    if odd := {n: count for n, count in plan.items() if count % n or count < 2}:
        raise ValueError(f"documents to score must be a multiple of the running sequences, and 2, got {odd}")
    c = engine.model.config
    top_ks = [k for k in (8, 4, 2, 1) if k <= c.top_k]
    cells = [(n, k) for n in sorted(plan) for k in top_ks]
    found: list[QualityCell] = []
    for running, top_k in tqdm(cells, desc="quality", unit="setting", delay=2.0):
        # Evenly from all domains, which lie one behind the other.
        chosen = np.linspace(0, len(domain) - 1, plan[running]).round().astype(np.int32)
        limits: dict[int, float] = {}
        for bias in BIASES if running > 1 else (0.0,):
            limits.setdefault(readable_experts(bias, c.n_experts, top_k), bias)
        first, last = _span(texts, tokens)
        scores = score(engine, texts.tokens, chosen, running, top_k, tuple(limits), first, last)
        reference = texts.reference[chosen, first:last]  # [N', tokens]
        for bias, (right, confidence, entropy, experts_read) in zip(limits.values(), scores, strict=True):
            gap = right.mean(axis=1) - reference.mean(axis=1)  # [N']
            by_domain = {
                name: float(right[domain[chosen] == d].mean())
                for d, name in enumerate(names)
                if (domain[chosen] == d).any()
            }
            found.append(
                QualityCell(
                    running=running, top_k=top_k, routing_bias=bias, tokens=right.size,
                    accuracy=float(right.mean()), minus_standard=float(gap.mean()),
                    standard_error=float(gap.std(ddof=1) / len(gap) ** 0.5), confidence=confidence,
                    entropy=entropy, experts_read=experts_read, by_domain=by_domain,
                )
            )  # fmt: skip
    return tuple(found)


def _span(texts: Texts, tokens: int) -> tuple[int, int]:
    """First and last position, exclusive, whose next token is scored."""
    first = texts.reference.shape[1] // 2
    return first, min(first + tokens, texts.reference.shape[1])


def score(
    engine: Engine, tokens: np.ndarray, chosen: np.ndarray, running: int, top_k: int, limits: Sequence[int],
    first: int, last: int,
) -> list[Score]:  # fmt: skip
    """Decode positions of documents, so many documents together, once for each number of readable experts.

    Args:
        engine: captured and empty, over the documents.
        tokens: of the documents.  # [N, positions]
        chosen: documents to score.  # [N']
        running: that decode together, of which N' is a multiple.
        top_k: experts per token, of the prompts too.
        limits: readable experts.
        first: position whose next token is the first answer; what lies before is the prompt.
        last: the position behind the last answer's.
    """
    right = np.zeros((len(limits), len(chosen), last - first), bool)
    sums = np.zeros((len(limits), 3))
    for start in range(0, len(chosen), running):
        group = chosen[start : start + running]
        slots = np.array([engine.reserve(last) for _ in group], np.int32)
        read_prompts(engine, slots, group, first, top_k)
        engine.usage()  # forgets the prompts'
        for number, limit in enumerate(limits):  # answers overwrite the keys and values of those before
            for position in range(first, last):
                at = np.full(len(group), position, np.int32)
                answers = engine.launch(Rows(slots, at, group), top_k, limit).answers()
                place = slice(start, start + len(group))
                right[number, place, position - first] = answers[0] == tokens[group, position + 1]
                sums[number, :2] += answers[1:3].sum(axis=1)
            sums[number, 2] += engine.usage()[1].sum(axis=1).mean()
        for slot in slots.tolist():
            engine.release(slot)
    mean = sums / right[0].size
    mean[:, 2] *= running  # of steps, not of tokens
    return [Score(right[n], *mean[n].tolist()) for n in range(len(limits))]


def read_prompts(engine: Engine, slots: np.ndarray, documents: np.ndarray, length: int, top_k: int) -> None:
    """Read the first `length` positions of each document, in as few steps as there is room for."""
    slot, document = slots.repeat(length), documents.repeat(length)
    position = np.tile(np.arange(length, dtype=np.int32), len(slots))
    for start in range(0, len(slot), engine.max_rows):
        part = slice(start, start + engine.max_rows)
        rows = Rows(slot[part], position[part], document[part])
        engine.launch(rows, top_k, engine.model.config.n_experts)
    engine.synchronize()
