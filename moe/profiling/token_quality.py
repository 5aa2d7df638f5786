"""How good answers are under knobs: passages of documents, decoded by the engine that serves.

Passages of one domain decode together in groups of so many running sequences, since what a step may read, and
reads, depends on who runs: those of a service are of the text in force. Each token is compared with its own
entry under the trained knobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moe.lm.config import readable_experts
from moe.lm.engine.engine import Engine
from moe.lm.engine.rows import Rows
from moe.service.generate.sequences import Texts
from moe.token_profile import OfDomain, QualityCell

BIASES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Routing biases; of those that allow a step the same number of experts the lowest is measured."""
PARTS = 16
"""Of a document, by which the standard service's accuracy is told."""


class Passages(NamedTuple):
    """What is decoded: tokens of documents from a position on, which follow what was read up to there."""

    document: np.ndarray
    """int32 [N']"""
    first: np.ndarray
    """Position whose next token is the first answer, int32.  # [N']"""
    tokens: int
    """Answers of each."""

    @property
    def positions(self) -> np.ndarray:
        """Those whose next tokens are the answers.  # [N', tokens]."""
        return self.first[:, None] + np.arange(self.tokens, dtype=np.int32)


class Score(NamedTuple):
    """How passages were answered."""

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
        plan: groups of passages of each domain, by running sequences. With one sequence a bias is not
            measured: its top k are read anyway.
        tokens: of each passage.

    Raises:
        ValueError: a domain has too few passages.
    """
    c = engine.model.config
    top_ks = [k for k in (8, 4, 2, 1) if k <= c.top_k]
    cells = [(n, k) for n in sorted(plan) for k in top_ks]
    present = {name: np.flatnonzero(domain == d) for d, name in enumerate(names) if (domain == d).any()}
    found: list[QualityCell] = []
    for running, top_k in tqdm(cells, desc="quality", unit="setting", delay=2.0):
        limits: dict[int, float] = {}
        for bias in BIASES if running > 1 else (0.0,):
            limits.setdefault(readable_experts(bias, c.n_experts, top_k), bias)
        parts = {
            name: passages(of_domain, running * plan[running], texts.reference.shape[1], tokens)
            for name, of_domain in present.items()
        }
        scores = {
            name: score(engine, texts.tokens, part, running, top_k, tuple(limits))
            for name, part in parts.items()
        }
        for number, bias in enumerate(limits.values()):
            of_bias = {name: scores[name][number] for name in present}
            gaps = {
                name: of.right.mean(axis=1) - _reference(texts, parts[name]).mean(axis=1)
                for name, of in of_bias.items()
            }  # [N'] each
            every = np.concatenate(list(gaps.values()))
            found.append(
                QualityCell(
                    running=running, top_k=top_k, routing_bias=bias,
                    tokens=sum(of.right.size for of in of_bias.values()),
                    accuracy=_mean(of.right.mean() for of in of_bias.values()),
                    minus_standard=float(every.mean()),
                    standard_error=float(every.std(ddof=1) / len(every) ** 0.5),
                    confidence=_mean(of.confidence for of in of_bias.values()),
                    entropy=_mean(of.entropy for of in of_bias.values()),
                    experts_read=_mean(of.experts_read for of in of_bias.values()),
                    by_domain={
                        name: OfDomain(
                            accuracy=float(of.right.mean()), minus_standard=float(gaps[name].mean()),
                            experts_read=of.experts_read,
                        )
                        for name, of in of_bias.items()
                    },
                )
            )  # fmt: skip
    return tuple(found)


def _mean(values: Iterable[Any]) -> float:
    return float(np.mean(list(values)))


def _reference(texts: Texts, part: Passages) -> np.ndarray:
    """Which answers of passages the standard service has right, bool.  # [N', tokens]."""
    return texts.reference[part.document[:, None], part.positions]


def standard_by_position(
    texts: Texts, domain: np.ndarray, names: Sequence[str]
) -> dict[str, tuple[float, ...]]:
    """Share of tokens that the standard service has right, per domain, in `PARTS` of a document."""
    return {
        name: tuple(
            float(part.mean()) for part in np.array_split(texts.reference[domain == d], PARTS, axis=1)
        )
        for d, name in enumerate(names)
        if (domain == d).any()
    }


def passages(documents: np.ndarray, count: int, positions: int, tokens: int) -> Passages:
    """Draw different passages evenly from documents and from where in them, alike every time.

    Raises:
        ValueError: there are fewer.
    """
    first = np.arange(tokens, positions - tokens + 1, tokens, dtype=np.int32)
    there = len(first) * len(documents)
    if count > there:
        raise ValueError(
            f"{len(documents)} documents of {positions} positions have {there} passages of {tokens} tokens, "
            f"and {count} are asked for: score fewer or shorter ones"
        )
    chosen = np.random.default_rng(0).permutation(there)[:count]
    document = documents[chosen % len(documents)].astype(np.int32)
    return Passages(document, first[chosen // len(documents)], tokens)


def score(
    engine: Engine, tokens: np.ndarray, part: Passages, running: int, top_k: int, limits: Sequence[int]
) -> list[Score]:
    """Decode passages, so many together, once for each number of readable experts.

    Args:
        engine: captured and empty, over the documents.
        tokens: of the documents.  # [N, positions]
        part: what is decoded.
        running: passages that decode together, of which N' must be a multiple.
        top_k: experts per token, of the prompts too.
        limits: readable experts.

    Raises:
        ValueError: passages that make no whole groups.
    """
    if len(part.document) % running:
        raise ValueError(f"{len(part.document)} passages make no whole groups of {running}")
    right = np.zeros((len(limits), *part.positions.shape), bool)
    sums = np.zeros((len(limits), 3))
    for start in range(0, len(part.document), running):
        place = slice(start, start + running)
        document, first = part.document[place], part.first[place]
        slots = np.array([engine.reserve(int(at) + part.tokens) for at in first], np.int32)
        read_prompts(engine, slots, document, first, top_k)
        engine.usage()  # forgets the prompts'
        for number, limit in enumerate(limits):  # answers overwrite the keys and values of those before
            for step in range(part.tokens):
                at = first + np.int32(step)
                answers = engine.launch(Rows(slots, at, document), top_k, limit).answers()
                right[number, place, step] = answers[0] == tokens[document, at + 1]
                sums[number, :2] += answers[1:3].sum(axis=1)
            sums[number, 2] += engine.usage()[1].sum(axis=1).mean()
        for slot in slots.tolist():
            engine.release(slot)
    mean = sums / right[0].size
    mean[:, 2] *= running  # of steps, not of tokens
    return [Score(right[n], *mean[n].tolist()) for n in range(len(limits))]


def read_prompts(
    engine: Engine, slots: np.ndarray, documents: np.ndarray, lengths: np.ndarray, top_k: int
) -> None:
    """Read the first positions of each document, `lengths` of them, in as few steps as there is room for."""
    slot, document = slots.repeat(lengths), documents.repeat(lengths)
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    for start in range(0, len(slot), engine.max_rows):
        part = slice(start, start + engine.max_rows)
        rows = Rows(slot[part], position[part], document[part])
        engine.launch(rows, top_k, engine.model.config.n_experts)
    engine.synchronize()
