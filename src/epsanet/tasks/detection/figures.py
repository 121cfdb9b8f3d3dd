"""Pictures of a detection run: images with their boxes, masks and names; curves; what was mixed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from epsanet.tasks.detection.scores import IOU_THRESHOLD, SCORE_THRESHOLD, DetectionEvaluation
from epsanet.tasks.figures import Line, Panel, save_figure, save_matrix, save_panels, save_pictures

__all__ = [
    "drawn",
    "save_detection_confusion",
    "save_detection_curves",
    "save_pairs",
    "save_precision_recall",
    "save_scenes",
]

_NAMED_CLASSES = 30
"""Precision-recall curves of more classes go without a legend."""
_SCENES = 12
_LEAST_SIDE = 240
"""Smaller images are enlarged until a name fits in."""
_OPACITY = 0.45
"""Of masks."""


def colours(class_names: Sequence[str]) -> list[tuple[int, int, int]]:
    """A colour for each class, the same in every picture, neighbours far apart."""
    import colorsys

    hues = [(label * 0.61803398875) % 1 for label in range(len(class_names))]
    return [
        tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 0.65 + 0.35 * (label % 2)))  # type: ignore[misc]
        for label, hue in enumerate(hues)
    ]


def drawn(image: Tensor, objects: Mapping[str, Any], class_names: Sequence[str]) -> Tensor:
    """An image with boxes, names, scores and masks, by torchvision.

    Args:
        image: values 0 to 1, shape ``3, H, W``.
        objects: ``boxes`` of shape ``K, 4``, ``labels`` of shape ``K``, and where there are ``scores`` of shape ``K``
            and ``masks``, ``K`` of shape ``H, W``, which are taken one at a time.
        class_names: of the labels.

    Returns:
        uint8, shape ``3, H, W``; a small image is enlarged by a whole factor.
    """
    picture = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    boxes, masks = objects["boxes"], objects.get("masks")
    factor = max(1, -(-_LEAST_SIDE // min(picture.shape[-2:])))
    if factor > 1:
        size = [factor * side for side in picture.shape[-2:]]
        picture = F.resize(picture, size, interpolation=F.InterpolationMode.NEAREST)
        boxes = boxes * factor
    if not len(boxes):
        return picture
    palette = colours(class_names)
    chosen = [palette[label] for label in objects["labels"].tolist()]
    names = [class_names[label] for label in objects["labels"].tolist()]
    if "scores" in objects:
        names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"].tolist(), strict=True)]
    if masks is not None:
        picture = _with_masks(picture, masks, chosen, factor)
    width = max(2, min(picture.shape[-2:]) // 250)
    return draw_bounding_boxes(
        picture, boxes, names, colors=chosen, width=width, label_colors="white", fill_labels=True
    )


def _with_masks(
    picture: Tensor, masks: Iterable[Tensor], chosen: Sequence[tuple[int, int, int]], factor: int
) -> Tensor:
    """What torchvision's ``draw_segmentation_masks`` draws, without all masks at once: black where two meet."""
    layer = picture.clone()
    once, twice = torch.zeros(2, *picture.shape[-2:], dtype=torch.bool)
    for mask, colour in zip(masks, chosen, strict=True):
        mask = mask.bool().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        layer[:, mask] = torch.tensor(colour, dtype=torch.uint8)[:, None]
        twice |= once & mask
        once |= mask
    layer[:, twice] = 0
    return (picture * (1 - _OPACITY) + layer * _OPACITY).to(torch.uint8)


def save_scenes(
    path: Path,
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Up to twelve images with their objects.

    Args:
        path: of the PNG file.
        images: values 0 to 1, each of shape ``3, H, W``.
        targets: what ``drawn`` takes, one an image.
        class_names: of the labels.
        title: says of what.
    """
    shown = list(zip(images, targets, strict=True))[:_SCENES]
    pictures = [_pixels(drawn(image, target, class_names)) for image, target in shown]
    save_pictures(path, pictures, [""] * len(pictures), columns=4, size=3.6, title=title)


def _pixels(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def save_pairs(
    path: Path,
    entries: Sequence[tuple[Tensor, Mapping[str, Tensor], Mapping[str, Tensor], str]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Ground truth beside what was found, an image a row.

    Args:
        path: of the PNG file.
        entries: image of shape ``3, H, W``, objects, detections, and a text; objects and detections as ``drawn`` takes.
        class_names: of the labels.
        title: says of what.
    """
    pictures, titles = [], []
    for image, target, detection, text in entries:
        sure = detection["scores"] >= SCORE_THRESHOLD
        found = {key: value[sure] for key, value in detection.items()}
        for objects, name in ((target, "objects"), (found, "found")):
            pictures.append(_pixels(drawn(image, objects, class_names)))
            titles.append(f"{name}: {text}")
    save_pictures(path, pictures, titles, columns=2, size=4.5, title=title)


def save_detection_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Losses, averages and learning rate over epochs.

    Args:
        path: of the PNG file.
        rows: of ``metrics.csv``.
    """

    def values(name: str) -> list[float]:
        return [row[name] for row in rows]

    parts = [key for key in rows[0] if key.startswith("train_") and key != "train_loss"]
    losses = [
        Line(label="sum, training", values=values("train_loss"), colour="black"),
        Line(label="sum, validation", values=values("val_loss"), colour="tab:red"),
        *(
            Line(label=key.removeprefix("train_").removeprefix("loss_"), values=values(key), style="--")
            for key in parts
        ),
    ]
    averages = [
        Line(
            label=f"{kind} {name.upper()}",
            values=[max(value, 0) for value in values(f"val_{kind}_{name}")],
            colour=colour,
            style=style,
        )
        for kind, colour in (("box", "tab:orange"), ("mask", "tab:purple"))
        for name, style in (("ap", "-"), ("ap50", "--"))
        if f"val_{kind}_{name}" in rows[0]
    ]
    best = f"best box AP: {max(values('val_box_ap')):.3f}"
    panels = [
        Panel(title="losses", lines=losses, ylim=(0, None)),
        Panel(title="validation", lines=averages, ylim=(0, 1), best=best),
    ]
    save_panels(path, rows, panels)


def save_precision_recall(path: Path, evaluation: DetectionEvaluation, title: str) -> None:
    """Precision over recall at IoU 0.50, a line a class and their mean; for masks too where there are any.

    Args:
        path: of the PNG file.
        evaluation: with the curves.
        title: says of what.
    """
    kinds = [(kind, found) for kind, found in (("boxes", evaluation.box), ("masks", evaluation.mask)) if found]
    figure = Figure(figsize=(7 * len(kinds), 5.5), layout="constrained")
    recall = np.linspace(0, 1, 101)
    palette = colours(evaluation.class_names)
    for place, (kind, averages) in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for name, precision in averages.curves.items():
            colour = tuple(part / 255 for part in palette[evaluation.class_names.index(name)])
            label = f"{name}: {averages.per_class[name][2]:.3f}" if len(averages.curves) <= _NAMED_CLASSES else None
            axes.plot(recall, precision, color=colour, linewidth=1, alpha=0.8, label=label)
        if averages.curves:
            mean: Any = np.mean(list(averages.curves.values()), axis=0)
            axes.plot(recall, mean, color="black", linewidth=2.5, label=f"mean: {averages.ap50:.3f}")
            for text in axes.legend(fontsize=8, loc="lower left").get_texts():
                text.set_parse_math(False)
        axes.set_title(f"{kind}, {title}", parse_math=False)
        axes.set(xlabel="recall", ylabel="precision at IoU 0.50", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_detection_confusion(path: Path, evaluation: DetectionEvaluation, title: str) -> None:
    """Objects by true class (row) and found class (column), with background for what was missed or invented.

    Args:
        path: of the PNG file.
        evaluation: with the counts.
        title: says of what.
    """
    names = [*evaluation.class_names, "background"]
    title = f"{title}, scores from {SCORE_THRESHOLD}, IoU from {IOU_THRESHOLD}"
    save_matrix(path, evaluation.confusion, names, title=title, columns="found")
