"""Text of the machine as tokens to train on: collect, drop copies, encode with the shipped tokenizer.

What is held out are the shipped documents: a file that shares text with them is not learned from.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moe.errors import DataMissingError
from moe.files import write_file
from moe.lm.text import END_ID, documents, documents_sha256, tokenizer, tokenizer_sha256

SUFFIXES = frozenset(
    (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inl")
)
"""Of what is learned from. No .log and no .csv: those domains stand for text unlike that of the training."""
MAX_TEXT_BYTES = 400_000_000
"""Of all files."""
MIN_BYTES, MAX_BYTES = 200, 500_000
"""Size of a file: below is noise, above are tables and generated code."""
MAX_LINE = 200
"""Mean bytes per line: above is minified or data."""
MIN_LETTERS = 0.45
"""Share of ASCII letters: below is a table of numbers."""
LONG_LINE = 40
"""Bytes from which a line tells where it comes from."""
SHARED_LINES = 8
"""Long lines in common with the documents from which a file counts as a copy, such as another version."""
_EDGES = b" \t\r'\"\\n,"
"""Dropped from lines that are compared: indents, and the quotes of text inside a program."""
_TOGETHER = 500
"""Files encoded in one call, on all cores."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text to train on.

    Attributes:
        tokens: The files one after another, each closed by the end token, uint16.  # [N]
        record: Files and bytes learned from, equal copies, near copies of the documents, tokens, and the
            text's digest.
    """

    tokens: np.ndarray
    record: dict[str, Any]


def default_roots() -> tuple[Path, ...]:
    """Where text is found if nobody says: installed software, this Python's library and packages."""
    roots = {Path("/opt"), Path("/usr"), *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))}
    return tuple(sorted({root.resolve() for root in roots if root.is_dir()}))


def build_corpus(folder: Path, roots: Sequence[Path]) -> Corpus:
    """Encode the text of folders, or read it from the cache; text that changed since is not noticed.

    Args:
        folder: of the cache, which holds one pair of files for these roots and this tokenizer.
        roots: folders whose text is read; links are not followed.

    Raises:
        DataMissingError: A root is no folder, or there is no text.
        ImportError: The package `tokenizers` is not installed.
    """
    for root in roots:
        if not root.is_dir():
            raise DataMissingError(f"--text {root} is no folder; name one that holds text")
    resolved = sorted({str(root.resolve()) for root in roots})
    settings = [resolved, tokenizer_sha256(), documents_sha256(), MAX_TEXT_BYTES]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    tokens_path, record_path = folder / f"text-{key}.npy", folder / f"text-{key}.json"
    if record_path.exists():  # written last
        return Corpus(np.load(tokens_path), json.loads(record_path.read_text(encoding="utf-8")))
    files, left_out = find_files([Path(root) for root in resolved], held_out_lines())
    if not files:
        shown = ", ".join(resolved)
        raise DataMissingError(
            f"no text to train on (*.py, *.md, *.c ...) in {shown}; name more folders: --text"
        )
    tokens = np.concatenate(list(_encoded(sorted(files))))
    record = {
        "files": len(files),
        "bytes": sum(n_bytes for n_bytes, _ in files.values()),
        "equal_copies": left_out["equal"],
        "near_copies_of_documents": left_out["near"],
        "tokens": len(tokens),
        "sha256": hashlib.sha256(b"".join(files[path][1] for path in sorted(files))).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.save(tokens_path, tokens)
    write_file(record_path, json.dumps(record, indent=1) + "\n")
    return Corpus(tokens, record)


def held_out_lines() -> frozenset[bytes]:
    """The long lines of the documents."""
    texts = tokenizer().decode_batch(documents().tokens.tolist())
    return frozenset().union(*(long_lines(text.encode()) for text in texts))


def long_lines(text: bytes) -> set[bytes]:
    """Lines that tell where they come from, without their edges."""
    return {line for line in _lines(text) if len(line) >= LONG_LINE}


def find_files(
    roots: Sequence[Path], held_out: frozenset[bytes]
) -> tuple[dict[str, tuple[int, bytes]], Counter[str]]:
    """Find files to learn from.

    Args:
        roots: folders.
        held_out: long lines, `SHARED_LINES` of which make a file a near copy.

    Returns:
        Size and digest by path, at most `MAX_TEXT_BYTES` in all; what is left out for that is chosen by
        digest, so that it is an even share of everything. And the numbers of equal copies, of which the first
        path stays, and of near copies.
    """
    by_digest: dict[bytes, tuple[str, int]] = {}
    left_out: Counter[str] = Counter()
    for path in tqdm(_candidates(roots), desc="reading text", unit="file", delay=2.0):
        if (text := read_text(path)) is None:
            continue
        digest = hashlib.sha256(text).digest()
        if digest in by_digest:
            left_out["equal"] += 1
        elif len(held_out.intersection(_lines(text))) >= SHARED_LINES:
            left_out["near"] += 1
        else:
            by_digest[digest] = (path, len(text))
    files, total = {}, 0
    for digest, (path, n_bytes) in sorted(by_digest.items()):
        if total + n_bytes <= MAX_TEXT_BYTES:
            files[path] = (n_bytes, digest)
            total += n_bytes
    return files, left_out


def read_text(path: str) -> bytes | None:
    """The file if it is text worth learning from, else None; so is one that cannot be read."""
    try:
        if os.path.islink(path) or not MIN_BYTES <= os.path.getsize(path) <= MAX_BYTES:
            return None
        text = Path(path).read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError):
        return None
    if len(text) > MAX_LINE * (text.count(b"\n") + 1):
        return None
    letters = np.frombuffer(text, np.uint8) | 32
    return text if ((letters >= 97) & (letters <= 122)).mean() >= MIN_LETTERS else None


def _lines(text: bytes) -> Iterator[bytes]:
    return (line.strip(_EDGES) for line in text.split(b"\n"))


def _candidates(roots: Sequence[Path]) -> list[str]:
    """Paths of all files with a suffix of text, sorted."""
    found: set[str] = set()
    for root in roots:
        for folder, _, names in os.walk(root):
            found |= {f"{folder}/{name}" for name in names if os.path.splitext(name)[1] in SUFFIXES}
    return sorted(found)


def _encoded(paths: Sequence[str]) -> Iterator[np.ndarray]:
    """Tokens of each file and the end token, uint16."""
    encode = tokenizer().encode_batch
    for start in tqdm(range(0, len(paths), _TOGETHER), desc="encoding text", unit="batch", delay=2.0):
        texts = [Path(path).read_bytes().decode() for path in paths[start : start + _TOGETHER]]
        for encoding in encode(texts):
            yield np.array([*encoding.ids, END_ID], np.uint16)
