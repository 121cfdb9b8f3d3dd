"""Measure a classifier or a detector on a data set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from epsanet.cli.flags import MODEL_HELP, describe_data

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from epsanet.data.config import DataConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("model", type=str, help=f"{MODEL_HELP[:-1]}, or an exported bundle.")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_argument("--split", type=str | None, default=None, help="train, val or test; test or val if left out.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps.")
    parser.add_argument("--precision", type=str, default="32-true", help="32-true, bf16-mixed or 16-mixed.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("--output", type=str | None, default=None, help="Detectors: write COCO results into x.json.")
    return describe_data(parser)


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    from rich.table import Table

    from epsanet._processes import rank
    from epsanet.network.model_folder import is_detector
    from epsanet.tasks.console import console
    from epsanet.tasks.devices import keep_freed_memory
    from epsanet.tasks.evaluate import evaluate

    keep_freed_memory()
    as_json = values.pop("json")
    if is_detector(values["model"]):
        return _evaluate_detector(values, as_json=as_json)
    if values.pop("output") is not None:
        raise ValueError(f"--output writes what a detector found, and {values['model']} is none; leave it out")
    result = evaluate(values.pop("model"), values.pop("data"), **values)
    if rank() > 0:
        return 0
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return 0
    table = Table("class", "images", "top-1 [%]", title=f"{result.images:,} images")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (images, accuracy) in result.per_class.items():
        table.add_row(name, f"{images:,}", f"{accuracy:.2f}")
    console.print(table)
    console.print(f"{result}; top-5 {result.top5:.2f} %, loss {result.loss:.4f}")
    return 0


def _evaluate_detector(values: dict[str, Any], *, as_json: bool) -> int:
    from rich.table import Table

    from epsanet._processes import rank
    from epsanet.tasks.console import console
    from epsanet.tasks.detection.evaluate import evaluate_detector

    for name in ("input_size", "crop_pct", "interpolation", "mean", "std"):
        if getattr(values["data"], name) is not None:
            raise ValueError(f"--data.{name} is for classifiers; a detector has its own preprocessing, leave it out")
    result = evaluate_detector(values.pop("model"), values.pop("data"), **values)
    if rank() > 0:
        return 0
    if as_json:
        print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False))
        return 0
    kinds = [(kind, found) for kind, found in (("box", result.box), ("mask", result.mask)) if found is not None]
    table = Table("class", "objects", title=f"{result.images:,} images")
    for kind, _ in kinds:
        table.add_column(f"{kind} AP", justify="right")
        table.add_column("AP50", justify="right")
    table.columns[1].justify = "right"
    for name, (objects, *_) in result.box.per_class.items():
        numbers = [number for _, found in kinds for number in found.per_class[name][1:]]
        table.add_row(name, f"{objects:,}", *(f"{number:.3f}" for number in numbers))
    console.print(table)
    for kind, found in kinds:
        sizes = f"small {found.ap_small:.3f}, medium {found.ap_medium:.3f}, large {found.ap_large:.3f}"
        console.print(
            f"{kind}: AP {found.ap:.3f}, AP50 {found.ap50:.3f}, AP75 {found.ap75:.3f}; AP of {sizes}; "
            f"AR {found.ar100:.3f}"
        )
    console.print("-1 where there is no object to find" if result.objects else "there is no object to find")
    return 0
