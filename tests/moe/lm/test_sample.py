"""Sampling with the engine that serves: against decoding by whole windows, and as a command."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from moe.lm.engine import sample as command
from moe.lm.engine.sample import SampleOptions, sample, text_of
from moe.lm.text import END_ID, tokenizer
from moe.lm.weights import load_model
from tests.moe.lm.plain_decoder import TINY, make_model, make_tokens


def greedy(model, prompt: list[int], n: int) -> list[int]:
    """Append the likeliest token, each time by a pass over the whole text so far."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            x, _ = model(torch.tensor([text]))
            text.append(int(model.logits(x[0, -1]).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 2, 30])
def test_temperature_0_takes_the_likeliest_token_of_the_whole_window(length: int) -> None:
    model, prompt = make_model(TINY), make_tokens(1, length)[0].numpy()
    assert sample(model, prompt, 25).tolist() == greedy(model, prompt.tolist(), 25)


def test_a_prompt_longer_than_a_step_goes_in_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_CHUNK", 7)
    model, prompt = make_model(TINY), make_tokens(1, 30)[0].numpy()
    assert sample(model, prompt, 10).tolist() == greedy(model, prompt.tolist(), 10)


def test_the_shipped_model_decodes_greedily_as_by_whole_windows() -> None:
    model, prompt = load_model("small", "cpu"), tokenizer().encode("def main(").ids
    assert sample(model, np.array(prompt), 12).tolist() == greedy(model, prompt, 12)


def test_the_seed_decides_and_tokens_are_drawn_by_their_probability() -> None:
    model, prompt = make_model(TINY), make_tokens(1, 5)[0].numpy()
    first, again, other = (sample(model, prompt, 40, 1.0, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    # The coldest draws are the likeliest tokens; a draw of one token follows the softmax of its logits.
    assert sample(model, prompt, 20, 1e-4, 3).tolist() == greedy(model, prompt.tolist(), 20)
    with torch.no_grad():
        x, _ = model(torch.from_numpy(prompt)[None].long())
        p = (model.logits(x[0, -1]) / 0.2).softmax(dim=-1).numpy()
    drawn = np.bincount([sample(model, prompt, 1, 0.2, seed)[0] for seed in range(300)], minlength=512) / 300
    top = p.argsort()[-5:]
    np.testing.assert_allclose(drawn[top], p[top], atol=0.12)  # over four standard errors of any share


def test_what_does_not_fit_the_context_is_refused() -> None:
    model = make_model(TINY)
    assert len(sample(model, np.array([1]), TINY.context)) == TINY.context
    with pytest.raises(ValueError, match="do not fit a context of 160"):
        sample(model, np.array([1]), TINY.context + 1)
    with pytest.raises(ValueError, match="give at least 1"):
        sample(model, np.array([], int), 5)


def test_a_text_ends_where_the_model_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    some = tokenizer().encode("x = 1\n").ids

    def ended(*arguments) -> np.ndarray:
        return np.array([*some, END_ID, *some])

    monkeypatch.setattr(command, "sample", ended)
    assert text_of(SampleOptions(prompt="# ")) == "# x = 1\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", *arguments])
    command.cli()


def test_the_command_writes_the_same_text_for_the_same_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for seed in "001":
        run(monkeypatch, "--prompt", "def main(", "--tokens", "20", "--device", "cpu", "--seed", seed)
        shown.append(capsys.readouterr().out)
    assert shown[0].startswith("def main(") and shown[0] == shown[1] != shown[2]
    run(monkeypatch, "--prompt", "", "--tokens", "5", "--device", "cpu")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--tokens", "2000", "--device", "cpu"), "do not fit a context of 1024"),
        (("--temperature", "nan"), "--temperature must lie in"),
        (("--temperature", "-1"), "--temperature must lie in"),
    ],
)
def test_the_command_refuses_by_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *arguments)
    assert message in f"{refused.value} {capsys.readouterr().err}"


@pytest.mark.gpu
def test_a_captured_engine_samples_the_same_text_as_a_cpu() -> None:
    prompt = make_tokens(1, 9)[0].numpy()
    on_card = sample(make_model(TINY, "cuda"), prompt, 25).tolist()
    assert on_card == greedy(make_model(TINY), prompt.tolist(), 25)
