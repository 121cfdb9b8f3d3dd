"""Detections of a data set on disk, as COCO's results JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torchvision.ops import box_convert

from epsanet._files import atomic_file
from epsanet.data.detection import DetectionSamples
from epsanet.tasks.detection.scores import DetectionEvaluation

__all__ = ["coco_results", "write_coco_results"]


def coco_results(
    evaluation: DetectionEvaluation, samples: DetectionSamples, kind: Literal["bbox", "segm"] = "bbox"
) -> list[dict[str, Any]]:
    """What was found, as COCO's list of results: ``image_id``, ``category_id``, ``score``, and box or mask.

    Boxes and masks are not in one list: pycocotools would then take the boxes' areas for the masks', and count as
    small, medium and large by them.

    Args:
        evaluation: of the samples.
        samples: whose ids are written.
        kind: boxes or masks.
    """
    rows = []
    for result in evaluation.results:
        boxes = box_convert(result.boxes, "xyxy", "xywh").tolist()
        for place, (box, score, label) in enumerate(
            zip(boxes, result.scores.tolist(), result.labels.tolist(), strict=True)
        ):
            row = {
                "image_id": samples.image_id(result.position),
                "category_id": samples.category_id(label),
                "score": score,
            }
            if kind == "bbox":
                row["bbox"] = box
            else:
                assert result.masks is not None
                row["segmentation"] = result.masks[place]
            rows.append(row)
    return rows


def write_coco_results(path: str | Path, evaluation: DetectionEvaluation, samples: DetectionSamples) -> list[Path]:
    """Write the boxes as ``x.json`` and masks as ``x.segm.json``; ``pycocotools.coco.COCO.loadRes`` reads them.

    Args:
        path: ends in .json.
        evaluation: of the samples.
        samples: whose ids are written.

    Returns:
        The files, each whole or not written at all.
    """
    files: list[tuple[Path, Literal["bbox", "segm"]]] = [(Path(path), "bbox")]
    if evaluation.mask is not None:
        files.append((Path(path).with_suffix(".segm.json"), "segm"))
    for file, kind in files:
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(coco_results(evaluation, samples, kind)), encoding="utf-8")
    return [file for file, _ in files]
