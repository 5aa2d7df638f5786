"""A saved checkpoint under the live service: its requests, its answers, its profile, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.data.datasets import load_language
from moe.hf.families import HfModelError
from moe.hf.runner import SIZE, HfRunner, TokenPool, check_checkpoint, checkpoint_identity, load_runner
from moe.hf.steering import import_transformers
from moe.profiles import ProfileError, load_profile
from moe.profiling import command as profile_command
from moe.profiling import expert_cost
from moe.profiling.expert_cost import measure_alike_experts
from moe.service.score.live import LiveWorkload
from moe.service.traffic import TrafficConfig
from moe.training.weights import check_profile
from moe.workload import KnobRefusedError, Knobs
from tests.moe.conftest import made_up
from tests.moe.hf.hf_models import COST, VOCAB, E, build, every_family, gates_of, save_checkpoint
from tests.moe.service.made_up import Clock, Service
from tests.moe.service.test_live import assert_conserved

SHIFTS = ("clean", "code")
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "olmoe")


@pytest.fixture(scope="module")
def runner(folder: Path) -> HfRunner:
    return load_runner(folder, SHIFTS, "cpu")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("begins", [True, False])
def test_a_request_is_a_chunk_of_text_and_its_next_token(begins, tmp_path):
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(save_checkpoint(tmp_path, begins=begins))
    pool = TokenPool(tokenizer, VOCAB, CONTEXT, SHIFTS, "cpu")
    assert pool.inputs.shape == (2, len(pool), CONTEXT) and pool.targets.shape == (2, len(pool))
    for shift, domain in enumerate(("prose", "code")):
        text = load_language(domain, "test").numpy().tobytes().decode(errors="ignore")
        inputs, targets = pool.take(shift, torch.tensor([0, 700, len(pool) - 1]))
        assert bool((inputs[:, 0] == 0).all()) == begins
        for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
            asked = tokenizer.decode([*row[begins:], target], clean_up_tokenization_spaces=False)
            assert len(asked) >= CONTEXT - 2 and asked.strip("\ufffd") in text
    first = tokenizer.decode(pool.inputs[0, 0, int(begins) :].tolist(), clean_up_tokenization_spaces=False)
    assert load_language("prose", "test").numpy().tobytes().decode(errors="ignore").startswith(first)


def test_tokens_that_the_model_does_not_know_and_unknown_shifts_are_refused(folder):
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder)
    with pytest.raises(HfModelError, match="the model knows 100: they do not belong together"):
        TokenPool(tokenizer, 100, CONTEXT, SHIFTS, "cpu")
    with pytest.raises(ValueError, match="a language shift is one of"):
        TokenPool(tokenizer, VOCAB, CONTEXT, ("clean", "blur@5"), "cpu")


# ---------------------------------------------------------------- answers


@every_family
def test_a_loaded_checkpoint_answers_as_the_model_that_was_saved(family, tmp_path):
    runner, model = load_runner(save_checkpoint(tmp_path, family), ("clean",), "cpu"), build(family, 2)
    assert (runner.n_experts, runner.top_k, runner.top_k_choices, runner.adapts) == (E, 4, (1, 2, 4), False)
    inputs, targets = runner.samples.take(0, runner.order[:5])
    expected = model(input_ids=inputs).logits[:, -1]
    with torch.no_grad():
        found = runner.answer(inputs, 2, 1.0)
    torch.testing.assert_close(found.logits, expected)
    result = runner.launch([(0, 5)], 0, Knobs(expert_count=2, batch_size=5)).result()
    assert result.correct.tolist() == (expected.argmax(dim=-1) == targets).tolist()
    probabilities = expected.softmax(dim=-1)
    assert result.confidence_sum == pytest.approx(probabilities.amax(dim=-1).sum().item(), rel=1e-5)
    layers = len(gates_of(model))
    assert result.tokens_per_expert.shape == (layers, E)
    assert result.tokens_per_expert.sum(axis=1).tolist() == [inputs.numel() * 2] * layers


def test_the_count_asked_for_is_a_power_of_two_or_the_models_own(tmp_path):
    path = save_checkpoint(tmp_path, "deepseek_v3", num_experts_per_tok=6)
    assert load_runner(path, ("clean",), "cpu").top_k_choices == (1, 2, 4, 6)


def test_a_cost_of_experts_makes_the_bias_work(runner):
    knobs = [Knobs(expert_count=2, routing_bias=bias) for bias in (0.0, 1.0)]
    plain, alike = (runner.launch([(0, 40)], 0, k).result() for k in knobs)
    assert np.array_equal(plain.tokens_per_expert, alike.tokens_per_expert)
    assert plain.entropy_sum == alike.entropy_sum
    runner.knobs.expert_cost = COST
    try:
        biased = runner.launch([(0, 40)], 0, knobs[1]).result()
    finally:
        runner.knobs.expert_cost = None
    cheap, plain_cost = biased.tokens_per_expert @ COST.numpy(), plain.tokens_per_expert @ COST.numpy()
    assert np.all(cheap < 0.8 * plain_cost)


def test_a_live_episode_answers_every_request(folder):
    clock = Clock()
    runner = load_runner(folder, SHIFTS, "cpu", clock)
    answer = runner.answer

    def timed(inputs: Any, expert_count: int, routing_bias: float) -> Any:
        clock.sleep(0.004 + len(inputs) * expert_count * 1e-3)
        return answer(inputs, expert_count, routing_bias)

    runner.answer = timed
    traffic = TrafficConfig(kind="poisson", low_load=0.5, high_load=0.5, shifts=(0, 1), shift_dwell_s=1.0)
    live = LiveWorkload(runner, traffic, 400.0, 4, Service(), clock=clock, sleep=clock.sleep)
    live.warm_up([8], [1, 4], 0)
    live.reset(3)
    waiting = (0.0, 0.0)
    for knobs in (Knobs(batch_size=8, expert_count=1), Knobs(batch_size=4, expert_count=4)) * 2:
        stats = live.run(knobs, 0.5)
        waiting = assert_conserved(stats, waiting)
        answered = int(sum(stats.answered))
        assert answered > 0 and stats.tokens_per_expert is not None
        tokens = answered * CONTEXT * knobs.expert_count
        assert stats.tokens_per_expert.sum(axis=1).tolist() == [tokens, tokens]
    with pytest.raises(KnobRefusedError, match="no batch norms"):
        live.run(Knobs(expert_count=1, ttt_steps=1), 0.5)
    with pytest.raises(KnobRefusedError, match="has 8 experts"):
        live.run(Knobs(expert_count=9), 0.5)


# ---------------------------------------------------------------- profile and identity


def test_the_command_measures_a_checkpoint(folder, tmp_path, capsys):
    out = tmp_path / "mine.json"
    profile_command.main(
        profile_command.Options(
            task="language", model=folder, device="cpu", out=out, batch_sizes=(1, 4), window_s=0.01,
            within_s=0.1, samples=60,
        )
    )  # fmt: skip
    assert str(out) in capsys.readouterr().out
    measured = load_profile(out)
    assert (measured.task, measured.size, measured.shifts) == ("language", SIZE, SHIFTS)
    assert measured.expert_count.tolist() == [1, 2, 4] and measured.own_k == 2
    assert measured.routing_bias.tolist() == measured.cost_bias.tolist() == [0.0]
    assert measured.expert_share.shape == (3, 1, 2, E) and measured.energy_j is None
    assert measured.expert_cost.tolist() == [1.0] * E
    assert measured.model == checkpoint_identity(folder)
    assert measured.provenance["checkpoint"] == str(folder)
    check_checkpoint(measured, folder)
    with pytest.raises(ProfileError, match=r"the checkpoint olmoe .*name the checkpoint too \(--model"):
        check_profile(measured)
    own = load_runner(folder, SHIFTS, "cpu")
    inputs, targets = own.samples.take(1, own.order[:60])
    with torch.no_grad():
        right = own.answer(inputs, 4, 0.0).predictions == targets
    assert measured.accuracy[1, 0, 2, 0] == pytest.approx(right.double().mean().item())


def test_the_cost_of_an_expert_is_that_of_tokens_spread_evenly(runner, monkeypatch):
    monkeypatch.setitem(expert_cost.WINDOW_S, "cpu", 0.01)
    monkeypatch.setitem(expert_cost.WARM_S, "cpu", 0.0)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        for layer in runner.model.model.layers
    ]
    cost = measure_alike_experts(runner, None, 0)
    for hook in hooks:
        hook.remove()
    assert cost.relative().tolist() == [1.0] * E and np.all(cost.latency_s > 0) and cost.energy_j is None
    n_tokens = expert_cost.TOKENS["cpu"]
    for experts in seen[2:]:  # the first are the model's own pass
        assert torch.bincount(experts.flatten(), minlength=E).tolist() == [n_tokens // E] * E


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "language"}, "either size or model"),
        ({"task": "language", "size": "tiny", "model": Path("x")}, "either size or model"),
        ({"task": "vision", "model": Path("x")}, "a checkpoint answers language, not 'vision'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        profile_command.Options(device="cpu", out=Path("x.json"), **options)


def test_a_profile_of_another_model_is_refused_by_both_names(folder, copy):
    known = checkpoint_identity(folder)
    measured = replace(made_up(), size=SIZE, model=known, provenance={"checkpoint": "here"})
    check_checkpoint(measured, copy)  # the place does not matter
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "5.99"}))
    check_checkpoint(measured, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, copy / "model.safetensors")
    both = rf"checkpoint olmoe \w+ \(here\), {copy} is the checkpoint olmoe \w+: \['weights_sha256'\]"
    with pytest.raises(ProfileError, match=both):
        check_checkpoint(measured, copy)
    with pytest.raises(ProfileError, match=rf"the model vision-tiny, {folder} is the checkpoint olmoe"):
        check_checkpoint(made_up(), folder)
    shutil.copy(folder / "model.safetensors", copy)
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ProfileError, match="'data_sha256'"):
        check_checkpoint(measured, copy)
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ProfileError, match="'config'"):
        check_checkpoint(measured, copy)


def test_a_large_checkpoint_is_known_by_all_its_files(tmp_path):
    path = save_checkpoint(tmp_path / "sharded")
    build("olmoe").save_pretrained(path, max_shard_size="100KB")
    (path / "model.safetensors").unlink()
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    before = checkpoint_identity(path)["weights_sha256"]
    tensors = load_file(shards[-1])
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, shards[-1], metadata={"format": "pt"})
    assert checkpoint_identity(path)["weights_sha256"] != before
    assert load_runner(path, ("clean",), "cpu").n_experts == E


@every_family
def test_the_identity_knows_the_width_of_every_expert(family, tmp_path):
    config = checkpoint_identity(save_checkpoint(tmp_path, family))["config"]
    assert config["top_k"] == 4 and config["expert_widths"] == [16] * E


# ---------------------------------------------------------------- refusals


def test_folders_that_hold_no_checkpoint_are_refused(copy, tmp_path):
    with pytest.raises(HfModelError, match=r"no config\.json.*hf download"):
        load_runner(tmp_path / "none", SHIFTS, "cpu")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(HfModelError, match=r"no \*\.safetensors"):
        load_runner(copy, SHIFTS, "cpu")


def test_a_checkpoint_without_a_tokenizer_or_a_package_for_its_weights_is_named(copy, monkeypatch):
    def quantised(*_, **__):
        raise ImportError("Using mxfp4 requires Accelerate")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", quantised)
        with pytest.raises(HfModelError, match=rf"{copy}: Using mxfp4 requires Accelerate"):
            load_runner(copy, SHIFTS, "cpu")
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(HfModelError, match=rf"{copy} has no tokenizer: put the checkpoint's own tokenizer"):
        load_runner(copy, SHIFTS, "cpu")


def test_damaged_and_incomplete_weights_are_refused(copy):
    path = copy / "model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.1.mlp.gate.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(HfModelError, match=rf"1 tensors are missing .* the first is {lost}"):
        load_runner(copy, SHIFTS, "cpu")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][1:].clone()}, path, {"format": "pt"})
    with pytest.raises(HfModelError, match=r"missing or of another shape, the first is lm_head\.weight"):
        load_runner(copy, SHIFTS, "cpu")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(HfModelError, match="the weights cannot be read"):
        load_runner(copy, SHIFTS, "cpu")


def test_a_model_without_experts_is_refused_before_it_is_read(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["num_experts"]
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(HfModelError, match="'llama' is not a Mixture-of-Experts model"):
        load_runner(copy, SHIFTS, "cpu")
