"""What jsonargparse takes without a word, and no command can use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["refuse_empty"]


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
