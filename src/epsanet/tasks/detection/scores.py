"""How good a detector is: COCO's averages for boxes and masks, each class, and what it mixes up."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from epsanet._processes import gather
from epsanet.network.detectors import PastedMasks

__all__ = ["Averages", "DetectionEvaluation", "DetectionScore", "ImageResult", "encode_masks"]

IOU_THRESHOLD = 0.5
"""From this overlap on a detection is of an object, in the confusion matrix and the worst pictures."""
SCORE_THRESHOLD = 0.5
"""From this score on a detection counts there."""


@dataclass(frozen=True, kw_only=True)
class Averages:
    """COCO's twelve numbers, shares from 0 to 1; -1 where there is no object to find."""

    ap: float
    """Average precision, mean over classes and IoU 0.50 to 0.95."""
    ap50: float
    """At IoU 0.50."""
    ap75: float
    """At IoU 0.75."""
    ap_small: float
    """Of objects below 32² pixels."""
    ap_medium: float
    """Of objects of 32² to 96² pixels."""
    ap_large: float
    """Of larger objects."""
    ar1: float
    """Average recall with one detection an image."""
    ar10: float
    """With ten."""
    ar100: float
    """With a hundred."""
    ar_small: float
    """Of objects below 32² pixels."""
    ar_medium: float
    """Of objects of 32² to 96² pixels."""
    ar_large: float
    """Of larger objects."""
    per_class: dict[str, tuple[int, float, float]]
    """Objects, AP and AP50 of each class that has objects."""
    curves: dict[str, np.ndarray]
    """Precision at IoU 0.50 and recall 0, 0.01, … 1 of each class that has objects, shape ``101``."""


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What was found in an image of a data set; boxes ``x0, y0, x1, y1`` in pixels, best first."""

    position: int
    """Of the image in its split."""
    boxes: Tensor
    """Shape ``D, 4``."""
    scores: Tensor
    """Shape ``D``."""
    labels: Tensor
    """Shape ``D``, from 0."""
    masks: tuple[dict[str, Any], ...] | None
    """Compressed run-length encodings: ``size`` and ``counts`` as text."""
    missed: int
    """Objects that no detection of sufficient score overlaps."""
    invented: int
    """Detections of sufficient score that overlap no object."""
    confused: int
    """Objects whose detection has another class."""

    @property
    def errors(self) -> int:
        """All of them."""
        return self.missed + self.invented + self.confused


@dataclass(frozen=True, kw_only=True)
class DetectionEvaluation:
    """The result of an evaluation."""

    images: int
    """Images counted, each once."""
    objects: int
    """Objects in them, crowd regions not counted."""
    class_names: list[str]
    """In the order of the labels."""
    box: Averages
    """Of the boxes."""
    mask: Averages | None
    """Of the masks, where detector and data set have them."""
    confusion: np.ndarray
    """Objects by true class (row) and detected class (column), the last of each background: shape ``K+1, K+1``."""
    results: list[ImageResult]
    """What was found in each image."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without curves and single images."""
        found: dict[str, Any] = {"images": self.images, "objects": self.objects}
        for kind, averages in (("box", self.box), ("mask", self.mask)):
            if averages is None:
                continue
            numbers = {
                field.name: getattr(averages, field.name)
                for field in dataclasses.fields(averages)
                if field.name not in ("per_class", "curves")
            }
            classes = {
                name: {"objects": objects, "ap": ap, "ap50": ap50}
                for name, (objects, ap, ap50) in averages.per_class.items()
            }
            found[kind] = {**numbers, "per_class": classes}
        return found

    def __str__(self) -> str:
        text = f"box AP {self.box.ap:.3f}, AP50 {self.box.ap50:.3f}, AP75 {self.box.ap75:.3f}"
        if self.mask is not None:
            text += f"; mask AP {self.mask.ap:.3f}, AP50 {self.mask.ap50:.3f}, AP75 {self.mask.ap75:.3f}"
        return f"{text} ({self.objects:,} objects in {self.images:,} images)"


class DetectionScore(nn.Module):
    """Collects detections and objects over batches; nothing of it is part of a checkpoint.

    Args:
        num_classes: of the detector.
        masks: whether masks are compared too.
    """

    def __init__(self, num_classes: int, *, masks: bool) -> None:
        super().__init__()
        self.num_classes, self.masks = num_classes, masks
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._results: list[tuple[ImageResult, dict[str, Any]]] = []
        self._confusion = np.zeros((self.num_classes + 1,) * 2, dtype=np.int64)

    def update(
        self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Tensor]], positions: Tensor
    ) -> None:
        """Count a batch.

        Args:
            detections: of the detector, one dict an image; masks may be ``PastedMasks``.
            targets: objects of the data set, one dict an image, crowd regions among them.
            positions: of the images in their split.
        """
        for detection, target, position in zip(detections, targets, positions.tolist(), strict=True):
            order = detection["scores"].argsort(descending=True, stable=True)
            found = {key: detection[key][order].detach().cpu() for key in ("boxes", "scores", "labels")}
            wanted = {key: value.detach().cpu() for key, value in target.items()}
            confusion, missed, invented, confused = _confusion(found, wanted, self.num_classes)
            result = ImageResult(
                position=position,
                boxes=found["boxes"].float(),
                scores=found["scores"].float(),
                labels=found["labels"],
                masks=encode_masks(detection["masks"], order) if "masks" in detection else None,
                missed=missed,
                invented=invented,
                confused=confused,
            )
            objects: dict[str, Any] = {key: wanted[key] for key in ("boxes", "labels", "iscrowd", "area")}
            objects["masks"] = encode_masks(wanted["masks"]) if self.masks else None
            self._results.append((result, objects))
            self._confusion += confusion

    def result(self, class_names: list[str]) -> DetectionEvaluation:
        """What has been counted in all processes; each of them has to ask."""
        everything = [entry for part in gather(self._results) for entry in part]
        everything.sort(key=lambda entry: entry[0].position)
        results, objects = zip(*everything, strict=True) if everything else ((), ())
        box, mask = _averages(results, objects, class_names, masks=self.masks)
        return DetectionEvaluation(
            images=len(results),
            objects=sum(int((target["iscrowd"] == 0).sum()) for target in objects),
            class_names=class_names,
            box=box,
            mask=mask,
            confusion=np.sum(gather(self._confusion), axis=0),
            results=list(results),
        )


def encode_masks(masks: Tensor | PastedMasks, places: Tensor | None = None) -> tuple[dict[str, Any], ...]:
    """COCO's compressed run-length encoding of masks, counts as text; one mask at a time.

    Args:
        masks: ``D`` of shape ``H, W``.
        places: of those that are wanted, in this order; all when left out.
    """
    from faster_coco_eval.core import mask

    encoded = []
    for place in range(len(masks)) if places is None else places.tolist():
        pixels = masks[place].cpu().numpy().astype(np.uint8, order="F")
        rle = mask.encode(pixels)
        counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
        encoded.append({"size": [int(side) for side in rle["size"]], "counts": counts})
    return tuple(encoded)


def _confusion(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classes: int
) -> tuple[np.ndarray, int, int, int]:
    """Detections and objects matched one to one, the largest overlap first whatever the class."""
    confusion = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    sure = found["scores"] >= SCORE_THRESHOLD
    boxes, labels = found["boxes"][sure], found["labels"][sure]
    crowd = wanted["iscrowd"] == 1
    objects, truth = wanted["boxes"][~crowd], wanted["labels"][~crowd]
    overlap = box_iou(objects, boxes)
    taken_objects, taken_boxes = set(), set()
    for place in overlap.flatten().argsort(descending=True).tolist():
        row, column = divmod(place, len(boxes))
        if overlap[row, column] < IOU_THRESHOLD:
            break
        if row not in taken_objects and column not in taken_boxes:
            taken_objects.add(row)
            taken_boxes.add(column)
            confusion[truth[row], labels[column]] += 1
    forgiven = _inside_a_crowd(boxes, wanted["boxes"][crowd])
    for row in set(range(len(objects))) - taken_objects:
        confusion[truth[row], classes] += 1
    for column in set(range(len(boxes))) - taken_boxes:
        confusion[classes, labels[column]] += not forgiven[column]
    matched = confusion[:classes, :classes]
    return (
        confusion,
        int(confusion[:classes, classes].sum()),
        int(confusion[classes].sum()),
        int(matched.sum() - np.trace(matched)),
    )


def _inside_a_crowd(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Which boxes lie at least half within a crowd region."""
    corner = torch.maximum(boxes[:, None, :2], crowds[None, :, :2])
    shared = (torch.minimum(boxes[:, None, 2:], crowds[None, :, 2:]) - corner).clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return (shared >= IOU_THRESHOLD * area[:, None]).any(dim=1)


def _averages(
    results: Sequence[ImageResult], objects: Sequence[dict[str, Any]], class_names: list[str], *, masks: bool
) -> tuple[Averages, Averages | None]:
    """Of boxes and masks."""
    from torchmetrics.detection import MeanAveragePrecision  # takes seconds, and who only detects needs it not

    # Always with the boxes: of masks alone, torchmetrics leaves images without objects out, and what was found in them.
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else ("bbox",),
        iou_thresholds=np.linspace(
            0.5, 0.95, 10
        ).tolist(),  # torchmetrics' own are rounded to float32: 0.8 is above 4/5
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        extended_summary=True,
        backend="faster_coco_eval",
        sync_on_compute=False,
    )
    for result, target in zip(results, objects, strict=True):
        # What update() would append; it takes masks as tensors, and the encoded ones are at hand.
        metric.detection_scores.append(result.scores)
        metric.detection_labels.append(result.labels)
        metric.detection_box.append(box_convert(result.boxes, "xyxy", "xywh"))
        metric.groundtruth_labels.append(target["labels"])
        metric.groundtruth_crowds.append(target["iscrowd"])
        metric.groundtruth_area.append(target["area"])
        metric.groundtruth_box.append(box_convert(target["boxes"], "xyxy", "xywh"))
        if masks:
            metric.detection_mask.append(_as_metric_has_them(result.masks or ()))
            metric.groundtruth_mask.append(_as_metric_has_them(target["masks"]))
    counts = torch.zeros(len(class_names), dtype=torch.int64)
    for target in objects:
        counts += torch.bincount(target["labels"][target["iscrowd"] == 0], minlength=len(class_names))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        found = metric.compute()
    if not masks:
        return _named(found, "", counts.tolist(), class_names), None
    box, mask = (_named(found, prefix, counts.tolist(), class_names) for prefix in ("bbox_", "segm_"))
    return box, mask


def _as_metric_has_them(masks: tuple[dict[str, Any], ...]) -> Any:
    return tuple((tuple(rle["size"]), rle["counts"].encode()) for rle in masks)


def _named(found: dict[str, Tensor], prefix: str, counts: list[int], class_names: list[str]) -> Averages:
    """torchmetrics' numbers; the precisions have shape IoU, recall, class, area, detections."""
    classes: dict[int, int] = {label: place for place, label in enumerate(found["classes"].flatten().tolist())}
    per_class, curves = {}, {}
    for label, (name, count) in enumerate(zip(class_names, counts, strict=True)):
        if count and f"{prefix}precision" in found:
            precision = found[f"{prefix}precision"][:, :, classes[label], 0, -1].double()
            per_class[name] = (count, float(precision.mean()), float(precision[0].mean()))
            curves[name] = precision[0].numpy()
    keys = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}
    keys |= {f"ap_{size}": f"map_{size}" for size in ("small", "medium", "large")}
    keys |= {f"ar{number}": f"mar_{number}" for number in (1, 10, 100)}
    keys |= {f"ar_{size}": f"mar_{size}" for size in ("small", "medium", "large")}
    numbers = {name: float(found[prefix + key]) for name, key in keys.items()}
    return Averages(**numbers, per_class=per_class, curves=curves)
