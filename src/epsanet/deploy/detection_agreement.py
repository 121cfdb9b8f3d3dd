"""How an exported detector's detections compare with the original's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["DetectionAgreement", "DetectionComparison"]

_SAME = 0.9
"""Least overlap (IoU) of two boxes, or masks, that are the same detection."""

_SAME_PLACE = 0.01
"""Pixels between boxes that are the same whatever their area."""

Detections = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DetectionAgreement:
    """How an exported detector's detections compare with the original's on real images."""

    images: int
    """Compared."""
    detections: int
    """Of the original."""
    found_again: int
    """Of them: the same class, boxes and masks that overlap by 0.9."""
    new: int
    """That the original does not have."""
    largest_score: float
    """Largest difference of a score of those that were found again."""
    largest_box: float
    """Largest difference of a coordinate of those that were found again, in pixels of the image."""
    least_mask_iou: float | None = None
    """Least overlap of masks of the same class and box, where there are masks."""

    @property
    def same(self) -> float:
        """Share of all detections that both have, in percent."""
        return 100 * self.found_again / max(self.detections + self.new, 1)

    def __str__(self) -> str:
        masks = "" if self.least_mask_iou is None else f"; masks overlap by {self.least_mask_iou:.4f} at least"
        return (
            f"{self.images} images: {self.found_again:,} of {self.detections:,} detections found again, {self.new:,} "
            f"new; scores differ by {self.largest_score:.2g} at most, boxes by {self.largest_box:.2g} pixels{masks}"
        )


class DetectionComparison:
    """Compares an image at a time.

    Args:
        least_score: what has a lower score, and no partner, does not count: the detectors' own threshold cuts there.
    """

    def __init__(self, least_score: float) -> None:
        self.least_score = least_score
        self.images = self.detections = self.found_again = self.new = 0
        self.largest_score = self.largest_box = 0.0
        self.least_mask_iou: float | None = None

    def add(self, expected: Detections, found: Detections) -> None:
        """Compare the detections of an image, as ``Detector`` gives them."""
        pairs, masks = _pairs(expected, found), "masks" in expected
        overlaps = (
            [_mask_iou(expected["masks"][i], found["masks"][j]) for i, j in pairs] if masks else [1.0] * len(pairs)
        )
        if masks:
            self.least_mask_iou = min([1.0 if self.least_mask_iou is None else self.least_mask_iou, *overlaps])
        pairs = [pair for pair, overlap in zip(pairs, overlaps, strict=True) if overlap >= _SAME]
        for i, j in pairs:
            score, box = ((expected[name][i] - found[name][j]).abs().max().item() for name in ("scores", "boxes"))
            self.largest_score, self.largest_box = max(self.largest_score, score), max(self.largest_box, box)
        lonely = [
            int((one["scores"] >= self.least_score)[_others(len(one["scores"]), partners)].sum())
            for one, partners in ((expected, [i for i, _ in pairs]), (found, [j for _, j in pairs]))
        ]
        self.images += 1
        self.detections += len(pairs) + lonely[0]
        self.found_again += len(pairs)
        self.new += lonely[1]

    def result(self) -> DetectionAgreement:
        """Over all images so far."""
        return DetectionAgreement(
            images=self.images,
            detections=self.detections,
            found_again=self.found_again,
            new=self.new,
            largest_score=self.largest_score,
            largest_box=self.largest_box,
            least_mask_iou=self.least_mask_iou,
        )


def _pairs(expected: Detections, found: Detections) -> list[tuple[int, int]]:
    """Detections of the same class and box, the best first; each has one partner."""
    iou = box_iou(expected["boxes"], found["boxes"]).nan_to_num(0)
    difference = (expected["boxes"][:, None] - found["boxes"]).abs().amax(2)
    iou[difference < _SAME_PLACE] = 1  # RetinaNet has boxes without area, which overlap nothing
    iou[expected["labels"][:, None] != found["labels"]] = 0
    pairs = []
    for i, row in enumerate(iou):
        j = int(row.argmax()) if len(row) else -1
        if j >= 0 and row[j] >= _SAME:
            pairs.append((i, j))
            iou[:, j] = 0
    return pairs


def _others(count: int, places: list[int]) -> Tensor:
    others = torch.ones(count, dtype=torch.bool)
    others[places] = False
    return others


def _mask_iou(one: Tensor, other: Tensor) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
