"""Draws the picture of the lanes in docs/speed.md.

Usage: python benchmarks/draw_lanes.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import colormaps, pyplot


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "pictures" / "lanes.svg")
    rows = (
        ("usual, G = 16:\none group's outputs", [0] + [None] * 15),
        ("k = 9, G = 16:\none load of 16 floats", list(range(16))),
        ("k = 7, G = 8:\n8 floats, twice", list(range(8)) * 2),
        ("k = 5, G = 4:\n4 floats, four times", list(range(4)) * 4),
    )
    figure, axis = pyplot.subplots(figsize=(9, 3), layout="constrained")
    colours = colormaps["tab20"]
    for row, (_, groups) in enumerate(rows):
        for lane, group in enumerate(groups):
            face = "white" if group is None else colours(group % 20)
            axis.add_patch(pyplot.Rectangle((lane, -row), 0.94, 0.8, facecolor=face, edgecolor="grey"))
            output = lane // (max(g for g in groups if g is not None) + 1) if row else 0
            text = "" if group is None else f"g{group}\no{output}"
            axis.text(lane + 0.47, 0.4 - row, text, ha="center", va="center", fontsize=7)
    axis.set(xlim=(0, 16), ylim=(-3.1, 0.9), xticks=[], yticks=[0.4 - row for row in range(4)])
    axis.set_yticklabels([name for name, _ in rows], fontsize=8)
    axis.set_title(
        "What the 16 lanes of one vector hold (C = 64): g = group, o = output channel of the group", fontsize=9
    )
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
