"""Write text to read: `python -m moe.lm.engine.sample --prompt "def main("`.

The engine that serves given text samples too: its documents are a buffer of one text, and the token that a
step's logits give is written behind the step's row, on the device, before the next step is launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from moe.device.torch_device import pick_device
from moe.errors import one_line_errors
from moe.lm.config import Size
from moe.lm.engine.engine import Engine, Rows
from moe.lm.model import LanguageModel
from moe.lm.text import END_ID, tokenizer
from moe.lm.weights import load_model

_CHUNK = 256
"""Rows of a prompt that go in together."""


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Continue a text with a trained model, as it is trained: its own experts per token, no routing bias."""

    size: Size = "small"
    """`small` is shipped; `base` is trained by python -m moe.lm."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA when there is one."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = 100
    """Most tokens to add; a text that the model ends is shorter."""
    temperature: float = 0.8
    """By which logits are divided before a token is drawn; 0 takes the likeliest."""
    seed: int = 0
    """Of the draws: equal options give equal text on one device."""

    def __post_init__(self) -> None:
        """Refuse what adds nothing, or has no meaning."""
        if self.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, got {self.tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"--temperature must lie in [0, 100], got {self.temperature}")


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: np.ndarray, n_tokens: int, temperature: float = 0.0, seed: int = 0
) -> np.ndarray:
    """Continue a prompt; the host waits for the device only at the end.

    Args:
        model: in serving types, with experts.
        prompt: tokens, integers, at least 1.  # [P]
        n_tokens: N, to add; with the prompt at most the model's context and one.
        temperature: by which logits are divided before a token is drawn; 0 takes the likeliest.
        seed: of the draws.

    Returns:
        The tokens that were added, int32.  # [N]

    Raises:
        ValueError: no prompt, or with what is to be added it is longer than the model's context.
    """
    length, context = len(prompt) + n_tokens, model.config.context
    if not len(prompt) or length > context + 1:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {n_tokens} to add do not fit a context of {context}: give "
            f"at least 1 and at most {context + 1} tokens together"
        )
    text = np.zeros((1, length), np.int32)
    text[0, : len(prompt)] = prompt
    engine = Engine(model, text, slots=1, max_rows=min(_CHUNK, length))
    engine.capture()
    generator = torch.Generator(engine.documents.device).manual_seed(seed)
    slot, first = engine.reserve(length - 1), 0
    while first < length - 1:  # position `first` is the next to be read
        last = min(len(prompt), first + engine.max_rows) if first < len(prompt) else first + 1
        position = np.arange(first, last, dtype=np.int32)
        rows = Rows(np.full_like(position, slot), position, np.zeros_like(position))
        step = engine.launch(rows, model.config.top_k, model.config.n_experts)
        if last >= len(prompt):
            engine.documents[0, last] = _draw(step.logits[-1].float(), temperature, generator)
        first = last
    return engine.documents[0, len(prompt) :].cpu().numpy()


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A token by its logits, [V]; 0-dim."""
    if temperature == 0.0:
        return logits.argmax().int()
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[0].int()


def text_of(options: SampleOptions) -> str:
    """The prompt and what the model adds, up to where it ends the text.

    Raises:
        ValueError: see `sample`.
        WeightsError: no such weights; names the command that makes them.
    """
    model = load_model(options.size, pick_device(options.device))
    prompt = tokenizer().encode(options.prompt).ids or [END_ID]  # behind an end a text begins
    added = sample(model, np.array(prompt), options.tokens, options.temperature, options.seed).tolist()
    end = added.index(END_ID) if END_ID in added else len(added)
    return options.prompt + tokenizer().decode(added[:end])


def cli() -> None:
    """Run the command line."""
    with one_line_errors():
        print(text_of(tyro.cli(SampleOptions, prog="python -m moe.lm.engine.sample")))


if __name__ == "__main__":
    cli()
