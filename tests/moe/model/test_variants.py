"""Variants keep what they claim to keep: parameters, the other experts, the shipped config."""

import pytest
import torch

from moe.model.config import ALIGNMENT, SIZES, TASKS, model_config
from moe.model.transformer import MoEModel
from moe.model.variants import even, fixed_k, with_balance_bias, with_norm, with_zero_computation

CONFIGS = [model_config(task, size) for task in TASKS for size in SIZES]
IDS = [f"{task}-{size}" for task in TASKS for size in SIZES]


def n_params(config):
    with torch.device("meta"):
        return MoEModel(config).n_params


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_even_experts_have_one_width_and_as_many_parameters(config):
    standard = even(config)
    assert len(set(standard.expert_widths)) == 1
    assert standard.n_experts == config.n_experts
    alignment = config.n_layers * config.n_experts * 3 * config.d_model * ALIGNMENT // 2
    assert abs(n_params(standard) - n_params(config)) <= alignment
    assert even(standard) == standard


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_zero_computation_adds_router_rows_and_constants_only(config):
    kinds = ("zero", "copy", "constant")
    wider = with_zero_computation(config, kinds)
    assert wider.expert_widths == (*config.expert_widths, 0, 0, 0)
    assert wider.zero_computation == kinds
    rows, constant = 3 * config.d_model, 3 * config.d_model
    assert n_params(wider) - n_params(config) == config.n_layers * (rows + constant)
    assert even(wider) == with_zero_computation(even(config), kinds)
    assert with_zero_computation(config, ()) == config


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_others_change_one_thing(config):
    assert fixed_k(config, 3).top_k_choices == (3,)
    assert fixed_k(config, 3).top_k == 3
    assert n_params(fixed_k(config, 3)) == n_params(with_balance_bias(config)) == n_params(config)
    assert with_balance_bias(config).balance_bias
    with pytest.raises(ValueError, match=r"within 1\.\."):
        fixed_k(config, config.n_experts + 1)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_norm_changes_its_own_parameters_alone(config):
    norms = 2 * config.n_layers + 1
    layer, rms = with_norm(config, "layer"), with_norm(config, "rms")
    assert n_params(layer) - n_params(rms) == norms * config.d_model
    assert with_norm(layer, config.norm) == config
    if config.task == "vision":
        assert n_params(with_norm(config, "group")) == n_params(layer) == n_params(config)
