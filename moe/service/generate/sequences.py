"""The sequences that run together: which token rows the next step has, and what its answers mean.

No clock and no model: whoever launches steps says when they ended and what they answered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from moe.lm.engine.rows import Rows


@dataclass(frozen=True)
class Request:
    """A request that is admitted: its place, and what it asks."""

    slot: int
    request_class: int
    arrived_s: float
    document: int
    prompt: int
    """Tokens."""
    output: int
    """Tokens, at least 1."""


@dataclass(frozen=True)
class Finished:
    """Requests whose last token a step brought; all arrays are of them.  # [n] each."""

    slot: np.ndarray
    request_class: np.ndarray
    ttft_s: np.ndarray
    """Time to first token, from arrival."""
    tpot_s: np.ndarray
    """Time per output token after the first; 0 where there is one alone."""
    latency_s: np.ndarray
    """From arrival to the last token."""
    output: np.ndarray
    """Tokens."""
    right: np.ndarray
    """Tokens that were the text's own."""


@dataclass(frozen=True)
class Texts:
    """The documents that requests are about, on the host.

    Attributes:
        tokens: Their text, int32.  # [N, S + 1]
        reference: Whether the standard service predicts the token behind each position, bool.  # [N, S]
    """

    tokens: np.ndarray
    reference: np.ndarray


@dataclass
class Counts:
    """Sums over output tokens, and prompt tokens."""

    prefill_tokens: int = 0
    output_tokens: int = 0
    """Output tokens, the first of each answer too."""
    right: int = 0
    reference: int = 0
    confidence: float = 0.0
    entropy: float = 0.0


@dataclass
class Sequences:
    """All running sequences, by slot.

    Attributes:
        n_running: Per class, admitted and not finished.  # [2]
        counts: Of output tokens.
    """

    texts: Texts
    slots: int
    n_running: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        n = self.slots
        (
            self._class,
            self._document,
            self._prompt,
            self._output,
            self._position,
            self._right,
        ) = np.zeros((6, n), np.int32)
        self._arrived_s, self._first_s = np.zeros((2, n))
        self._decoding = np.zeros(0, np.int32)  # slots, in order of admission
        self._prefilling: deque[int] = deque()

    @property
    def running(self) -> int:
        """Sequences of all classes."""
        return int(self.n_running.sum())

    @property
    def has_work(self) -> bool:
        """Whether a step would have rows; what runs may also wait for a step under way."""
        return bool(self._prefilling) or len(self._decoding) > 0

    def admit(self, request: Request) -> None:
        """Let a request run; its prompt is first."""
        slot = request.slot
        self._class[slot], self._document[slot] = request.request_class, request.document
        self._prompt[slot], self._output[slot] = request.prompt, request.output
        self._position[slot] = self._right[slot] = 0
        self._arrived_s[slot] = request.arrived_s
        self.n_running[request.request_class] += 1
        self._prefilling.append(slot)

    def next_rows(self, most: int) -> tuple[Rows, bool]:
        """Rows of the next step: a token of every answer, and prompts in what room is left.

        Args:
            most: Rows of a step.

        Returns:
            The rows, and whether any is of a prompt.
        """
        decode = self._decoding[:most]
        position = self._position[decode]
        parts = [(decode, position)]
        self._position[decode] += 1
        # A row predicts the token behind it, so the last token of an answer needs no row of its own.
        last = position + 2 >= self._prompt[decode] + self._output[decode]
        still = np.concatenate([self._decoding[most:], decode[~last]])  # who found no room is first next time
        room = most - len(decode)
        while self._prefilling and room:
            slot = self._prefilling[0]
            first = int(self._position[slot])
            taken = min(room, int(self._prompt[slot]) - first)
            parts.append((np.full(taken, slot, np.int32), np.arange(first, first + taken, dtype=np.int32)))
            self._position[slot] = first + taken
            room -= taken
            if first + taken == self._prompt[slot]:
                self._prefilling.popleft()
                if self._output[slot] > 1:
                    still = np.append(still, np.int32(slot))
        self._decoding = still
        slot = np.concatenate([part[0] for part in parts])
        rows = Rows(slot, np.concatenate([part[1] for part in parts]), self._document[slot])
        return rows, len(parts) > 1

    def inside_prompts(self, rows: Rows) -> np.ndarray:
        """Which rows are followed by a token of their prompt, known whatever is answered, int64.  # [n]."""
        return np.flatnonzero(rows.position + 1 < self._prompt[rows.slot])

    def collect(self, rows: Rows, answers: np.ndarray, ended_s: float) -> Finished | None:
        """Take in what a step found; steps come in the order of their launch.

        Args:
            rows: Of the step.
            answers: See `Step.answers`.  # [4, T]
            ended_s: When it ended.

        Returns:
            Who is done, None if nobody.
        """
        prompt = self._prompt[rows.slot]
        output = rows.position >= prompt - 1  # who predicts a token of an answer
        slot, position, document = rows.slot[output], rows.position[output], rows.document[output]
        token, confidence, entropy = answers[:3, output]
        right = token == self.texts.tokens[document, position + 1]
        reference = self.texts.reference[document, position]
        self._right[slot] += right  # a step has one such row of a slot at most
        self.counts.prefill_tokens += int((rows.position < prompt).sum())
        self.counts.output_tokens += len(slot)
        self.counts.right += int(right.sum())
        self.counts.reference += int(reference.sum())
        self.counts.confidence += float(confidence.sum())
        self.counts.entropy += float(entropy.sum())
        self._first_s[slot[position == self._prompt[slot] - 1]] = ended_s
        done = slot[position + 2 == self._prompt[slot] + self._output[slot]]
        if not len(done):
            return None
        np.subtract.at(self.n_running, self._class[done], 1)
        first_s, tokens = self._first_s[done], self._output[done]
        return Finished(
            slot=done, request_class=self._class[done], ttft_s=first_s - self._arrived_s[done],
            tpot_s=(ended_s - first_s) / np.maximum(1, tokens - 1),
            latency_s=ended_s - self._arrived_s[done], output=tokens, right=self._right[done],
        )  # fmt: skip
