"""Released checkpoints to model folders and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("source", type=str, help="Checkpoint of the released code, or model folder of a classifier.")
    parser.add_argument("destination", type=str, help="Folder to write, or a file that ends in .pth or .pth.tar.")
    parser.add_argument("--data_parallel", action="store_true", help="Put module. before each name of a checkpoint.")
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.network.weights import convert

    loaded = convert(values["source"], values["destination"], data_parallel=values["data_parallel"])
    print(f"{loaded.model.pretrained_cfg['architecture']}, {len(loaded.class_names)} classes → {values['destination']}")
    return 0
