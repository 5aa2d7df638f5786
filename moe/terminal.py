"""Terminals that cannot show every character: what they lack is written in ASCII, and is never an error."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_ASCII = {
    "°": "deg", "µ": "u", "∞": "inf", "±": "+-", "≥": ">=", "≤": "<=", "×": "x", "−": "-", "–": "-",
    "…": "...", "•": "*", "─": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+",
}  # fmt: skip


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoding: what it lacks in ASCII, or escaped where nothing looks alike."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    texts = []
    for character in error.object[error.start : error.end]:
        alike = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        texts.append(_ASCII.get(character) or alike or character.encode("ascii", "backslashreplace").decode())
    return "".join(texts), error.end


codecs.register_error("plain", _plain)


def plain_terminal() -> None:
    """Let a command write to its output in any encoding; libraries leave the streams alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, which shows everything
            stream.reconfigure(errors="plain")


def as_shown(text: str, encoding: str) -> str:
    """A text as a terminal of this encoding shows it, for tables that align by width."""
    return text.encode(encoding, "plain").decode(encoding)
