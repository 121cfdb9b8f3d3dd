"""Detections on disk: COCO's results JSON of a data set, and tables of images' detections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchvision.ops import box_convert

from epsanet._files import atomic_file
from epsanet.data.detection import DetectionSamples
from epsanet.tasks.detection.scores import DetectionEvaluation

__all__ = ["coco_results", "write_coco_results"]


def coco_results(evaluation: DetectionEvaluation, samples: DetectionSamples) -> list[dict[str, Any]]:
    """What was found, as COCO's list of results: ``image_id``, ``category_id``, ``bbox``, ``score``, ``segmentation``.

    Args:
        evaluation: of the samples.
        samples: whose ids are written.
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
                "bbox": box,
                "score": score,
            }
            if result.masks is not None:
                row["segmentation"] = result.masks[place]
            rows.append(row)
    return rows


def write_coco_results(path: str | Path, evaluation: DetectionEvaluation, samples: DetectionSamples) -> None:
    """Write ``coco_results`` as JSON, whole or not at all; ``pycocotools.coco.COCO.loadRes`` reads it.

    Args:
        path: ends in .json.
        evaluation: of the samples.
        samples: whose ids are written.

    Raises:
        ValueError: for another suffix.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"COCO results are JSON; {path} does not end in .json")
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(coco_results(evaluation, samples)), encoding="utf-8")
