"""A Hugging Face checkpoint under the live service: a folder on this disk, its runner, and its identity.

A request is a chunk of text in the checkpoint's own tokens; what is asked is the next token. Nothing is
downloaded, no code of the checkpoint is run, and weights are read from safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from moe.data.datasets import data_digest
from moe.data.pools import SamplePool, cut, text_of_shift
from moe.device.torch_device import serving_dtype
from moe.files import read_json
from moe.hf.families import HfModelError, family_of
from moe.hf.steering import attach, import_transformers
from moe.model.transformer import ModelOutput
from moe.profiles import Profile, ProfileError
from moe.service.score.runner import Runner

SIZE = "hf"
"""`Profile.size` of a checkpoint."""
CHUNK_TOKENS = 128
"""Length of a request, less where the model has a shorter context."""
_TOKENIZER_FILES = "*token*"
_TOKENIZER = (
    "put the checkpoint's own tokenizer files (tokenizer.json, tokenizer_config.json) into its folder"
)


class TokenPool(SamplePool):
    """Requests in tokens of a checkpoint: `inputs` are int64 [S, N, length], `targets` the next tokens."""

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        length: int,
        shifts: Sequence[str],
        device: torch.device | str,
    ) -> None:
        """Tokenise the test texts and cut them.

        Args:
            tokenizer: the checkpoint's. Where it begins a text with a token of its own, each request does.
            vocab_size: tokens that the model knows.
            length: tokens of a request.
            shifts: names of language shifts, see `SamplePool`.
            device: where the pool lives.

        Raises:
            HfModelError: the tokenizer has no tokens, or some that the model does not know.
            ValueError: a shift is unknown.
        """
        self.task, self.shifts = "language", tuple(shifts)
        start = tokenizer("a").input_ids[:1]
        start = start if start == [tokenizer.bos_token_id] else []
        parts = []
        for shift in self.shifts:
            # The text was cut at a byte: the character there may not be whole.
            text = text_of_shift(shift).numpy().tobytes().decode(errors="ignore")
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # [n]
            if not len(tokens):
                raise HfModelError(
                    f"the tokenizer makes no tokens of the text of shift {shift!r}: {_TOKENIZER}"
                )
            if int(tokens.max()) >= vocab_size:
                raise HfModelError(
                    f"the tokenizer gives token {int(tokens.max())}, the model knows {vocab_size}: they "
                    f"do not belong together; {_TOKENIZER}"
                )
            chunks, following = cut(tokens, length - len(start))
            begin = torch.tensor(start, dtype=torch.int64).expand(len(chunks), len(start))
            parts.append((torch.cat([begin, chunks], dim=1), following))
        self.inputs = torch.stack([inputs for inputs, _ in parts]).to(device)  # [S, N, length]
        self.targets = torch.stack([targets for _, targets in parts]).to(device)  # [S, N]


class HfRunner(Runner):
    """`Runner` of a checkpoint: it does not adapt, and the process keeps its threads.

    Attributes:
        knobs: The attachment to the model. Experts of a checkpoint are alike, so `routing_bias` changes
            nothing until `knobs.expert_cost` says otherwise.
    """

    def __init__(
        self,
        model: Any,
        samples: SamplePool,
        device: torch.device | str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Prepare to serve `samples` with a model of transformers, both on `device`.

        Raises:
            HfModelError: the model cannot be attached, see `moe.hf.steering.attach`.
        """
        self.model, self.knobs, self.adapter = model, attach(model), None
        self._start(samples, device, clock)

    @property
    def n_experts(self) -> int:
        """Experts per layer."""
        return self.knobs.n_experts

    @property
    def top_k(self) -> int:
        """Experts per token that the model was made for."""
        return self.knobs.own_top_k

    @property
    def top_k_choices(self) -> tuple[int, ...]:
        """Powers of two up to the model's own number of experts per token, and that."""
        return tuple(k for k in range(1, self.top_k + 1) if k == self.top_k or k.bit_count() == 1)

    def answer(self, inputs: Tensor, expert_count: int, routing_bias: float) -> ModelOutput:
        """Answer requests, [B, length]: one row of logits each, those of the next token."""
        self.knobs.expert_count, self.knobs.routing_bias = expert_count, routing_bias
        output = self.model(input_ids=inputs, use_cache=False, logits_to_keep=1)
        return ModelOutput(output.logits[:, -1].float(), self.knobs.routing)


def load_runner(
    path: str | Path,
    shifts: Sequence[str],
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
) -> HfRunner:
    """Load a checkpoint and its tokenizer: bfloat16 on CUDA, float32 on a CPU.

    Args:
        path: folder with config.json, tokenizer files and safetensors.
        shifts: names of language shifts.
        device: where model and requests go.
        clock: of the runner.

    Raises:
        HfModelError: transformers is missing or too old; the folder is no checkpoint, of an unknown family,
            or lacks weights.
    """
    transformers = import_transformers()
    path = _folder(path)
    device = torch.device(device)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    family_of(config)  # before gigabytes are read
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=serving_dtype(device),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except ImportError as error:  # of a format of weights
        raise HfModelError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise HfModelError(
            f"{path}: the weights cannot be read ({error}); get the checkpoint again"
        ) from error
    lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lacking:  # transformers makes them up
        raise HfModelError(
            f"{path}: {len(lacking)} tensors are missing or of another shape, the first is {lacking[0]}; get "
            "the checkpoint again"
        )
    model.requires_grad_(False).eval().to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    length = min(CHUNK_TOKENS, config.max_position_embeddings)
    samples = TokenPool(tokenizer, config.vocab_size, length, shifts, device)
    return HfRunner(model, samples, device, clock)


# ---------------------------------------------------------------- identity


def checkpoint_identity(path: str | Path) -> dict[str, Any]:
    """What makes a checkpoint the one it is, as `moe.profiles.Profile.model` holds it.

    The config is the folder's own with `top_k` and `expert_widths` added under the names they have here; the
    data are the texts and the tokenizer; the weights are all safetensors, so a large checkpoint takes as long
    as it takes to read it.

    Raises:
        HfModelError: transformers is missing or too old, or the folder is no checkpoint.
    """
    transformers = import_transformers()
    path = _folder(path)
    config = read_json(path / "config.json", "get the checkpoint again")
    config.pop("transformers_version", None)  # of whoever wrote the file
    # config.json may leave defaults out.
    full = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    family_of(full)
    n_experts = next(
        n
        for key in ("n_routed_experts", "num_local_experts", "num_experts")
        if (n := getattr(full, key, None))
    )
    width = getattr(full, "moe_intermediate_size", None) or full.intermediate_size
    config |= {"top_k": full.num_experts_per_tok, "expert_widths": [width] * n_experts}
    tokenizer = _digest(path, _TOKENIZER_FILES)
    data = hashlib.sha256((data_digest("language") + tokenizer).encode()).hexdigest()
    key = hashlib.sha256(json.dumps([config, data], sort_keys=True).encode()).hexdigest()[:12]
    weights = _digest(path, "*.safetensors")
    return {"key": key, "config": config, "data_sha256": data, "weights_sha256": weights}


def check_checkpoint(profile: Profile, path: str | Path) -> None:
    """Refuse a profile of another model than the checkpoint, or of another state of it.

    Raises:
        ProfileError: names both.
        HfModelError: as `checkpoint_identity`.
    """
    here = checkpoint_identity(path)
    differing = [
        key for key in ("config", "data_sha256", "weights_sha256") if here[key] != profile.model[key]
    ]
    if differing:
        raise ProfileError(
            f"the profile of {profile.device} was measured with {name_of(profile)}, {path} is "
            f"{_name(here)}: {differing} differ; measure it with `python -m moe.profiling --model {path} "
            "--task language --device ... --out ...`"
        )


def name_of(profile: Profile) -> str:
    """What a profile was measured with, for people."""
    if profile.size != SIZE:
        return f"the model {profile.task}-{profile.size}"
    return f"{_name(profile.model)} ({profile.provenance.get('checkpoint', 'place not noted')})"


def _name(identity: dict[str, Any]) -> str:
    return f"the checkpoint {identity['config']['model_type']} {identity['weights_sha256'][:12]}"


def _folder(path: str | Path) -> Path:
    path = Path(path)
    if not (path / "config.json").is_file():
        raise HfModelError(
            f"{path} is no checkpoint: there is no config.json; give the folder of one, or get it with "
            f"`hf download NAME --local-dir {path}`"
        )
    if not list(path.glob("*.safetensors")):
        raise HfModelError(
            f"{path} has no *.safetensors; weights in other formats can run code and are not read"
        )
    if not list(path.glob(_TOKENIZER_FILES)):
        raise HfModelError(f"{path} has no tokenizer: {_TOKENIZER}")
    return path


def _digest(folder: Path, pattern: str) -> str:
    """Hash of the names and contents of a folder's files of a pattern."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
