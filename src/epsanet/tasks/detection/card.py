"""The model card of a detector."""

from __future__ import annotations

import time

import torch

from epsanet.tasks.card import data_name, optimisation
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import counted, duration
from epsanet.tasks.detection.scores import DetectionEvaluation

__all__ = ["detector_card", "detector_title"]

_TITLES = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN", "retinanet": "RetinaNet"}

_USE = """## Use

```python
import epsanet

detector = epsanet.load_detector(".")
for detections in epsanet.detect(detector, ["photo.jpg"]):
    print(detections.class_names, detections.scores, detections.boxes)
```

`epsanet predict . IMAGES --pictures drawn` draws them; scaling and normalisation are in `config.json`.
"""


def detector_title(config: TrainConfig) -> str:
    """Detector and backbone, as a person names them."""
    assert config.detector is not None
    return f"{_TITLES[config.detector.architecture]} on {config.model}"


def detector_card(
    *,
    config: TrainConfig,
    parameters: int,
    split: str,
    evaluation: DetectionEvaluation,
    epoch: int,
    seconds: float,
    hardware: str,
) -> str:
    """Markdown with the Hub's metadata.

    Args:
        config: of the run.
        parameters: of the detector.
        split: that was evaluated, test or val.
        evaluation: the result on it.
        epoch: whose weights these are.
        seconds: that training took.
        hardware: name of the processor or GPU.
    """
    detector = config.detector
    assert detector is not None
    data, epochs = data_name(config.data.source), config.schedule.epochs
    names = evaluation.class_names
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    role = "it had no part in training" if split == "test" else "it also chose the epoch"
    rows = "\n".join(
        f"| {kind} | {found.ap:.3f} | {found.ap50:.3f} | {found.ap75:.3f} | {found.ap_small:.3f} "
        f"| {found.ap_medium:.3f} | {found.ap_large:.3f} | {found.ar100:.3f} |"
        for kind, found in (("boxes", evaluation.box), ("masks", evaluation.mask))
        if found is not None
    )
    task = "image-segmentation" if detector.has_masks else "object-detection"
    return f"""---
library_name: epsanet
pipeline_tag: {task}
tags:
- {task}
- epsanet
---
# {detector_title(config)}, trained on {data}

{parameters:,} parameters, for images scaled to {detector.min_size} pixels on the shorter and at most
{detector.max_size} on the longer side, and {len(names)} classes: {shown}.

| {split} | AP | AP50 | AP75 | AP small | AP medium | AP large | AR |
|---|---|---|---|---|---|---|---|
{rows}

COCO's averages over {evaluation.objects:,} objects in {evaluation.images:,} images; -1 where there is nothing to find.
The weights are those of epoch {epoch} of {epochs}, the best on the validation split. The result is on the
{split} split; {role}.

{_USE}
## Training

{optimisation(config)},
batch {config.data.batch_size}, seed {config.seed}, {config.precision};
{duration(seconds)} on {hardware} ({counted(torch.get_num_threads(), "thread")}), torch {torch.__version__},
{time.strftime("%Y-%m-%d")}.

EPSANet is by Zhang, Zu, Lu, Zou and Meng, ACCV 2022, arXiv:2105.14447.
"""
