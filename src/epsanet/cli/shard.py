"""Pack images into shards."""

from __future__ import annotations

import shlex
from argparse import SUPPRESS
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]

_SOURCE_FIELDS = {"root", "download", "image_key", "label_key", "class_names"}
"""Of the data set's configuration, what says where its images and labels are."""


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.data.config import DataConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("source", type=str, help="Image folder, as for training, or whatever else --data takes.")
    parser.add_argument("destination", type=str, help="Folder to make; train on it with --data wds/FOLDER.")
    parser.add_argument("--shard_size", type=int, default=1000, help="Images a shard, at most.")
    parser.add_argument(
        "--on_bad_image", type=Literal["skip", "raise"], default="skip", help="Leave damaged images out, or stop."
    )
    parser.add_class_arguments(DataConfig, "data", skip={field.name for field in fields(DataConfig)} - _SOURCE_FIELDS)
    for action in parser._actions:
        if "--data" in action.option_strings:
            action.help = SUPPRESS  # it would be short for --data.source, which has a place of its own here
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.data.shard import write_shards
    from epsanet.tasks.console import console, counted, messages, track

    source = replace(values.pop("data"), source=values.pop("source"))
    report = write_shards(source, **values, progress=lambda names, total: track(names, total, "packing"))
    for name, reason in report.bad.items():
        messages.print(f"skipped {name}: {reason}", style="yellow")
    for split, files in report.shards.items():
        console.print(f"{split}: {counted(sum(files.values()), 'image')} in {counted(len(files), 'shard')}")
    console.print(f"\ntrain  epsanet train folder --data {shlex.quote('wds/' + values['destination'])}")
    return 0
