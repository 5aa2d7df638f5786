"""How many tokens requests have, from a trace of a production service.

Traces are of models with long contexts. One factor per trace brings prompts and outputs down, so that 99% of
its requests fit; the rest is cut. Request number r of a class has the lengths of a row that follows from the
episode's seed, so live service and twin serve the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from moe.compiled import jit
from moe.randomness import derive, integer
from moe.service.request_trace import TraceError, read_request_trace

FITTING = 0.99
"""Share of a trace's requests that fit the context after the factor."""
_STREAM = np.uint64(7)
"""Of an episode's seed, from which lengths and documents are drawn."""


@dataclass(frozen=True, kw_only=True)
class TokenLengths:
    """Prompt and output tokens of a trace's requests, as they are served."""

    prompt: np.ndarray
    """int32 [N], at least 1."""
    output: np.ndarray
    """int32 [N], likewise; with the prompt at most the context."""
    factor: float
    """By which the trace's tokens were multiplied."""
    truncated: int
    """Requests that were cut to fit."""
    without_output: int
    """Rows of the trace that asked for no output (failed requests), left out."""


def token_lengths(trace: str | Path, context: int) -> TokenLengths:
    """Read a trace's lengths and fit them to a context.

    Raises:
        TraceError: it cannot be used, or has no tokens.
    """
    path = Path(trace)
    return _token_lengths(str(trace), path.stat().st_mtime_ns if path.exists() else 0, context)


@lru_cache(maxsize=4)
def _token_lengths(path: str, changed_ns: int, context: int) -> TokenLengths:
    """The same, kept until the file changes."""
    trace = read_request_trace(path)
    if trace.prompt_tokens is None or trace.output_tokens is None:
        raise TraceError(
            f"{path}: has no columns of prompt and output tokens, which a service of tokens needs: name them "
            "ContextTokens and GeneratedTokens (Azure), or as BurstGPT or Mooncake do"
        )
    asked = trace.output_tokens > 0
    if not asked.any():
        raise TraceError(f"{path}: no request asks for output tokens; give a trace of answered requests")
    prompt, output = trace.prompt_tokens[asked], trace.output_tokens[asked]
    factor = min(1.0, context / float(np.quantile(prompt + output, FITTING)))
    prompt, output = (np.maximum(1, np.rint(n * factor)).astype(np.int32) for n in (prompt, output))
    long = prompt + output > context
    output = np.minimum(output, context - 1)
    prompt = np.minimum(prompt, context - output)
    return TokenLengths(
        prompt=prompt, output=output, factor=factor, truncated=int(long.sum()),
        without_output=int((~asked).sum()),
    )  # fmt: skip


@jit
def row_of(seed, c, request, n):
    """Which of `n` rows request number `request` of class `c` has.

    Args:
        seed: of the episode, uint64.
        c: class.
        request: its number.
        n: rows to choose from: of lengths, or documents of the domain in force.
    """
    return integer(derive(derive(seed, _STREAM), np.uint64(c)), request, n)
