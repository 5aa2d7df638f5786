"""Make the shipped tokenizer and held-out documents: ``python -m moe.lm.shipped.make``, from a checkout.

Sources are this Python's standard library and headers, and this project's own history and traces. The
tokenizer is learned from installed packages and the standard library, without the files that documents are
cut from. The same machine makes the same files.
"""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.errors import one_line_errors
from moe.lm.config import LmConfig
from moe.lm.corpus import SHARED_LINES, find_files, long_lines
from moe.lm.text import DOCUMENT_TOKENS, DOMAINS, END, SHIPPED_FOLDER

PROJECT = Path(__file__).parents[3]
HISTORY_UNTIL = "16785bb"
"""Commit whose history is the log."""
N_DOCUMENTS = {"prose": 64, "python": 96, "c": 48, "logs": 24, "tables": 24}
MAX_PER_FILE = {"prose": 64, "python": 1, "c": 2, "logs": 24, "tables": 8}
SAMPLE_BYTES = 24_000_000
"""Text that the tokenizer is learned from."""
NOT_MODULES = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "turtledemo"
}  # fmt: skip
"""Folders of the standard library that no documents are cut from."""


def main() -> None:
    """Write both files into the package."""
    sources = read_sources()
    held_out = frozenset().union(
        *(long_lines(text.encode()) for name in ("prose", "python", "c") for text in sources[name].values())
    )
    bpe = learn_bpe(held_out)
    tokenizer_path = SHIPPED_FOLDER / "tokenizer.json"
    tokenizer_path.write_text(bpe.to_str(), encoding="utf-8")
    tokens, domain = [], []
    for number, name in enumerate(DOMAINS):
        cut = cut_documents(bpe, sources[name], N_DOCUMENTS[name], MAX_PER_FILE[name], needs_lines=number < 3)
        tokens += cut
        domain += [number] * len(cut)
        print(f"{name}: {len(cut)} documents of {len(sources[name])} texts")
    np.savez_compressed(
        SHIPPED_FOLDER / "documents.npz",
        tokens=np.array(tokens, np.uint16),
        domain=np.array(domain, np.uint8),
        tokenizer_sha256=hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
    )
    for path in (tokenizer_path, SHIPPED_FOLDER / "documents.npz"):
        print(f"{path}: {path.stat().st_size} bytes")


def read_sources() -> dict[str, dict[str, str]]:
    """Texts of each domain by a name that is the same on every machine.

    Files with a copyright of their own, beside that of Python, are left out, and so is what its build wrote.
    """
    library, headers = (Path(sysconfig.get_path(name)) for name in ("stdlib", "include"))
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    programs = library.rglob("*.py")
    modules = (path for path in programs if not NOT_MODULES & set(path.relative_to(library).parts))
    history = subprocess.run(
        ["git", "log", "--stat", "--format=%h %cI %s", HISTORY_UNTIL],
        cwd=PROJECT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {
        "prose": {"topics": "\n".join(topics[name] for name in sorted(topics))},
        "python": _read(library, modules),
        "c": _read(headers, headers.rglob("*.h")),
        "logs": {"history": history.stdout},
        "tables": _read(PROJECT, (PROJECT / "configs" / "traces").glob("*_telemetry.csv")),
    }


def learn_bpe(held_out: frozenset[bytes]) -> Tokenizer:
    """Learn a byte-level BPE on files that share no text with those of the documents."""
    roots = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib")]
    files, _ = find_files(roots, held_out)
    sample, n_bytes = [], 0
    for path, (size, _) in files.items():  # in the order of their digests
        if n_bytes + size <= SAMPLE_BYTES:
            sample.append(Path(path).read_bytes().decode())
            n_bytes += size
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=LmConfig().vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    return bpe


def cut_documents(
    bpe: Tokenizer, texts: dict[str, str], n: int, max_per_file: int, needs_lines: bool
) -> list[list[int]]:
    """Cut documents that begin with a line and do not overlap, chosen by digest.

    Args:
        bpe: the tokenizer.
        texts: by name.
        n: documents wanted.
        max_per_file: of them from one text.
        needs_lines: whether copies of it are to be told by their lines (`SHARED_LINES`).

    Returns:
        Tokens of each document.

    Raises:
        ValueError: The texts are too short.
    """
    found: list[tuple[str, list[int]]] = []
    for name, text in texts.items():
        of_file = []
        for place, (ids, piece) in enumerate(_pieces(bpe, text)):
            if not needs_lines or len(long_lines(piece.encode())) >= 2 * SHARED_LINES:
                of_file.append((hashlib.sha256(f"{name} {place}".encode()).hexdigest(), ids))
        found += sorted(of_file)[:max_per_file]
    if len(found) < n:
        raise ValueError(f"{len(found)} documents where {n} are wanted: name more texts")
    return [ids for _, ids in sorted(found)[:n]]


def _pieces(bpe: Tokenizer, text: str) -> Iterator[tuple[list[int], str]]:
    """Documents of a text, one behind the other, each from the start of a line."""
    while len(ids := bpe.encode(text[: 20 * DOCUMENT_TOKENS]).ids) >= DOCUMENT_TOKENS:
        piece = bpe.decode(ids[:DOCUMENT_TOKENS], skip_special_tokens=False)
        if text.startswith(piece):
            yield ids[:DOCUMENT_TOKENS], piece
            text = text[len(piece) :]
        text = text.partition("\n")[2]  # so too where the cut is inside a character


def _read(folder: Path, paths: Iterator[Path]) -> dict[str, str]:
    texts = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in sorted(paths)}
    return {
        name: text
        for name, text in texts.items()
        if "copyright" not in text.lower() and not name.startswith("_sysconfigdata")
    }


def cli() -> None:
    """Run the command line."""
    with one_line_errors():
        tyro.cli(main)


if __name__ == "__main__":
    cli()
