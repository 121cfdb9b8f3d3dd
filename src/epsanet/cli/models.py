"""The networks, their cost, and the weights in the package."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["parser", "run"]


def parser() -> ArgumentParser:
    """The flags of the command."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    task = Literal["classification", "detection"]
    parser.add_argument("--task", type=task, default="classification", help="Networks, or the paper's detectors.")
    parser.add_argument("--json", action="store_true", help="Print the table as JSON.")
    return parser


def run(values: dict[str, Any]) -> int:
    """Do it with the flags\' values; the exit code."""
    if values["task"] == "detection":
        return _detectors(as_json=values["json"])
    from rich import box
    from rich.table import Table

    from epsanet.network.shipped import shipped_weights
    from epsanet.study.cost import cost_table
    from epsanet.tasks.console import console

    rows, shipped = cost_table(), shipped_weights()
    if values["json"]:
        weights = {row.name: [dataclasses.asdict(found) for found in shipped if found.of == row.name] for row in rows}
        print(json.dumps([{**dataclasses.asdict(row), "weights": weights[row.name]} for row in rows], indent=2))
        return 0
    table = Table(
        title="EPSANets in timm, and what the paper says of them",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for title in ("network", "input", "parameters", "paper", "GMACs", "paper", "top-1", "top-5"):
        table.add_column(title, justify="left" if title == "network" else "right", no_wrap=True)
    for row in rows:
        paper = row.published
        table.add_row(
            row.name,
            f"{row.input_size}²",
            f"{row.parameters:,}",
            f"{paper.parameters:.2f} M" if paper else "",
            f"{row.macs / 1e9:.3f}",
            f"{paper.gmacs:.2f}" if paper else "",
            f"{paper.top1:.2f}" if paper else "",
            f"{paper.top5:.2f}" if paper else "",
        )
    console.print(table)
    console.print(
        "GMACs: convolutions and linear layers, one image; the paper's also count norms, activations and pools.\n"
        "Large: the paper's text has groups of 32 (…_large_g32), its cost is that of split branches (…_large);\n"
        "which of the two reached its accuracy is unknown.\n"
        "top-1 and top-5 are the paper's, on ImageNet; its weights were never published."
    )
    table = Table(title="Weights in this package", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("name", "input", "classes", "KiB", "top-1", "measured on"):
        table.add_column(title, justify="left" if title in ("name", "measured on") else "right", no_wrap=True)
    for found in shipped:
        top1 = "" if found.top1 is None else f"{found.top1:.2f}"
        size, kibibytes = f"{found.input_size}²", f"{found.file_bytes / 1024:,.0f}"
        table.add_row(found.name, size, str(found.classes), kibibytes, top1, found.measured_on or "")
    console.print(table)
    console.print("epsanet predict NAME IMAGES, or timm.create_model(NAME, pretrained=True); no download.")
    return 0


def _detectors(*, as_json: bool) -> int:
    from rich import box
    from rich.table import Table

    from epsanet.study.cost import detector_table
    from epsanet.tasks.console import console

    rows = detector_table()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    table = Table(title="The paper's detectors on COCO", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("detector", "backbone", "trained", "paper", "box AP", "AP50", "AP75", "mask AP"):
        table.add_column(title, justify="left" if title in ("detector", "backbone") else "right", no_wrap=True)
    for row in rows:
        paper = row.published
        table.add_row(
            row.architecture,
            row.backbone,
            f"{row.parameters:,}",
            f"{paper.parameters:.2f} M",
            *(f"{value:.1f}" for value in (paper.box_ap, paper.box_ap50, paper.box_ap75)),
            f"{paper.mask_ap:.1f}" if paper.mask_ap else "",
        )
    console.print(table)
    console.print(
        "Trained parameters: 80 classes, stem and first stage frozen, scale and shift of the other norms trained.\n"
        "AP is the paper's, on COCO val2017 after the 1x schedule; nobody has trained these with this package yet."
    )
    return 0
