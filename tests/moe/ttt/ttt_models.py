"""Small models, inputs and states that the tests of test-time training share."""

import torch
from torch import Tensor

from moe import ttt
from moe.model.config import ModelConfig, model_config
from moe.model.transformer import MoEModel, initialise
from moe.model.variants import with_norm, with_rotation_head

VISION = model_config("vision", "tiny")
RMS_VISION, LAYER_VISION, GROUP_VISION = (with_norm(VISION, norm) for norm in ("rms", "layer", "group"))
OF_ONE_SAMPLE = (RMS_VISION, LAYER_VISION, GROUP_VISION)  # norms of one sample, without running statistics
TURNING = with_rotation_head(VISION)


def make_model(config: ModelConfig) -> MoEModel:
    """An untrained model with a sharp head, so that entropies differ, about the margin of 0.4."""
    model = initialise(MoEModel(config), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        sharpness = {"batch": 180, "rms": 60, "layer": 60, "group": 70}
        model.head.weight.mul_(sharpness[config.norm] if config.task == "vision" else 5)
        if model.rotation_head is not None:
            model.rotation_head.weight.mul_(20)
    return model


def make_inputs(config: ModelConfig, seed: int, n: int = 24) -> Tensor:
    shape, high = ((n, 28, 28), 256) if config.task == "vision" else ((4, 32), 256)
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def whole_state(model: MoEModel, state: ttt.AdaptationState) -> dict[str, Tensor]:
    """Every tensor a step could change, found without the code under test."""
    tensors = dict(model.state_dict()) | {f"average {name}": value for name, value in state.averages.items()}
    if state.optimizer is not None:
        for i, memory in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {key}": value for key, value in memory.items() if value is not None}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=False)


def in_group(name: str, group: str) -> bool:
    return {
        "norms": "norm" in name,
        "router": ".router." in name,
        "expert_norms": ".moe_norm." in name,
        "last_block": name.startswith("blocks.1."),
    }[group]
