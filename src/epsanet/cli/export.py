"""Write a network for other runtimes."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import MODEL_HELP

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.deploy.config import ExportConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=MODEL_HELP)
    parser.add_class_arguments(ExportConfig, skip={"int8", "tune"})
    parser.add_argument("--int8", action="store_true", help="Quantise to eight bits; needs --calibrate.")
    parser.add_argument(
        "--tune", action="store_true", help="Measure which form of each grouped convolution is fastest here."
    )
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="Folder to write; ARCHITECTURE-FORMAT if left out."
    )
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from epsanet.deploy.config import ExportConfig
    from epsanet.deploy.detection import export_detector
    from epsanet.deploy.export import export
    from epsanet.network.detectors import load_detector
    from epsanet.network.model_folder import is_detector
    from epsanet.network.weights import load_model
    from epsanet.tasks.console import console, messages, track

    output, source = values.pop("output"), values.pop("model")
    config = ExportConfig(**values)
    told: dict[str, Any] = {"progress": track, "note": messages.print}
    if is_detector(source):
        detector = load_detector(source)
        output = output or f"{detector.model.config.architecture}-{config.format}"
        result = export_detector(detector, output, config, **told)
        sizes = "an image at a time, of any size"
    else:
        loaded = load_model(source)
        output = output or f"{loaded.architecture}-{config.format}{'-int8' if config.int8 else ''}"
        result = export(loaded, output, config, **told)
        sizes = "any number and size of images" if result.dynamic_size else "any number of images, of one size"
    for batch, (before, after) in result.milliseconds.items():
        console.print(f"batch {batch}: {before:.2f} ms an image as it is, {after:.2f} ms tuned")
    if config.tune:
        console.print(f"tuned: {len(result.forms)} PSA modules take another form")
    console.print(str(result.agreement))
    console.print(f"{result.folder}: {result.bytes / 1e6:.2f} MB, {sizes}")
    console.print(f"predict   epsanet predict {shlex.quote(str(output))} IMAGES")
    return 0
