"""Pictures of a run, for people who would rather look than read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from epsanet._files import atomic_file
from epsanet.tasks.scores import Evaluation

__all__ = [
    "Line",
    "Panel",
    "save_batch",
    "save_confusion_matrix",
    "save_curves",
    "save_figure",
    "save_matrix",
    "save_panels",
    "save_pictures",
]

_NAMED_CLASSES = 30
"""A confusion matrix of more classes goes without names and numbers."""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a panel."""

    label: str
    values: Sequence[float]
    """One an epoch."""
    colour: str | None = None
    style: str = "-"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over epochs under one title."""

    title: str
    lines: Sequence[Line]
    ylim: tuple[float | None, float | None] | None = None
    best: str = ""
    """What the highest point of the first line is called; unmarked when left out."""


def save_panels(path: Path, rows: Sequence[dict[str, float]], panels: Sequence[Panel]) -> None:
    """Panels over epochs side by side, and the learning rate.

    Args:
        path: of the PNG file.
        rows: of ``metrics.csv``.
        panels: what else is shown.
    """
    epochs = [row["epoch"] for row in rows]
    rate = Line(label="", values=[row["lr"] for row in rows], colour="tab:green")
    panels = [*panels, Panel(title="learning rate at the end of the epoch", lines=[rate])]
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for line in panel.lines:
            marker = "o" if len(rows) < 3 else None
            axes.plot(epochs, line.values, line.style, color=line.colour, label=line.label or None, marker=marker)
        if panel.best:
            place = int(np.argmax(panel.lines[0].values))
            axes.plot(epochs[place], panel.lines[0].values[place], "o", color="tab:red", label=panel.best)
        axes.set(title=panel.title, xlabel="epoch", ylim=panel.ylim)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def save_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Losses, validation accuracy and learning rate over epochs.

    Args:
        path: of the PNG file.
        rows: of ``metrics.csv``.
    """
    accuracies = [row["val_top1"] for row in rows]
    losses = [
        Line(label="train", values=[row["train_loss"] for row in rows]),
        Line(label="validation", values=[row["val_loss"] for row in rows]),
    ]
    accuracy = Panel(
        title="validation top-1 accuracy [%]",
        lines=[Line(label="", values=accuracies, colour="tab:orange")],
        best=f"best: {max(accuracies):.2f} %",
    )
    save_panels(path, rows, [Panel(title="loss", lines=losses), accuracy])


def save_matrix(path: Path, counts: np.ndarray, names: Sequence[str], *, title: str, columns: str) -> None:
    """How often each true class (row) was taken for each class (column), coloured by its share of the row.

    Args:
        path: of the PNG file.
        counts: shape ``classes, classes``.
        names: one a class.
        title: says of what.
        columns: what the columns are.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(max(5.0, 0.48 * len(names) + 2), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= _NAMED_CLASSES:
        turned = len(names) > 10 or max(map(len, names)) > 8
        places = range(len(names))
        turn: dict[str, Any] = {"rotation": 45, "ha": "right"} if turned else {}
        axes.set_xticks(places, names, parse_math=False, **turn)  # a class may be called "$5"
        axes.set_yticks(places, names, parse_math=False)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel=columns, ylabel="true")
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def save_confusion_matrix(path: Path, evaluation: Evaluation, title: str) -> None:
    """Share of each true class (row) that was given each class (column).

    Args:
        path: of the PNG file.
        evaluation: what was counted.
        title: says of what.
    """
    title = f"{title}: {evaluation.top1:.2f} % top-1 of {evaluation.images:,} images"
    save_matrix(path, evaluation.confusion, evaluation.class_names, title=title, columns="predicted")


def save_pictures(
    path: Path, pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int, size: float, title: str
) -> None:
    """Pictures in rows, each under its title.

    Args:
        path: of the PNG file.
        pictures: of shape ``H, W, 3``.
        titles: one a picture.
        columns: pictures a row, at most.
        size: width of a picture in inches.
        title: of them all.
    """
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(size * columns, size * rows + 0.6), layout="constrained")
    for place, (picture, text) in enumerate(zip(pictures, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(picture)
        axes.set_title(text, fontsize=8, parse_math=False)
        axes.set(xticks=[], yticks=[])  # the layout would make room for them, shown or not
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def save_batch(
    path: Path, images: Tensor, labels: Sequence[str], mean: Sequence[float], std: Sequence[float], title: str
) -> None:
    """Up to 32 pictures of a batch as the network sees them, with their labels.

    Args:
        path: of the PNG file.
        images: normalised, shape ``N, 3, H, W``.
        labels: one a picture.
        mean: that was subtracted, one a channel.
        std: that was divided by, one a channel.
        title: says of what.
    """
    shown = images[:32].numpy().transpose(0, 2, 3, 1) * np.array(std) + np.array(mean)
    titles = [str(label)[:18] for label in labels[:32]]
    save_pictures(path, list(np.clip(shown, 0, 1)), titles, columns=8, size=1.7, title=title)
