"""A detector that is small enough for a test, and targets for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from epsanet.network.detector_config import Architecture, DetectorConfig
from epsanet.network.detectors import Detector, create_detector

BACKBONE = "epsanet50_small"
BACKBONE_ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32], "stem_width": 16}


def detector_config(architecture: Architecture = "mask_rcnn", **changes: Any) -> DetectorConfig:
    """Three levels of 16 channels for images of 64 pixels, nothing frozen."""
    retina = architecture == "retinanet"
    values: dict[str, Any] = {
        "architecture": architecture,
        "min_size": 64,
        "max_size": 64,
        "out_indices": [2, 3] if retina else [1, 2],
        "frozen_stages": -1,
        "norm_eval": False,
        "fpn_channels": 16,
        "representation_size": 16,
        "mask_channels": 8,
        "anchor_sizes": [8, 16, 32, 64] if retina else [12, 24, 48],
        "detector_args": {} if retina else {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 50},
    }
    return DetectorConfig(**{**values, **changes})


def detector(architecture: Architecture = "mask_rcnn", classes: int = 3, **changes: Any) -> Detector:
    torch.manual_seed(1)
    return create_detector(BACKBONE, classes, detector_config(architecture, **changes), backbone_args=BACKBONE_ARGS)


def scene(
    seed: int, objects: int = 3, size: int = 64, classes: int = 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Bright rectangles on grey noise, with their boxes, labels and masks."""
    random = torch.Generator().manual_seed(seed)
    image = 0.4 + 0.1 * torch.rand(3, size, size, generator=random)
    corners = torch.randint(0, size // 2, (objects, 2), generator=random)
    sides = torch.randint(size // 8, size // 2, (objects, 2), generator=random)
    labels = torch.randint(0, classes, (objects,), generator=random)
    masks = torch.zeros(objects, size, size, dtype=torch.uint8)
    for mask, (x, y), (width, height), label in zip(masks, corners, sides, labels, strict=True):
        mask[y : y + height, x : x + width] = 1
        image[:, mask.bool()] = torch.eye(3)[label % 3].unsqueeze(1)
    boxes = torch.cat([corners, corners + sides], dim=1).float()
    return image, {"boxes": boxes, "labels": labels, "masks": masks}


def coco_folder(root: Path, images: int = 6, size: tuple[int, int] = (64, 48)) -> Path:
    """Train and val with objects of two classes, categories 3 and 8, image ids 10, 17, …; the last image is empty."""
    for seed, split in enumerate(("train", "val")):
        (root / split).mkdir(parents=True)
        random = np.random.default_rng(seed)
        annotations: list[dict[str, Any]] = []
        for number in range(images):
            pixels = random.integers(90, 120, (size[1], size[0], 3)).astype(np.uint8)
            for _ in range(2 if number < images - 1 else 0):
                (x, y), (width, height) = random.integers(0, 20, 2).tolist(), random.integers(12, 24, 2).tolist()
                label = int(random.integers(2))
                pixels[y : y + height, x : x + width] = (220, 40, 30) if label else (30, 60, 230)
                corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                annotations.append(
                    {
                        "id": 5 * len(annotations) + 2,
                        "image_id": 10 + 7 * number,
                        "category_id": (3, 8)[label],
                        "iscrowd": 0,
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "segmentation": [corners],
                    }
                )
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        content = {
            "images": [
                {"id": 10 + 7 * number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
                for number in range(images)
            ],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "ant"}, {"id": 8, "name": "cat"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root
