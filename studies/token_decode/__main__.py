"""Quality and joules of token decoding on one Mixture-of-Experts model: `python -m studies.token_decode`.

Builds a corpus from text of this machine, trains a model and those it is compared with, scores them over
expert counts and budgets of experts read, and measures what a decode step and a prefill cost. All results go
to `results.json`, which is written after every part; what is there is not made again, so a run may be cut and
continued.
"""

from __future__ import annotations

import json
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file, save_file

from agents.files import plain, write_file, write_origin
from moe.device.torch_device import serving_dtype
from moe.errors import DataCorruptError, one_line_errors
from moe.files import read_json
from studies.tasks import StudyError
from studies.token_decode.config import SIZES, SizeName, study_device
from studies.token_decode.corpus import build_corpus
from studies.token_decode.cost import measure_cost
from studies.token_decode.figures import write_figures
from studies.token_decode.lm import LanguageModel
from studies.token_decode.quality import HeldOut, measure_quality
from studies.token_decode.train import train

Part = Literal["corpus", "train", "quality", "cost", "figures"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train, score and meter a Mixture-of-Experts language model."""

    size: SizeName = "smoke"
    """`base` and `mini` need a CUDA GPU; `smoke` runs on a CPU in under a minute."""
    parts: tuple[Part, ...] = ("corpus", "train", "quality", "cost", "figures")
    """What to do. Each part needs those before it; `figures` needs only `results.json`."""
    text: tuple[Path, ...] = ()
    """Folders whose text is learned from; none given: /opt and /usr, for `smoke` the standard library."""
    seed: int = 0
    """Of the weights and of the order of the text."""
    out: Path = Path("runs/token_decode")
    """Folder of the corpus, the weights, `results.json` and the figures."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """Folders of text."""
        if self.size == "smoke":
            return self.text or (Path(sysconfig.get_path("stdlib")),)
        return self.text or (Path("/opt"), Path("/usr"))


class Study:
    """One run of the study in its folder.

    Attributes:
        results: What `results.json` holds.
    """

    def __init__(self, arguments: Arguments) -> None:
        """Open the folder.

        Raises:
            StudyError: it holds results of other settings.
        """
        self.arguments, self.size = arguments, SIZES[arguments.size]
        self.path = arguments.out / "results.json"
        settings = plain(
            {"size": arguments.size, "seed": arguments.seed, "text": arguments.roots, **asdict(self.size)}
        )
        self.results: dict[str, Any] = {"settings": settings, "models": {}}
        if self.path.exists():
            self.results = read_results(self.path)
            if other := [key for key in settings if self.results["settings"].get(key) != settings[key]]:
                raise StudyError(f"{self.path} was made with another {', '.join(other)}: give another --out")

    def run(self, part: Part, device: torch.device) -> None:
        """Make what is missing of one part."""
        if part == "corpus" and "corpus" not in self.results:
            self.results["corpus"] = build_corpus(self.corpus, self.arguments.roots, self.size)
            self._save()
        elif part == "train":
            self._train(device)
        elif part == "quality":
            for name in self.size.models:
                record = self._trained(name)
                if "quality" not in record:
                    text = self._held_out(self.size.windows, device)
                    record["quality"] = measure_quality(self._load(name, device), text, self.size.groups)
                    self._save()
        elif part == "cost" and self.size.running and "cost" not in self.results:
            self._trained(self.size.standard)
            text = self._held_out(self.size.held_out_windows, device)
            self.results["cost"] = measure_cost(self._load(self.size.standard, device), text, self.size)
            self._save()

    @property
    def corpus(self) -> Path:
        """Folder of the corpus."""
        return self.arguments.out / "corpus"

    def _train(self, device: torch.device) -> None:
        self._need((self.corpus / "corpus.json").exists(), "corpus")
        for name, (config, recipe) in self.size.models.items():
            if name not in self.results["models"]:
                model, record = train(config, recipe, self.corpus, device, self.arguments.seed)
                save_file(model.state_dict(), self._weights(name))
                self.results["models"][name] = {"training": record}
                self._save()  # the weights are there first
                del model

    def _load(self, name: str, device: torch.device) -> LanguageModel:
        """A trained model in serving types."""
        with device:
            model = LanguageModel(self.size.models[name][0], serving_dtype(device)).serve()
        model.load_state_dict(load_file(self._weights(name)))
        return model

    def _trained(self, name: str) -> dict[str, Any]:
        """What is known of a trained model."""
        self._need(name in self.results["models"] and self._weights(name).exists(), "train")
        return self.results["models"][name]

    def _held_out(self, n: int, device: torch.device) -> HeldOut:
        self._need((self.corpus / "corpus.json").exists(), "corpus")
        return HeldOut(self.corpus, n, self.size.context, device)

    def _weights(self, name: str) -> Path:
        return self.arguments.out / f"{name}.safetensors"

    def _need(self, there: bool, part: Part) -> None:
        if not there:
            raise StudyError(f"{self.arguments.out} lacks what the part {part!r} makes: name it in --parts")

    def _save(self) -> None:
        write_file(self.path, json.dumps(self.results) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Read `results.json`.

    Raises:
        StudyError: it is missing.
        DataCorruptError: it is damaged.
    """
    if not path.is_file():
        raise StudyError(f"{path} is missing: measure first, or name the folder with --out")
    results = read_json(path, "delete it and run again", ("settings", "models"))
    if not all(isinstance(results[name], dict) for name in ("settings", "models")):
        raise DataCorruptError(f"{path} is no result of this study: delete it and run again")
    return results


def main(arguments: Arguments) -> None:
    """Make what is missing, and draw the figures.

    Raises:
        StudyError: results of other settings, too little text, or a part whose own needs are missing.
        GpuUnavailableError: no card for a size that needs one, or one that NVML does not read.
        TrainingDiverged: a loss is not finite.
    """
    if any(part != "figures" for part in arguments.parts):
        device = study_device(arguments.size)
        torch.backends.cuda.matmul.allow_tf32 = (
            True  # the routers' float32 products, trained and served alike
        )
        if device.type == "cpu":
            torch.set_num_threads(1)  # matrices this small leave threads waiting for each other
        study = Study(arguments)
        write_origin(arguments.out, {"arguments": asdict(arguments)})
        for part in arguments.parts:
            study.run(part, device)
    if "figures" in arguments.parts:
        for path in write_figures(read_results(arguments.out / "results.json"), arguments.out):
            print(path)


if __name__ == "__main__":
    with one_line_errors("interrupted; parts that were complete are kept, run it again to continue"):
        main(tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
