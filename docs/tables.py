"""Write the tables of the documentation from the networks themselves: python docs/tables.py.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; what is between is replaced.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

import epsanet
from epsanet.study.cost import Cost, cost_table

HERE = Path(__file__).parent
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@functools.cache
def counted() -> tuple[Cost, ...]:
    """Every network, counted once."""
    return tuple(cost_table())


@functools.cache
def built(name: str) -> Any:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name)


def costs() -> str:
    """Every variant with its cost, the paper's figures beside it."""
    lines = [
        "| network | input | parameters | paper | GMACs | paper | paper's top-1 [%] | paper's top-5 [%] |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in counted():
        paper = row.published
        says = (
            (f"{paper.parameters:.2f} M", f"{paper.gmacs:.2f}", f"{paper.top1:.2f}", f"{paper.top5:.2f}")
            if paper
            else ("", "", "", "")
        )
        lines.append(
            f"| `{row.name}` | {row.input_size}² | {row.parameters:,} | {says[0]} | {row.macs / 1e9:.3f} "
            f"| {says[1]} | {says[2]} | {says[3]} |"
        )
    return "\n".join(lines)


def stages() -> str:
    """Blocks, widths and groups of each stage, read off the built networks."""
    lines = [
        "| network | block | SPC | blocks | width of the PSA in stages 1-2-3-4 | groups in stages 1 · 2 · 3 · 4 |",
        "|---|---|---|---|---|---|",
    ]
    for name in (row.name for row in counted()):
        model = built(name)
        blocks, widths, groups, mode = [], [], [], ""
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            modules = [module for module in stage.modules() if isinstance(module, epsanet.PSA)]
            (counts,) = {tuple(branch.groups for branch in module.spc.branches) for module in modules}
            (width,) = {sum(branch.out_channels for branch in module.spc.branches) for module in modules}
            (mode,) = {module.spc.mode for module in modules}
            blocks.append(str(len(stage)))
            widths.append(str(width))
            groups.append("-".join(map(str, counts)))
        shown = f"{groups[0]} in all" if len(set(groups)) == 1 else " · ".join(groups)
        kind = "basic" if isinstance(model.layer1[0], epsanet.EPSABasicBlock) else "bottleneck"
        lines.append(f"| `{name}` | {kind} | {mode} | {'-'.join(blocks)} | {'-'.join(widths)} | {shown} |")
    return "\n".join(lines)


def readings() -> str:
    """Small and Large, what the paper gives and what each reading of it costs."""
    lines = [
        "| network | the paper's parameters / cost | reading | parameters | GMACs |",
        "|---|---|---|--:|--:|",
    ]
    for row in counted():
        if row.published is None:
            continue
        module = built(row.name).layer1[0].conv2
        groups = "-".join(str(branch.groups) for branch in module.spc.branches)
        lines.append(
            f"| `{row.name}` | {row.published.parameters:.2f} M / {row.published.gmacs:.2f} G "
            f"| {module.spc.mode}, groups {groups} | {row.parameters:,} | {row.macs / 1e9:.3f} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"costs": costs, "stages": stages, "readings": readings}


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


if __name__ == "__main__":
    for page in sorted(HERE.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        if PLACE.search(before):
            page.write_text(filled(before), encoding="utf-8")
