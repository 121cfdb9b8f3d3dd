"""Pictures of a run, for people who would rather look than read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from epsanet._files import atomic_file
from epsanet.tasks.scores import Evaluation

__all__ = ["save_batch", "save_confusion_matrix", "save_curves", "save_figure"]

_NAMED_CLASSES = 30
"""A confusion matrix of more classes goes without names and numbers."""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def save_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Losses, validation accuracy and learning rate over epochs.

    Args:
        path: of the PNG file.
        rows: of ``metrics.csv``.
    """
    epochs = [row["epoch"] for row in rows]
    best = max(rows, key=lambda row: row["val_top1"])
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    marker = "o" if len(rows) < 3 else None
    loss.plot(epochs, [row["train_loss"] for row in rows], label="train", marker=marker)
    loss.plot(epochs, [row["val_loss"] for row in rows], label="validation", marker=marker)
    loss.set(title="loss", xlabel="epoch")
    loss.legend()
    accuracy.plot(epochs, [row["val_top1"] for row in rows], color="tab:orange", marker=marker)
    accuracy.plot(best["epoch"], best["val_top1"], "o", color="tab:red", label=f"best: {best['val_top1']:.2f} %")
    accuracy.set(title="validation top-1 accuracy [%]", xlabel="epoch")
    accuracy.legend(loc="lower right")
    rate.plot(epochs, [row["lr"] for row in rows], color="tab:green", marker=marker)
    rate.set(title="learning rate at the end of the epoch", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


def save_confusion_matrix(path: Path, evaluation: Evaluation, title: str) -> None:
    """Share of each true class (row) that was given each class (column).

    Args:
        path: of the PNG file.
        evaluation: what was counted.
        title: says of what.
    """
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(counts)
    side = min(max(5.0, 0.45 * classes + 2), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if classes <= _NAMED_CLASSES:
        axes.set_xticks(
            range(classes),
            evaluation.class_names,
            rotation=45 if classes > 10 else 0,
            ha="right" if classes > 10 else "center",
        )
        axes.set_yticks(range(classes), evaluation.class_names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize=8)
    axes.set(
        title=f"{title}: {evaluation.top1:.2f} % top-1 of {evaluation.images:,} images",
        xlabel="predicted",
        ylabel="true",
    )
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
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
    shown = min(len(images), 32)
    columns = min(8, shown)
    rows = math.ceil(shown / columns)
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows + 0.4), layout="constrained")
    for place in range(shown):
        axes = figure.add_subplot(rows, columns, place + 1)
        pixels = images[place].numpy().transpose(1, 2, 0) * np.array(std) + np.array(mean)
        axes.imshow(np.clip(pixels, 0, 1))
        axes.set_title(str(labels[place])[:18], fontsize=8)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
