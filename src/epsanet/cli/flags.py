"""What several commands say of their flags, and their exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["EXIT_INTERRUPTED", "EXIT_USER", "MODEL_HELP", "describe_data", "looked_up", "names_first"]

EXIT_USER, EXIT_INTERRUPTED = 2, 130
MODEL_HELP = "Model or run folder, checkpoint, hf-hub:USER/NAME, or name in timm."


def describe_data(parser: ArgumentParser) -> ArgumentParser:
    """Say in ``--help`` what ``--data`` means here."""
    for action in parser._actions:
        if "--data" in action.option_strings:
            action.metavar, action.help = "SOURCE", "Short for --data.source."
    return parser


def names_first(words: list[str]) -> list[str]:
    """Names before the flags: argparse takes none after a flag where there may be none at all.

    Every flag but ``--help`` has a value.
    """
    names, flags, waiting = [], [], iter(words)
    for word in waiting:
        if not word.startswith("-"):
            names.append(word)
            continue
        flags.append(word)
        if "=" not in word and word not in ("-h", "--help"):
            flags.extend(value for value in [next(waiting, None)] if value is not None)
    return names + flags


def looked_up(words: list[str], path_of: Callable[[str], Path]) -> list[str]:
    """The words with the path of each recipe that ``--config`` names.

    Args:
        words: of the command line.
        path_of: of a recipe's name or file; raises an error for what is neither.
    """
    found, waiting = list[str](), iter(words)
    for word in waiting:
        flag, equals, value = word.partition("=")
        if flag == "--config" and (value := value if equals else next(waiting, "")):
            found.append(f"--config={path_of(value)}")
        else:
            found.append(word)
    return found
