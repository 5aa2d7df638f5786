"""The shape of a model: one frozen dataclass and the four shipped instances of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

Task = Literal["vision", "language"]
Size = Literal["tiny", "base"]
Norm = Literal["batch", "group", "layer", "rms"]
ZeroComputation = Literal["zero", "copy", "constant"]
Method = Literal[
    "batch_statistics", "tent", "eata", "sar", "roid", "eva", "rotation", "neo", "bank", "dynamic_evaluation"
]
Group = Literal["norms", "router", "expert_norms", "last_block"]
TASKS: tuple[Task, ...] = ("vision", "language")
SIZES: tuple[Size, ...] = ("tiny", "base")
NORMS: tuple[Norm, ...] = ("batch", "group", "layer", "rms")
ZERO_COMPUTATIONS: tuple[ZeroComputation, ...] = ("zero", "copy", "constant")

TTT_METHODS: dict[str, tuple[Method, ...]] = {
    "vision": ("batch_statistics", "tent", "eata", "sar", "roid", "eva", "rotation", "neo", "bank"),
    "language": ("dynamic_evaluation",),
}
"""Methods of test-time training by task, see `moe.ttt`."""
GROUPS: tuple[Group, ...] = ("norms", "router", "expert_norms", "last_block")
"""Groups of parameters that it may adapt, see `moe.ttt.collect_params`."""

IMAGE_SIZE = 28  # pixels; Fashion-MNIST is 28 x 28, one grey channel
ALIGNMENT = 8  # 16 bytes of bfloat16: grouped_mm refuses rows that are not a multiple of it


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Mixture-of-Experts transformer.

    Attributes:
        task: ``"vision"`` (28x28 grey images to classes) or ``"language"`` (bytes to the next byte).
        d_model: Width D of the residual stream.
        n_layers: Number of blocks, each attention followed by a Mixture-of-Experts layer.
        n_heads: Query heads.
        n_kv_heads: Key and value heads, each shared by ``n_heads / n_kv_heads`` query heads.
        head_dim: Width of one head.
        expert_widths: Hidden width F of each expert, widest first. Width 0 is a zero-computation expert.
        zero_computation: What each expert of width 0 answers instead, in their order: ``"zero"`` nothing,
            ``"copy"`` its input, ``"constant"`` a learned mix of its input and a learned vector (MoE++,
            arXiv 2410.07348, section 3.1).
        top_k: Experts per token when the caller names none.
        top_k_choices: Values of K the model is trained for, ascending.
        balance_bias: Whether routers carry a bias per expert that balances their load without a loss
            (arXiv 2408.15664): training moves it, serving keeps it.
        norm: Over what the stream is normalised: ``"batch"`` each channel of a batch, ``"group"`` each group
            of channels of a sample (both mix tokens, so they are for vision), ``"layer"`` or ``"rms"`` each
            token.
        patch_size: Edge of a square image patch in pixels (vision), each a token.
        stem: Widths of the stages of a convolutional stem, each of which halves the image (vision); its
            pixels are the tokens then. Empty: a linear map of each patch.
        context_length: Longest byte sequence (language).
        n_classes: Width of the output: classes, or 256 byte values.
        rotation_head: Whether a second head tells by how many quarters an image is turned (TTT,
            arXiv 1909.13231, section 2), for test-time training by `moe.ttt.rotation` (vision).

    Raises:
        ValueError: A rule between the fields is broken.
    """

    task: Task
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    expert_widths: tuple[int, ...]
    zero_computation: tuple[ZeroComputation, ...] = ()
    top_k: int = 4
    top_k_choices: tuple[int, ...] = (1, 2, 4, 8)
    balance_bias: bool = False
    norm: Norm
    patch_size: int = 7
    stem: tuple[int, ...] = ()
    context_length: int = 128
    n_classes: int
    rotation_head: bool = False

    def __post_init__(self) -> None:
        """Refuse a shape that could not run."""
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {self.task!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.norm in ("batch", "group") and self.task == "language":
            raise ValueError(
                f"norm {self.norm!r} mixes a token with later ones; use 'layer' or 'rms' for task 'language'"
            )
        for name in ("rotation_head", "stem"):
            if getattr(self, name) and self.task == "language":
                raise ValueError(f"{name} is for images: leave it out for task 'language'")
        if any(width < ALIGNMENT or width % ALIGNMENT for width in self.stem):
            raise ValueError(f"every width of stem must be a multiple of {ALIGNMENT}, got {self.stem}")
        for name in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "n_classes",
            "context_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % ALIGNMENT or any(width % ALIGNMENT for width in self.expert_widths):
            raise ValueError(
                f"d_model and every expert width must be a multiple of {ALIGNMENT} (16-byte rows for "
                f"grouped_mm), got d_model={self.d_model}, expert_widths={self.expert_widths}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if list(self.expert_widths) != sorted(self.expert_widths, reverse=True):
            raise ValueError(f"expert_widths must be sorted, widest first, got {self.expert_widths}")
        if not self.expert_widths or self.expert_widths[0] <= 0 or self.expert_widths[-1] < 0:
            raise ValueError(
                f"expert_widths needs one positive and no negative width, got {self.expert_widths}"
            )
        n_zero = self.expert_widths.count(0)
        if len(self.zero_computation) != n_zero or set(self.zero_computation) - set(ZERO_COMPUTATIONS):
            raise ValueError(
                f"zero_computation needs one of {ZERO_COMPUTATIONS} for each of the {n_zero} experts of "
                f"width 0, got {self.zero_computation}"
            )
        if self.n_experts > 255:
            raise ValueError(f"at most 255 experts (they are sorted as bytes), got {self.n_experts}")
        choices = self.top_k_choices
        if (
            not choices
            or list(choices) != sorted(set(choices))
            or not 1 <= choices[0] <= choices[-1] <= self.n_experts
        ):
            raise ValueError(f"top_k_choices must ascend within 1..{self.n_experts}, got {choices}")
        if self.top_k not in choices:
            raise ValueError(f"top_k must be one of top_k_choices {choices}, got {self.top_k}")
        if self.task == "vision" and (self.patch_size < 1 or IMAGE_SIZE % self.patch_size):
            raise ValueError(f"patch_size must divide {IMAGE_SIZE}, got {self.patch_size}")

    @property
    def n_experts(self) -> int:
        """Number of experts E in each layer."""
        return len(self.expert_widths)

    @property
    def expert_kinds(self) -> list[str]:
        """Each expert's width, or what it answers without one: experts of one name cost the same."""
        return [f"width {width}" for width in self.expert_widths if width] + list(self.zero_computation)

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of one request: patches of an image, pixels behind its stem, or bytes of a full context."""
        if self.task == "language":
            return self.context_length
        if self.stem:
            return math.ceil(IMAGE_SIZE / 2 ** len(self.stem)) ** 2
        return (IMAGE_SIZE // self.patch_size) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; ``rotation_head`` and ``stem`` only where there is one.

        So the records and hashes of models made before there were such parts stay what they are.
        """
        values = dataclasses.asdict(self)
        for name in ("rotation_head", "stem"):
            if not values[name]:
                del values[name]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build a config from ``to_dict``'s output.

        Raises:
            ValueError: A field is unknown or missing, or a rule is broken.
        """
        values = {"rotation_head": False, "stem": ()} | values
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            unknown, missing = sorted(set(values) - known), sorted(known - set(values))
            raise ValueError(
                f"model config: unknown fields {unknown}, missing {missing}; known: {sorted(known)}"
            )
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


def model_config(task: str, size: str) -> ModelConfig:
    """Return the shipped config of a task and size.

    ``tiny`` trains on two CPU cores in about a minute. ``base`` keeps an H100 at its power cap: almost all of
    its work is the experts' matrix products.

    Raises:
        ValueError: The task or size is unknown.
    """
    if task not in TASKS or size not in SIZES:
        raise ValueError(f"task must be one of {TASKS} and size one of {SIZES}, got {task!r}, {size!r}")
    shape: dict[str, Any]
    if size == "tiny":
        shape = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16}
        shape |= {"expert_widths": (160,) * 4 + (96,) * 4, "context_length": 64}
    else:
        shape = {"d_model": 2048, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "head_dim": 128}
        shape |= {"expert_widths": (1280,) * 8 + (768,) * 8, "context_length": 128}
    shape |= {"norm": "batch", "n_classes": 10} if task == "vision" else {"norm": "rms", "n_classes": 256}
    return ModelConfig(task=cast(Task, task), **shape)
