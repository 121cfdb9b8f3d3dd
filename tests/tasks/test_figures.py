"""What is drawn are the numbers, under names as they are written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epsanet.tasks import figures
from epsanet.tasks.detection import figures as detection_figures

NAMES = ["$5_$10", "bee"]
"""The first would be a formula, and none that can be set."""


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures in the place of their files."""
    found: list[Any] = []

    def keep(figure: Any, path: Path) -> None:  # noqa: ARG001
        figure.draw_without_rendering()
        found.append(figure)

    for module in (figures, detection_figures):
        monkeypatch.setattr(module, "save_figure", keep)
    return found


def test_the_confusion_matrix_has_the_counts_and_their_share_of_the_true_class(drawn: list[Any]) -> None:
    figures.save_matrix(Path("x.png"), np.array([[3, 1], [0, 5]]), NAMES, title="a$ b$_", columns="predicted")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    shown = {(*text.get_position(), text.get_text()) for text in axes.texts}
    assert shown == {(0, 0, "3"), (1, 0, "1"), (1, 1, "5")}, "columns first; no number where there is none"


def test_the_curves_are_those_of_the_table_and_the_best_epoch_is_marked(drawn: list[Any]) -> None:
    rows = [
        {"epoch": epoch, "lr": 0.1 / epoch, "train_loss": 3 - epoch, "val_loss": 4 - epoch, "val_top1": top1}
        for epoch, top1 in ((1, 40.0), (2, 70.0), (3, 65.0))
    ]
    figures.save_curves(Path("x.png"), rows)
    losses, accuracy, rate = drawn[0].axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[2, 1, 0], [3, 2, 1]]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train", "validation"]
    line, best = accuracy.lines
    assert list(line.get_ydata()) == [40, 70, 65]
    assert (list(best.get_xdata()), list(best.get_ydata()), best.get_label()) == ([2], [70], "best: 70.00 %")
    assert list(rate.lines[0].get_ydata()) == [row["lr"] for row in rows]


def test_precision_is_drawn_over_recall_for_each_class_and_their_mean(drawn: list[Any]) -> None:
    curves = {NAMES[0]: np.linspace(1, 0, 101), NAMES[1]: np.full(101, 0.5)}
    box = SimpleNamespace(curves=curves, per_class=dict.fromkeys(NAMES, (3, 0.4, 0.5)), ap50=0.5)
    evaluation: Any = SimpleNamespace(box=box, mask=None, class_names=NAMES)
    detection_figures.save_precision_recall(Path("x.png"), evaluation, "a$ b$_")
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["$5_$10: 0.500", "bee: 0.500", "mean: 0.500"]
    for line, wanted in zip(axes.lines, (*curves.values(), np.linspace(0.75, 0.25, 101)), strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1, 101))
        np.testing.assert_allclose(line.get_ydata(), wanted)
