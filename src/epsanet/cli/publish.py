"""Push a model folder to the Hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help="Model or run folder of a classifier, or weights of this package.")
    parser.add_argument("repo", type=str, help="USER/NAME on the Hub; made if it is not there.")
    parser.add_argument("--dry_run", action="store_true", help="Check and list what would be uploaded, and stop.")
    parser.add_argument("--private", action="store_true", help="Make a new repository for its owner only.")
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from rich.table import Table

    from epsanet.tasks.console import console
    from epsanet.tasks.publish import publish

    result = publish(values.pop("model"), values.pop("repo"), **values)
    table = Table("file", "bytes", title=f"{result.folder} → {result.repo}")
    table.columns[1].justify = "right"
    for name, size in result.files.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    names = result.config.get("label_names", [])
    shown = {key: value for key, value in result.config.items() if key != "label_names"}
    console.print(f"config.json: {json.dumps(shown)}")
    console.print(f"{len(names)} classes: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}")
    console.print("read back by timm: the same logits")
    for note in result.notes:
        console.print(f"note: {note}")
    console.print(result.url or "nothing was uploaded: --dry-run")
    return 0
