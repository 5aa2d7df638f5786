"""What serving tokens costs and how good answers are, as measured (`python -m moe.profiling tokens`).

A profile has two parts, or three. *Cost* belongs to a shape of model and a card, whatever the weights say:
time and energy of a step by its rows, experts per token and readable experts. *Quality* belongs to weights
and text. *Adaptation*, where the head was let learn, to all of these. Each part has a digest, so that one can
be measured anew without the others.

Energies are in joules per step and above the idle power of the device; times are in seconds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moe.files import write_file
from moe.lm.config import Size
from moe.profiles import ProfileError, each_key_once
from moe.ranges import STRICT, Count, Flag, Number, Share, Whole

Positive = Annotated[Number, Field(gt=0.0)]
NotNegative = Annotated[Number, Field(ge=0.0)]
Lessons = Annotated[Number, Field(ge=0.0, le=10_000.0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CostCell:
    """A step, at the service's own cadence: the host launches a few steps ahead and reads behind."""

    decode_rows: Annotated[Whole, Field(ge=0)]
    """Rows of answers: sequences that run."""
    prefill_rows: Annotated[Whole, Field(ge=0)]
    """Rows of prompts beside them."""
    context: Count
    """Position of the decode rows, and that before which each chunk of a prompt ends."""
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
    config: dict[str, Flag | Whole]
    """Shape of the model, `moe.lm.config.LmConfig` by field."""
    cells: tuple[CostCell, ...]
    idle_power_w: Positive | None
    copy_bytes_per_s: Positive | None
    """Read and written by a large copy; null on a CPU."""
    provenance: dict[str, Any]
    """Where, when, with what versions, seed and options it was measured."""

    def decode_grid(self) -> list[CostCell]:
        """Steps without prompts at the context at which most of them were measured, held-out ones apart."""
        alone = [cell for cell in self.cells if not cell.prefill_rows and not cell.held_out]
        contexts = [cell.context for cell in alone]
        at = max(sorted(set(contexts)), key=contexts.count)
        return [cell for cell in alone if cell.context == at]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OfDomain:
    """Answers about text of one domain; all sequences that run are of it."""

    accuracy: Share
    minus_standard: Number
    """Accuracy less that of the same tokens at the trained top k and bias 0."""
    experts_read: NotNegative
    """Experts of a layer that a decode step read, mean over layers and steps."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityCell:
    """Answers about the documents under knobs, domain by domain; prompts are read at the same top k."""

    running: Count
    """Sequences that decode together."""
    top_k: Count
    routing_bias: Share
    tokens: Count
    """Output tokens that were scored."""
    accuracy: Share
    minus_standard: Number
    standard_error: NotNegative
    """Of `minus_standard`, over passages."""
    confidence: Share
    entropy: Share
    experts_read: NotNegative
    by_domain: dict[str, OfDomain]
    """Of which the others are means."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenQuality:
    """How good the answers of weights are."""

    size: Size
    weights_sha256: Digest
    documents_sha256: Digest
    top_k: Count
    """Experts per token in training."""
    standard: dict[str, tuple[Share, ...]]
    """Accuracy at the trained top k and bias 0 by domain, in equal parts of the context, the first first."""
    cells: tuple[QualityCell, ...]
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Learned:
    """What a head that has learned one domain changes in answers about another, or about its own."""

    accuracy: Number
    confidence: Number
    entropy: Number
    loss: Number
    """Over that of the unadapted head, less 1: below 0 is better."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Visit:
    """Lessons on a domain, and what answers about it were like after them."""

    domain: str
    lessons: Whole
    """Of all heads together."""
    loss: Number
    """As in `Learned`."""
    accuracy: Number


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenAdaptation:
    """How the head learns from prompts (`moe.lm.adapt`), and what a lesson costs."""

    lesson_rows: Count
    """Rows of prompts that a lesson is made of."""
    margin: NotNegative
    """Of the guard, see `moe.lm.adapt.HeadSettings`."""
    lesson_s: Positive
    lesson_j: Number | None
    """Above idle; null without a meter."""
    curve: dict[str, Annotated[tuple[tuple[Lessons, Number], ...], Field(min_length=2)]]
    """By domain, of a head that learns it alone: lessons, and what they changed of its loss."""
    changed: dict[str, dict[str, Learned]]
    """By the domain that answers are about, then by the one that was learned to the end."""
    visits: tuple[tuple[Visit, ...], ...]
    """Domains that took turns, each time from the unadapted heads on; what a fit is judged by."""
    provenance: dict[str, Any]

    def energy_j(self, busy_power_w: float) -> float:
        """Of a lesson, above idle; without a meter what a device takes that draws so much above idle."""
        return self.lesson_s * busy_power_w if self.lesson_j is None else self.lesson_j


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenProfile:
    """All parts."""

    kind: Literal["generate"] = "generate"
    cost: TokenCost
    quality: TokenQuality
    adaptation: TokenAdaptation | None = None

    def digests(self) -> dict[str, str]:
        """SHA-256 of each part as it is written: the same before saving and after loading."""
        return {
            part: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            for part, content in _document(self).items()
            if isinstance(content, dict)
        }

    def summary(self) -> dict[str, Any]:
        """Tables that answer the common questions, by measured cells alone; all keys ascend.

        Returns:
            `quality_by_k` {k: accuracy} at bias 0, with the most sequences; `quality_by_bias`
            {running: {bias: accuracy}} at the trained k; `energy_per_token_by_k` {running: {k: joules}} where
            all experts may be read; `energy_per_token_by_bias` {running: {bias: joules}} at the trained k.
            Joules are above idle, at the context of `TokenCost.decode_grid`; null without a meter.
        """
        trained, n_experts = self.quality.top_k, self.cost.config["n_experts"]
        quality = sorted(self.quality.cells, key=lambda cell: (cell.running, cell.top_k, cell.routing_bias))
        most = quality[-1].running
        decode = self.cost.decode_grid()
        tables: dict[str, Any] = {
            "quality_by_k": {
                cell.top_k: cell.accuracy
                for cell in quality
                if cell.running == most and cell.routing_bias == 0.0
            },
            "quality_by_bias": {},
            "energy_per_token_by_k": {},
            "energy_per_token_by_bias": {},
        }
        for cell in quality:
            if cell.top_k == trained:
                by_bias = tables["quality_by_bias"].setdefault(cell.running, {})
                by_bias[cell.routing_bias] = cell.accuracy
        for cell in sorted(decode, key=lambda cell: (cell.decode_rows, cell.top_k, -cell.readable)):
            joules = None if cell.energy_j is None else cell.energy_j / cell.decode_rows
            if cell.readable == n_experts:
                tables["energy_per_token_by_k"].setdefault(cell.decode_rows, {})[cell.top_k] = joules
            if cell.top_k == trained:
                bias = round((1 - cell.readable / n_experts) / 0.75, 4)  # what reads so many experts
                tables["energy_per_token_by_bias"].setdefault(cell.decode_rows, {})[bias] = joules
        return tables


def load_token_profile(path: str | Path) -> TokenProfile:
    """Read and check a profile.

    Raises:
        ProfileError: no such file, or one that is no profile of tokens; names file, field, rule and remedy.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=each_key_once)
        profile = TypeAdapter(TokenProfile).validate_python(raw)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    except ValidationError as error:
        raise ProfileError(f"{path}: {first_fault(error)}: no profile of tokens; {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not a JSON document ({error}); {_REMEDY}") from error
    if fault := _fault(profile):
        raise ProfileError(f"{path}: {fault}; {_REMEDY}")
    return profile


def first_fault(error: ValidationError) -> str:
    """Place and rule of the first value that is refused, one line."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def save_token_profile(profile: TokenProfile, path: str | Path) -> None:
    """Write a profile in one step: the file is whole or absent.

    Raises:
        OSError: it cannot be written.
    """
    write_file(Path(path), json.dumps(_document(profile), indent=1, allow_nan=False) + "\n")


_REMEDY = "measure it again: python -m moe.profiling tokens"


def _fault(profile: TokenProfile) -> str | None:
    """What numbers say that are each in range, but cannot be together."""
    cost, quality = profile.cost, profile.quality
    if missing := {"top_k", "n_experts"} - set(cost.config):
        return f"cost.config: lacks {', '.join(sorted(missing))}"
    trained, n_experts = cost.config["top_k"], cost.config["n_experts"]
    if trained != quality.top_k:
        return f"quality.top_k is {quality.top_k}, cost.config.top_k {trained}: parts of two models"
    for number, cell in enumerate(cost.cells):
        if not cell.top_k <= cell.readable <= n_experts or cell.top_k > trained:
            found = f"top_k {cell.top_k} and readable {cell.readable}"
            return f"cost.cells.{number}: {found} are not of a model of {trained} of {n_experts} experts"
        if not cell.decode_rows + cell.prefill_rows:
            return f"cost.cells.{number}: has no rows"
    energies = {cell.energy_j is None for cell in cost.cells}
    if energies == {True, False}:
        return "cost.cells: energy_j is null in some and a number in others"
    if not any(cell.decode_rows and not cell.prefill_rows and not cell.held_out for cell in cost.cells):
        return "cost.cells: none is a decode step that is not held out"
    if not any(cell.top_k == trained and cell.routing_bias == 0.0 for cell in quality.cells):
        return f"quality.cells: none is at the trained top_k {trained} and routing bias 0"
    parts = {len(shares) for shares in quality.standard.values()}
    if len(parts) != 1 or 0 in parts:
        return f"quality.standard: needs as many parts in every domain, got {sorted(parts)}"
    for number, cell in enumerate(quality.cells):
        if cell.by_domain.keys() != quality.standard.keys():
            found = f"{sorted(cell.by_domain)}, quality.standard {sorted(quality.standard)}"
            return f"quality.cells.{number}.by_domain: is of other domains: {found}"
    if fault := _fault_of_adaptation(profile):
        return fault
    for part, keys in (
        ("cost", [(*astuple(cell)[:5], cell.held_out) for cell in cost.cells]),
        ("quality", [astuple(cell)[:3] for cell in quality.cells]),
    ):
        if len(set(keys)) < len(keys):
            return f"{part}.cells: one is there twice: {max(keys, key=keys.count)}"
    return None


def _fault_of_adaptation(profile: TokenProfile) -> str | None:
    adaptation, domains = profile.adaptation, profile.quality.standard.keys()
    if adaptation is None:
        return None
    if (adaptation.lesson_j is None) != (profile.cost.cells[0].energy_j is None):
        return "adaptation.lesson_j is null and energies of steps are not, or the other way round"
    if not domains == adaptation.curve.keys() == adaptation.changed.keys():
        return f"adaptation: is of other domains than quality.standard: {sorted(adaptation.curve)}"
    if any(learned.keys() != domains for learned in adaptation.changed.values()):
        return "adaptation.changed: lacks a domain that was learned"
    if unknown := {visit.domain for visits in adaptation.visits for visit in visits} - domains:
        return f"adaptation.visits: are of domains without a curve: {sorted(unknown)}"
    return None


def _document(profile: TokenProfile) -> dict[str, Any]:
    """A profile as it is written."""
    return _rounded(asdict(profile))


def _rounded(value: Any) -> Any:
    """The same with six significant digits in every float, and lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
