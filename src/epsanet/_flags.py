"""What jsonargparse takes without a word, and no command can use; and where a mistake stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["file_at_fault", "refuse_empty"]


def refuse_empty(parser: ArgumentParser, namespace: Namespace) -> None:
    """Make sure that what has a default has a value: ``epochs:`` in a YAML file, with nothing behind it, has none. An
    empty string, such as that of a shell variable that is not set, is no value either.

    Args:
        parser: with the defaults.
        namespace: what it has parsed, not yet instantiated.

    Raises:
        ValueError: for the first flag without a value.
    """
    found = vars(namespace.as_flat())
    for name, default in vars(parser.get_defaults().as_flat()).items():
        if found.get(name) == "" and default != "":
            raise ValueError(f"{name} is empty; give it a value, or leave it out")
        if default is None or found.get(name) is not None:
            continue
        group = name.rpartition(".")[0]
        if group in found:
            raise ValueError(f"{group}={found[group]!r} has no parts; leave it out, or give it some, such as {name}")
        raise ValueError(f"{name} is empty; give it a value, or leave it out for {default!r}")


def file_at_fault(error: Exception, words: Sequence[str]) -> str:
    """The configuration file that holds what an error quotes, and a colon; empty where a flag does.

    Args:
        error: of parsing, with the key or option in quotation marks.
        words: of the command line, with ``--config=FILE``.
    """
    config = next((word.partition("=")[2] for word in words if word.startswith("--config=")), "")
    quoted = re.findall(r"[\"']([\w.]+)[\"']", str(error))
    flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    if not Path(config).is_file() or any(name in flags for name in quoted):
        return ""
    keys = re.findall(r"\w+(?=:)", Path(config).read_text(encoding="utf-8", errors="replace"))
    return f"{config}: " if any(name.rpartition(".")[2] in keys for name in quoted) else ""
