"""What serving tokens costs and how good answers are, as measured (`python -m moe.profiling --task tokens`).

A profile has two parts. *Cost* belongs to a shape of model and a card, whatever the weights say: time and
energy of a step by its rows, experts per token and readable experts. *Quality* belongs to weights and text.
Each part has a digest, so that one can be measured anew without the other.

Energies are per step and above the idle power of the device.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe.lm.config import Size
from moe.profiles import ProfileError
from moe.ranges import STRICT, Count, Number, Share, Whole

Positive = Annotated[Number, Field(gt=0.0)]
NotNegative = Annotated[Number, Field(ge=0.0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CostCell:
    """A step, at the service's own cadence: the host launches a few steps ahead and reads behind."""

    decode_rows: Annotated[Whole, Field(ge=0)]
    """Rows of answers: sequences that run."""
    prefill_rows: Annotated[Whole, Field(ge=0)]
    """Rows of prompts beside them."""
    context: Count
    """Mean position of the rows."""
    top_k: Count
    readable: Count
    """Experts of a layer that the step may read."""
    experts_read: NotNegative
    """Experts of a layer that it read, mean over layers."""
    step_s: Positive
    step_spread: NotNegative
    """Standard deviation of the visits over their mean."""
    energy_j: Number | None = None
    """Above idle; null without a meter."""
    energy_spread: NotNegative | None = None
    held_out: bool = False
    """Measured to judge a fit, never to make one."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenCost:
    """What steps of a shape of model cost on a device."""

    device: str
    """Name that its driver gives."""
    config: dict[str, Any]
    """Shape of the model, `LmConfig` by field."""
    cells: tuple[CostCell, ...]
    idle_power_w: Positive | None
    copy_bytes_per_s: Positive | None
    """Read and written by a large copy; null on a CPU."""
    provenance: dict[str, Any]
    """Where, when, with what versions, seed and options it was measured."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityCell:
    """Answers of the documents under knobs; the prompts are read at the same experts per token."""

    running: Count
    """Sequences that decode together."""
    top_k: Count
    routing_bias: Share
    tokens: Count
    """Output tokens that were scored."""
    accuracy: Share
    standard_error: NotNegative
    """Of `minus_standard`, over documents."""
    minus_standard: Number
    """Accuracy less that of the same tokens at the trained top k and bias 0."""
    confidence: Share
    entropy: Share
    by_domain: dict[str, Share]
    """Accuracy."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenQuality:
    """How good the answers of weights are."""

    size: Size
    weights_sha256: Digest
    documents_sha256: Digest
    top_k: Count
    """Experts per token in training."""
    cells: tuple[QualityCell, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenProfile:
    """Both parts."""

    kind: Literal["generate"] = "generate"
    cost: TokenCost
    quality: TokenQuality

    def digests(self) -> dict[str, str]:
        """SHA-256 of each part."""
        return {
            part: hashlib.sha256(json.dumps(asdict(getattr(self, part)), sort_keys=True).encode()).hexdigest()
            for part in ("cost", "quality")
        }

    def summary(self) -> dict[str, Any]:
        """Tables that answer the common questions, by measured cells alone.

        Returns:
            `quality_by_k` {k: accuracy} at bias 0, with the most sequences; `quality_by_bias`
            {running: {bias: accuracy}} at the trained k; `energy_per_token_by_k` {running: {k: joules}} where
            all experts may be read; `energy_per_token_by_bias` {running: {bias: joules}} at the trained k.
            Joules are above idle; null without a meter.
        """
        trained = self.quality.top_k
        n_experts = self.cost.config["n_experts"]
        most = max(cell.running for cell in self.quality.cells)
        decode = [cell for cell in self.cost.cells if not cell.prefill_rows and not cell.held_out]
        contexts = sorted({cell.context for cell in decode})
        decode = [cell for cell in decode if cell.context == contexts[len(contexts) // 2]]
        per_token = {
            (cell.decode_rows, cell.top_k, cell.readable): None
            if cell.energy_j is None
            else cell.energy_j / cell.decode_rows
            for cell in decode
        }
        running = sorted({cell.decode_rows for cell in decode})
        return {
            "quality_by_k": {
                cell.top_k: cell.accuracy
                for cell in self.quality.cells
                if cell.running == most and cell.routing_bias == 0.0
            },
            "quality_by_bias": {
                n: {
                    cell.routing_bias: cell.accuracy
                    for cell in self.quality.cells
                    if cell.running == n and cell.top_k == trained
                }
                for n in sorted({cell.running for cell in self.quality.cells})
            },
            "energy_per_token_by_k": {
                n: {k: value for (rows, k, r), value in per_token.items() if rows == n and r == n_experts}
                for n in running
            },
            "energy_per_token_by_bias": {
                n: {
                    round((1 - r / n_experts) / 0.75, 4): value
                    for (rows, k, r), value in per_token.items()
                    if rows == n and k == trained
                }
                for n in running
            },
        }


def load_token_profile(path: str | Path) -> TokenProfile:
    """Read and check a profile.

    Raises:
        ProfileError: no such file, or one that is no profile of tokens; names file, field and rule.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"{path}: cannot be read ({error}); measure one with python -m moe.profiling"
        ) from error
    try:
        profile = TypeAdapter(TokenProfile).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ProfileError(
            f"{path}: {where}: {first['msg']}; it is no profile of tokens as this version writes them: "
            "measure it again with python -m moe.profiling --task tokens"
        ) from error
    if not profile.cost.cells or not profile.quality.cells:
        raise ProfileError(f"{path}: holds no cells; measure it again")
    return profile


def save_token_profile(profile: TokenProfile, path: str | Path) -> None:
    """Write a profile in one step: the file is whole or absent."""
    path = Path(path)
    document = _rounded(asdict(profile))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _rounded(value: Any) -> Any:
    """Six significant digits for every float."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float | np.floating) else value
