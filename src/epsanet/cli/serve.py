"""Show networks in a browser."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import names_first

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["arrange", "parser", "run"]

arrange = names_first


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(
        "models",
        type=str,
        nargs="*",
        help="Model, run or bundle folders, checkpoints, names; the weights of this package if left out.",
    )
    parser.add_argument("--port", type=int, default=7860, help="To listen at; 0 for any that is free.")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="To listen at; 0.0.0.0 to be seen by others.")
    parser.add_argument("--names", type=list[str], default=[], help="Of the web server before it: '[example.org]'.")
    parser.add_argument("--examples", type=str | None, default=None, help="Folder of pictures to try.")
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.web.serve import serve

    try:
        serve(values.pop("models"), **values, note=lambda text: print(text, flush=True))
    finally:
        gc.freeze()  # the interpreter would look at half a million objects before it ends
    return 0
