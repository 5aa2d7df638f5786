"""The shipped tokenizer and documents, and the text that is left for training."""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from moe.errors import DataCorruptError, DataMissingError
from moe.lm import text
from moe.lm.config import SIZES
from moe.lm.corpus import SHARED_LINES, build_corpus, find_files, held_out_lines, long_lines
from moe.lm.text import DOCUMENT_TOKENS, DOMAINS, END_ID

TRACES = Path(__file__).parents[3] / "configs" / "traces"


def decoded(domain: str) -> list[str]:
    shipped = text.documents()
    return text.tokenizer().decode_batch(shipped.tokens[shipped.domain == DOMAINS.index(domain)].tolist())


def assert_found(domain: str, sources: list[str]) -> None:
    whole = "\0".join(sources)
    assert all(document in whole for document in decoded(domain))


def test_every_domain_is_there_and_every_token_has_its_bytes() -> None:
    shipped = text.documents()
    assert np.bincount(shipped.domain).tolist() == [64, 96, 48, 24, 24]
    sizes = text.bytes_per_token()
    assert len(sizes) == SIZES["small"][0].vocabulary == SIZES["base"][0].vocabulary
    assert all(config.context == DOCUMENT_TOKENS - 1 for config, _ in SIZES.values())
    for tokens, document in zip(
        shipped.tokens, text.tokenizer().decode_batch(shipped.tokens.tolist()), strict=True
    ):
        assert "\N{REPLACEMENT CHARACTER}" not in document and END_ID not in tokens
        assert sizes[tokens].sum() == len(document.encode())
    assert len(np.unique(shipped.tokens, axis=0)) == len(shipped.tokens)
    sizes_on_disk = [path.stat().st_size for path in text.SHIPPED_FOLDER.glob("[td]*.*")]
    assert max(sizes_on_disk) < 1_000_000
    with pytest.raises(ValueError, match="read-only"):
        shipped.tokens[0, 0] = 1


def test_tables_and_logs_are_the_projects_own() -> None:
    assert_found("tables", [path.read_text() for path in TRACES.glob("*_telemetry.csv")])
    assert all(document.count(" | ") >= 8 for document in decoded("logs"))  # of `git log --stat`


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the documents are of CPython 3.11.7")
def test_documents_are_passages_of_the_sources_that_the_readme_names() -> None:
    library, headers = (Path(sysconfig.get_path(name)) for name in ("stdlib", "include"))
    topics = importlib.import_module("pydoc_data.topics").topics
    assert_found("prose", ["\n".join(topics[name] for name in sorted(topics))])
    modules = [
        path
        for folder in (library, *(f for f in library.iterdir() if f.is_dir()))
        if folder.name not in ("test", "lib2to3", "site-packages")
        for path in folder.glob("*.py" if folder == library else "**/*.py")
    ]
    assert_found("python", [path.read_text(errors="replace") for path in modules])
    assert_found("c", [p.read_text() for p in headers.rglob("*.h")])


def test_a_text_becomes_tokens_and_itself_again() -> None:
    for sample in ("def f(x):\n\treturn x ** 2  # größer\n", "日本語 \U0001f525", "\r\n\r\n  a\0b"):
        ids = text.tokenizer().encode(sample).ids
        assert text.tokenizer().decode(ids) == sample
        assert text.bytes_per_token()[ids].sum() == len(sample.encode())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataCorruptError, match=r"documents.npz cannot be read: .*Remedy"):
        text.documents(tmp_path / "nowhere")
    with pytest.raises(DataCorruptError, match=r"tokenizer.json cannot be read: .*Remedy"):
        text.tokenizer(tmp_path / "nowhere")
    shipped, folders = text.documents(), [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
        for name in ("documents.npz", "tokenizer.json"):
            shutil.copy(text.SHIPPED_FOLDER / name, folder / name)
    half, cut, other, short = folders
    whole = (half / "documents.npz").read_bytes()
    (half / "documents.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataCorruptError, match="cannot be read"):
        text.documents(half)
    np.savez(cut / "documents.npz", tokens=shipped.tokens[:, 1:], domain=shipped.domain, tokenizer_sha256="0")
    with pytest.raises(
        DataCorruptError, match=r"must hold uint16 tokens \[N, 1025\] .* got uint16 \(256, 1024\)"
    ):
        text.documents(cut)
    values = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(values))  # the same content in another writing
    with pytest.raises(DataCorruptError, match="the tokenizer of another model"):
        text.documents(other)
    (short / "tokenizer.json").write_text("{}")
    for read in (text.tokenizer, text.bytes_per_token):
        with pytest.raises(DataCorruptError, match="is damaged"):
            read(short)


WORDS = "def return import value tensor expert router token batch energy for while if else class self".split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 20 small Python files, one of them twice, and some that are no text to learn from."""
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        lines = [" ".join(rng.choice(WORDS, 10)) + f" {number}" for _ in range(40)]
        (folder / f"file_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    (folder / "same.py").write_bytes((folder / "file_7.py").read_bytes())
    (folder / "binary.py").write_bytes(bytes(range(256)) * 4)
    (folder / "table.txt").write_text("0.125 3.5 17\n" * 100, encoding="utf-8")
    (folder / "minified.c").write_text("a=b;" * 500, encoding="utf-8")
    (folder / "short.md").write_text("short", encoding="utf-8")
    for suffix in ("log", "csv"):
        (folder / f"other.{suffix}").write_bytes((folder / "file_3.py").read_bytes() * 2)
    return folder


def test_the_corpus_holds_each_text_once_and_reads_back(folder: Path, tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "cache", [folder])
    record = corpus.record
    assert (record["files"], record["equal_copies"], record["near_copies_of_documents"]) == (20, 1, 0)
    parts = np.split(corpus.tokens, np.flatnonzero(corpus.tokens == END_ID) + 1)[:-1]
    read = [text.tokenizer().decode(part[:-1].tolist()) for part in parts]
    assert len(read) == 20 and set(read) == {path.read_text() for path in folder.glob("file_*.py")}
    assert (
        record["bytes"] == sum(len(t.encode()) for t in read) == text.bytes_per_token()[corpus.tokens].sum()
    )
    for path in folder.glob("file_*.py"):
        path.write_text("changed " * 50)
    again = build_corpus(tmp_path / "cache", [folder / ".." / folder.name])  # it is read from the cache
    assert again.record == record and np.array_equal(again.tokens, corpus.tokens)


def test_an_interrupted_corpus_is_built_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(tmp_path / "cache", [folder])
    assert build_corpus(tmp_path / "cache", [folder]).record["files"] == 20


def test_what_shares_text_with_the_documents_is_not_learned_from(folder: Path) -> None:
    document = decoded("python")[0]
    long = [
        line for line in document.split("\n")[:-1] if line.encode().strip() in long_lines(document.encode())
    ]
    own = [f"a line that is nobody else's, and longer than forty bytes: {number}" for number in range(30)]
    for name, shared in (("copy", long), ("few", long[: SHARED_LINES - 1])):
        lines = [*own, *(f"\t\t{line.strip()}  " for line in shared)]
        (folder / f"{name}.py").write_text("\n".join(lines), encoding="utf-8")
    topics = [f"    '{line}\\n'" for line in decoded("prose")[0].split("\n")[:-1]]  # as Python quotes it
    (folder / "quoted.py").write_text("\n".join(topics), encoding="utf-8")
    files, left_out = find_files([folder], held_out_lines())
    assert left_out["near"] == 2 and left_out["equal"] == 1 and len(files) == 21
    assert str(folder / "few.py") in files


def test_no_folder_and_no_text_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"--text .*gone is no folder"):
        build_corpus(tmp_path, [tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataMissingError, match=r"no text to train on .* name more folders: --text"):
        build_corpus(tmp_path, [tmp_path / "empty"])
    assert not list(tmp_path.glob("*.json"))
