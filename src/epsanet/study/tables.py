"""Tables of a study as text, CSV and Markdown; those of cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from epsanet.network.rivals import RIVALS
from epsanet.study.cost import Cost, cost, count, detector_table
from epsanet.study.published import PUBLISHED, PUBLISHED_RIVALS

__all__ = ["Table", "detection_costs", "imagenet_costs", "printed", "small_costs"]

_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text under titles."""

    title: str
    """Above it."""
    columns: tuple[str, ...]
    """Titles; the first column is a name."""
    rows: Sequence[tuple[str, ...]]
    """As many cells as columns."""
    notes: tuple[str, ...] = ()
    """Below it."""


def printed(table: Table, form: Literal["text", "csv", "markdown"]) -> str:
    """The table in a form, ended by a line feed.

    Args:
        table: what is in it.
        form: ``"csv"`` has neither title nor notes.
    """
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
        return file.getvalue()
    if form == "markdown":
        align = ["---" if left else "--:" for left in _left(table)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, *table.rows)]
        lines.insert(1, "|" + "|".join(align) + "|")
        return "\n".join((f"**{table.title}**", "", *lines, *(f"\n{note}" for note in table.notes))) + "\n\n"
    shown = RichTable(title=table.title, box=box.SIMPLE_HEAD)
    for place, (column, left) in enumerate(zip(table.columns, _left(table), strict=True)):
        words = left and place > 0
        shown.add_column(column, justify="left" if left else "right", no_wrap=not words, overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    console.print(shown)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join((*lines, *table.notes)) + "\n"


def _left(table: Table) -> list[bool]:
    """Columns of words; those of numbers go to the right."""
    return [
        not any(cell[:1].isdigit() or cell[:1] in "+-−" for row in table.rows if (cell := row[place]))
        for place in range(len(table.columns))
    ]


def imagenet_costs() -> Table:
    """EPSANets and the networks they are compared with at 224×224: counted, published, the difference, and why."""
    names = ["epsanet50_large", "epsanet50_large_g32", "epsanet101_large", "epsanet101_large_g32"]
    rows = []
    for size in ("50", "101"):
        for key, rival in RIVALS.items():
            name = rival.models[size]
            if rival.model_args:
                parameters, macs = count(name, 224, **rival.model_args)
                rows.append(_cost_row(f"{name}, split", parameters, macs, None, None, None, "no published figure"))
            elif key == "epsanet":
                rows.append(_own_row(cost(name)))
            else:
                rows.append(_rival_row(name, *count(name, 224)))
        rows += [_own_row(cost(name)) for name in names if name.startswith(f"epsanet{size}")]
    return Table(
        title="Cost on ImageNet: parameters [10⁶] and multiply-accumulates at 224×224 [10⁹]",
        columns=(
            *("network", "parameters", "published", "difference", "MACs", "published", "difference"),
            *("published top-1 [%]", "source, and why ours differ"),
        ),
        rows=rows,
        notes=(
            "Counted: all parameters; multiply-accumulates of convolutions, linear layers and matrix products.",
            "EPSANet's paper counts norms, activations and pools too. An empty cell: no figure found in a source that",
            "could be read.",
        ),
    )


def _own_row(row: Cost) -> tuple[str, ...]:
    paper = PUBLISHED[row.name]
    why = "the text's groups, whose cost is not the published one" if row.name.endswith("_g32") else ""
    return _cost_row(
        row.name, row.parameters, row.macs, paper.parameters, paper.gmacs, paper.top1, _joined("paper", why)
    )


def _rival_row(name: str, parameters: int, macs: int) -> tuple[str, ...]:
    found = PUBLISHED_RIVALS.get(name)
    if found is None:
        return _cost_row(name, parameters, macs, None, None, None, "no figure found in a source that could be read")
    text = _joined(found.source, found.why)
    return _cost_row(name, parameters, macs, found.parameters, found.gmacs, found.top1, text)


def _joined(source: str, why: str) -> str:
    return f"{source}: {why}" if why else source


def _cost_row(
    name: str,
    parameters: int,
    macs: int,
    published_parameters: float | None,
    published_gmacs: float | None,
    top1: float | None,
    text: str,
) -> tuple[str, ...]:
    return (
        name,
        *_beside(parameters / 1e6, published_parameters, 2),
        *_beside(macs / 1e9, published_gmacs, 3),
        "" if top1 is None else f"{top1:.2f}",
        text,
    )


def _beside(ours: float, published: float | None, digits: int) -> tuple[str, str, str]:
    if published is None:
        return f"{ours:.{digits}f}", "", ""
    difference = round(ours - published, 2)
    return f"{ours:.{digits}f}", f"{published:.2f}", f"{difference:+.2f}" if difference else "0"


def small_costs() -> Table:
    """The forms for small images, which only this package has: counted for ten classes at 32×32."""
    rows = []
    for rival in RIVALS.values():
        name = rival.models["tiny"]
        parameters, macs = count(name, 32, num_classes=10, **rival.model_args)
        rows.append((name, rival.title, f"{parameters:,}", f"{macs / 1e6:.1f}"))
    return Table(
        title="Cost of the small-image forms: parameters, and multiply-accumulates at 32×32 [10⁶]",
        columns=("network", "title", "parameters", "MACs"),
        rows=rows,
        notes=("Ten classes, the widths of their own; a comparison scales these for equal cost.",),
    )


def detection_costs() -> Table:
    """The paper's three detectors with two backbones: trained parameters counted, published, the difference."""
    rows = [
        (
            row.architecture,
            row.backbone,
            *_beside(row.parameters / 1e6, row.published.parameters, 2),
            f"{row.published.box_ap:.1f}",
            f"{row.published.mask_ap:.1f}" if row.published.mask_ap else "",
        )
        for row in detector_table()
    ]
    return Table(
        title="Cost on COCO: trained parameters [10⁶] of the paper's detectors",
        columns=("detector", "backbone", "parameters", "published", "difference", "published box AP", "mask AP"),
        rows=rows,
        notes=("80 classes and background; stem and first stage frozen, scale and shift of the other norms trained.",),
    )
