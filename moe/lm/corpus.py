"""Text of the machine as tokens: collect, drop duplicates, split by file, learn a BPE, encode.

All that later parts need lies in one folder: `tokenizer.json`, `train.npy` and `held_out.npy` (uint16, files
joined by the end token), `held_out_domain.npy` (uint8 per token), and what was read in `corpus.json`, written
last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.files import write_file
from moe.lm.config import Size
from studies.tasks import StudyError

END, END_ID = "<|end|>", 0
DOMAINS = ("python", "docs", "c")
DOMAIN_OF_SUFFIX = {
    ".py": 0, ".pyi": 0, ".md": 1, ".rst": 1, ".txt": 1,
    ".h": 2, ".hpp": 2, ".cuh": 2, ".c": 2, ".cc": 2, ".cpp": 2, ".cu": 2, ".inl": 2,
}  # fmt: skip
MIN_BYTES, MAX_BYTES = 200, 500_000
"""Size of a file: below is noise, above are tables and generated code."""
MAX_LINE = 200
"""Mean bytes per line: above is minified or data."""
MIN_LETTERS = 0.45
"""Share of ASCII letters: below is a table of numbers."""
_TOGETHER = 500
"""Files encoded in one call, on all cores."""


def build_corpus(folder: Path, roots: Sequence[Path], size: Size) -> dict[str, Any]:
    """Build the corpus in a folder, unless it is there.

    Args:
        folder: of the corpus.
        roots: folders whose text is read; links are not followed.
        size: how much text and how many tokens are wanted.

    Returns:
        What `corpus.json` holds: the vocabulary, files, bytes and tokens per split, and the text's digest.

    Raises:
        StudyError: too little text for the size.
        ImportError: no `tokenizers`.
    """
    record_path = folder / "corpus.json"
    if record_path.exists():
        return json.loads(record_path.read_text(encoding="utf-8"))
    files, duplicates = unique_files(roots, size.max_bytes)
    splits: dict[str, list[str]] = {"train": [], "held_out": []}
    for path in sorted(files):
        splits["held_out" if is_held_out(path, size.held_out_percent) else "train"].append(path)
    shown = ", ".join(map(str, roots))
    if not splits["train"]:
        raise StudyError(f"{shown} holds no text to train on (*.py, *.md, *.c and such); name more: --text")
    tokenizer = learn_bpe(splits["train"], size.vocabulary, size.sample_bytes)
    write_file(folder / "tokenizer.json", tokenizer.to_str())
    recipe = size.models[size.standard][1]
    least = {  # one batch of windows at any offset; held-out windows that do not overlap
        "train": (recipe.batch + 1) * (recipe.context + 1),
        "held_out": size.held_out_windows * recipe.context + 1,
    }
    tokens = {}
    for split, paths in splits.items():
        ids, domains = encode_files(tokenizer, paths)
        if len(ids) < least[split]:
            raise StudyError(
                f"{shown}: {len(ids):,} tokens of text in the split {split!r}, at least {least[split]:,} are "
                "needed; name more folders: --text"
            )
        np.save(folder / f"{split}.npy", ids)
        tokens[split] = len(ids)
        if split == "held_out":
            np.save(folder / "held_out_domain.npy", domains)
    by_domain = dict.fromkeys(DOMAINS, 0)
    for path, (n_bytes, _) in files.items():
        by_domain[DOMAINS[domain_of(path)]] += n_bytes
    record = {
        "vocabulary": tokenizer.get_vocab_size(),
        "files": {split: len(paths) for split, paths in splits.items()} | {"duplicates": duplicates},
        "bytes": {split: sum(files[path][0] for path in paths) for split, paths in splits.items()},
        "bytes_by_domain": by_domain,
        "tokens": tokens,
        "sha256": hashlib.sha256(b"".join(files[path][1] for path in sorted(files))).hexdigest(),
        "roots": [str(root) for root in roots],
    }
    write_file(record_path, json.dumps(record, indent=1) + "\n")
    return record


def unique_files(roots: Sequence[Path], max_bytes: int) -> tuple[dict[str, tuple[int, bytes]], int]:
    """Find usable files; of equal ones the first path stays.

    Returns:
        Size and digest by path, at most `max_bytes` in all, and the number of duplicates. What is left out is
        chosen by digest, so that a limit takes an even share of everything.
    """
    by_digest: dict[bytes, tuple[str, int]] = {}
    duplicates = 0
    for path in list_files(roots):
        if (text := read_text(path)) is not None:
            digest = hashlib.sha256(text).digest()
            duplicates += digest in by_digest
            by_digest.setdefault(digest, (path, len(text)))
    files, total = {}, 0
    for digest, (path, n_bytes) in sorted(by_digest.items()):
        if total + n_bytes <= max_bytes:
            files[path] = (n_bytes, digest)
            total += n_bytes
    return files, duplicates


def list_files(roots: Sequence[Path]) -> list[str]:
    """Paths of all candidate files, sorted.

    Raises:
        StudyError: a root is no folder.
    """
    found: set[str] = set()
    for root in roots:
        if not root.is_dir():
            raise StudyError(f"--text {root} is no folder")
        for folder, _, names in os.walk(root):
            found |= {f"{folder}/{name}" for name in names if os.path.splitext(name)[1] in DOMAIN_OF_SUFFIX}
    return sorted(found)


def domain_of(path: str) -> int:
    """Index in `DOMAINS`."""
    return DOMAIN_OF_SUFFIX[os.path.splitext(path)[1]]


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


def is_held_out(path: str, percent: int) -> bool:
    """Decide by the path, not by its order, so that a new package moves no file between the splits."""
    return _hash(path) % 100 < percent


def learn_bpe(paths: Sequence[str], vocabulary: int, sample_bytes: int) -> Any:
    """Learn a byte-level BPE (a `tokenizers.Tokenizer`) on the first files, by hash of their paths."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("the study needs the package tokenizers: pip install '.[hf]'") from error
    sample, n_bytes = [], 0
    for path in sorted(paths, key=_hash):
        if n_bytes >= sample_bytes:
            break
        sample.append(Path(path).read_bytes().decode())
        n_bytes += len(sample[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode_files(tokenizer: Any, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of files, each closed by the end token, uint16, and the domain of each token, uint8."""
    ids, domains = [np.empty(0, np.uint16)], [np.empty(0, np.uint8)]
    for start in range(0, len(paths), _TOGETHER):
        some = paths[start : start + _TOGETHER]
        for path, encoding in zip(
            some, tokenizer.encode_batch([Path(path).read_bytes().decode() for path in some]), strict=True
        ):
            ids.append(np.array([*encoding.ids, END_ID], np.uint16))
            domains.append(np.full(len(ids[-1]), domain_of(path), np.uint8))
    return np.concatenate(ids), np.concatenate(domains)


def bytes_per_token(folder: Path) -> np.ndarray:
    """How many bytes of text each token stands for, none for the end token.  # [V]."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    sizes = np.zeros(len(vocabulary), np.int64)
    for token, number in vocabulary.items():
        sizes[number] = 0 if number == END_ID else len(token)  # byte-level: a character stands for a byte
    return sizes


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
