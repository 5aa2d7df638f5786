"""Prose and code cut out of the running Python's standard library."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
from functools import lru_cache
from pathlib import Path

from moe.errors import DataMissingError

TEST_SHARE = 0.05  # of the files
TEST_CAP_BYTES = 2**18  # keeps an evaluation pass short; test files beyond it are not used at all
_LEFT_OUT = {  # tests, tables, what distributions leave out or add, and what is written at installation
    "test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "distutils",
    "tkinter", "turtledemo", "turtle.py", "ensurepip", "encodings", "pydoc_data", "__phello__",
    "sitecustomize.py",
}  # fmt: skip
_WRITTEN_AT_INSTALLATION = ("_sysconfigdata", "config-")

# A string literal as a whole, so that a "#" inside it is not taken for a comment; or a comment, with its
# whole line where it has one. One left-to-right scan decides, as in Python's own lexer.
_STRING_OR_COMMENT = re.compile(
    r"""
    (?P<string> \"{3} (?: \\. | [^\\] )*? \"{3} | '{3} (?: \\. | [^\\] )*? '{3}
              | " (?: \\. | [^"\\\n] )* "       | ' (?: \\. | [^'\\\n] )* ' )
    | (?: ^ [ \t]* \# [^\n]* \n?)
    | (?: [ \t]* \# [^\n]* )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@lru_cache
def language_bytes() -> dict[tuple[str, str], bytes]:
    """Return the text of every ``(domain, split)``.

    A file belongs to one split with its prose and its code: the first 5% by the hash of the name are tests.

    Raises:
        DataMissingError: This Python comes without its source.
    """
    units = _topics() | {name: prose_and_code(source) for name, source in source_files().items()}
    names = sorted(units, key=lambda name: hashlib.sha256(name.encode()).digest())
    n_test = round(len(names) * TEST_SHARE)
    text: dict[tuple[str, str], bytes] = {}
    for place, domain in enumerate(("prose", "code")):
        for split, chosen in (("train", names[n_test:]), ("test", names[:n_test])):
            text[domain, split] = "".join(units[name][place] for name in chosen).encode()
        text[domain, "test"] = text[domain, "test"][:TEST_CAP_BYTES]
    return text


def _topics() -> dict[str, tuple[str, str]]:
    """Return the language reference, one unit a topic, none of them with code of its own."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataMissingError(
            "this Python lacks pydoc_data.topics; install its full standard library"
        ) from error
    return {f"pydoc_data/topics/{name}": (text.strip() + "\n\n", "") for name, text in topics.items()}


def source_files() -> dict[str, str]:
    """Return the source of every module used, by its path inside the standard library.

    Raises:
        DataMissingError: This Python comes without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT & set(parts) and not parts[0].startswith(_WRITTEN_AT_INSTALLATION):
            with tokenize.open(path) as file:  # decodes by the file's own declaration
                files["/".join(parts)] = file.read()
    if "argparse.py" not in files:
        raise DataMissingError(
            f"no Python source in {root}; use a Python with its standard library as .py files"
        )
    return files


def prose_and_code(source: str) -> tuple[str, str]:
    """Split Python source into its docstrings, and the rest without comments and gaps, which compiles."""
    docstrings: list[str] = []
    lines = source.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _DOCUMENTED) or (docstring := ast.get_docstring(node)) is None:
            continue
        docstrings.append(docstring + "\n\n")
        literal = node.body[0]
        first, last = literal.lineno - 1, (literal.end_lineno or literal.lineno) - 1
        rest = b"pass" if len(node.body) == 1 and not isinstance(node, ast.Module) else b""
        kept = lines[first][: literal.col_offset] + rest + lines[last][literal.end_col_offset :]
        lines[first : last + 1] = [kept if kept.strip() else b""] + [b""] * (last - first)
    code = _STRING_OR_COMMENT.sub(lambda match: match["string"] or "", b"".join(lines).decode())
    return "".join(docstrings), re.sub(r"\n(?:[ \t]*\n){3,}", "\n\n\n", code).strip() + "\n"
