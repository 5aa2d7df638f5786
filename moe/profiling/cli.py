"""The command line: measure a service of single answers or of tokens, or print a profile."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from moe.errors import one_line_errors
from moe.profiles import ProfileError, load_profile
from moe.profiling import command, tokens
from moe.token_profile import load_token_profile


@dataclass(frozen=True)
class Show:
    """Print a profile."""

    profile: Positional[Path]
    """A JSON file that this command wrote."""
    json: bool = False
    """Print quality and energy per token by expert count and routing bias (a profile of tokens) as JSON."""


def show(options: Show) -> None:
    """Print what a profile says.

    Raises:
        ProfileError: it cannot be read, or JSON is asked for of a profile of single answers.
    """
    if not _is_of_tokens(options.profile):
        if options.json:
            raise ProfileError(f"{options.profile}: --json is for profiles of tokens; this one is of answers")
        print(command.summary(load_profile(options.profile)))
        return
    profile = load_token_profile(options.profile)
    print(json.dumps(profile.summary() | profile.digests()) if options.json else tokens.summary(profile))


def _is_of_tokens(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == "generate"
    except (OSError, ValueError, AttributeError) as error:
        raise ProfileError(
            f"{path}: is no profile ({error}); measure one with python -m moe.profiling"
        ) from error


def cli() -> None:
    """Run the command line."""
    prog, first = Path(sys.argv[0]).name, sys.argv[1] if len(sys.argv) > 1 else ""
    said = "no profile was written; what was measured of tokens is kept, and the same command goes on"
    with one_line_errors(interrupted=f"interrupted; {said}"):
        if first == "tokens":
            options = tyro.cli(
                tokens.TokenOptions, args=sys.argv[2:], prog=f"{prog} tokens", config=(FlagCreatePairsOff,)
            )
            tokens.main(options)
        elif first and not first.startswith("-"):
            show(tyro.cli(Show, prog=prog, config=(FlagCreatePairsOff,)))
        else:
            command.main(tyro.cli(command.Options, prog=prog, description=command.__doc__))
