"""Images with boxes and masks: samples, augmentation, and batches out.

Boxes are ``x0, y0, x1, y1`` in pixels, labels count from 0, masks are 0 or 1. As for classification, the order of the
images is a function of (seed, epoch) and the augmentation of an image one of (seed, epoch, position).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from epsanet._processes import world_size
from epsanet.data.config import DataConfig
from epsanet.data.loaders import (
    EpochOrder,
    EvaluationLoader,
    EvaluationOrder,
    SkippingDataset,
    TrainLoader,
    _leave_signals_to_the_main_process,
    check_enough,
    seeded,
    worker_count,
)

__all__ = [
    "DetectionDataset",
    "DetectionSamples",
    "DetectionSplits",
    "Objects",
    "SplitReport",
    "collate",
    "detection_evaluation_loader",
    "detection_train_loader",
    "train_augmentation",
]

_PADDING_COLOUR = (124, 116, 104)
"""Of the border around images that scale jitter made smaller: about the mean of photographs, as after normalising."""


@dataclass(kw_only=True)
class Objects:
    """What is in an image of height ``H`` and width ``W``: ``K`` objects."""

    boxes: Tensor
    """float32, shape ``K, 4``."""
    labels: Tensor
    """int64, shape ``K``."""
    iscrowd: Tensor
    """int64, shape ``K``; 1 marks a region of many objects, which is not trained on and forgives detections."""
    area: Tensor
    """float32, shape ``K``, in pixels; by it objects count as small, medium or large."""
    masks: Tensor | None = None
    """uint8, shape ``K, H, W``."""

    def as_target(self) -> dict[str, Tensor]:
        """The dict that detectors and metrics take."""
        named = {key: getattr(self, key) for key in ("boxes", "labels", "iscrowd", "area", "masks")}
        return {key: value for key, value in named.items() if value is not None}


@dataclass(kw_only=True)
class SplitReport:
    """What a split holds, and what was wrong with it."""

    title: str
    """Name of the split."""
    images: int
    """That can be used."""
    empty: int
    """Of them without an object."""
    per_class: dict[str, int]
    """Objects of each class name, crowd regions not counted."""
    crowds: int
    """Crowd regions."""
    size: str
    """Of the images, in pixels."""
    problems: dict[str, list[str]]
    """Names of what was left out or mended, by kind."""

    def __str__(self) -> str:
        text = f"{self.images:,} images, {sum(self.per_class.values()):,} objects of {len(self.per_class):,} classes"
        text += f", {self.size} pixels" if self.size else ""
        text += f"; {self.empty:,} images without objects" if self.empty else ""
        text += f"; {self.crowds:,} crowd regions" if self.crowds else ""
        none = [name for name, count in self.per_class.items() if count == 0]
        text += f"; none of {', '.join(none[:5])}{', …' if len(none) > 5 else ''}" if none else ""
        return text + "".join(f"; {len(names):,} {kind}" for kind, names in self.problems.items())


class DetectionSamples(ABC):
    """Images with objects, by position."""

    class_names: list[str]
    """In the order of the labels."""
    has_masks: bool
    """Whether objects have masks."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, position: int) -> str:
        """A file name or the like, for messages and tables."""

    @abstractmethod
    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:
        """An image in RGB and its objects.

        Args:
            position: of the image.
            epoch: only samples that are made on the fly differ from epoch to epoch.
            masks: whether masks are wanted.

        Raises:
            ImageError: when it cannot be read.
        """

    def image_id(self, position: int) -> int | str:
        """The image's id in COCO's files."""
        return position + 1

    def category_id(self, label: int) -> int:
        """The class's id in COCO's files."""
        return label + 1


@dataclass(kw_only=True)
class DetectionSplits:
    """The splits of a data set under one list of class names, checked."""

    name: str
    """As ``--data`` was given."""
    train: DetectionSamples
    """To learn from."""
    val: DetectionSamples
    """To choose by."""
    test: DetectionSamples | None
    """To report, if the data set has one."""
    reports: Sequence[Any]
    """What the check found, a split each: its ``title``, and the rest as text."""
    notes: tuple[str, ...] = ()
    """What the user should know besides."""

    @property
    def class_names(self) -> list[str]:
        """Those of the training split."""
        return self.train.class_names


class _JitterScale(torch.nn.Module):
    """Scale an image at random, then crop or pad it to the size that it would have had without."""

    def __init__(self, jitter: tuple[float, float], min_size: int, max_size: int) -> None:
        super().__init__()
        self.jitter, self.min_size, self.max_size = jitter, min_size, max_size

    def forward(self, image: Any, target: dict[str, Any]) -> Any:
        height, width = image.shape[-2:]
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        canvas = (max(round(height * scale), 1), max(round(width * scale), 1))
        return v2.Compose(
            [
                v2.ScaleJitter(canvas[::-1], self.jitter),  # takes width, height
                v2.RandomCrop(
                    canvas,
                    pad_if_needed=True,
                    fill={tv_tensors.Image: _PADDING_COLOUR, tv_tensors.Mask: 0, "others": 0},
                ),
            ]
        )(image, target)


def train_augmentation(config: DataConfig, min_size: int, max_size: int) -> v2.Compose:
    """torchvision's transforms for the configured augmentation, on an image and its target.

    Args:
        config: ``hflip``, ``vflip``, ``color_jitter``, ``scale_jitter``.
        min_size: to which the detector scales an image's shorter side, in pixels.
        max_size: that its longer side may have then.
    """
    steps: list[Any] = []
    if config.scale_jitter is not None:
        steps.append(_JitterScale(config.scale_jitter, min_size, max_size))
    steps += [v2.RandomHorizontalFlip(config.hflip), v2.RandomVerticalFlip(config.vflip)]
    if config.color_jitter:
        steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
    return v2.Compose(steps)


class DetectionDataset(SkippingDataset):
    """Samples through an augmentation: image of shape ``3, H, W`` with values 0 to 1, target, position.

    A plain position reads that image as it is; a pair (epoch, position) augments it, and leaves crowd regions and what
    the augmentation cut away out of the target.

    Args:
        samples: where images and objects come from.
        augmentation: of image and target.
        seed: of the augmentation.
        on_bad_image: what to do when an image that passed the check cannot be read after all.
        masks: whether targets have masks.
    """

    def __init__(
        self,
        samples: DetectionSamples,
        augmentation: v2.Compose | None = None,
        seed: int = 0,
        on_bad_image: Literal["skip", "raise"] = "raise",
        *,
        masks: bool = False,
    ) -> None:
        super().__init__(samples, on_bad_image)
        self.augmentation, self.seed, self.masks = augmentation, seed, masks
        steps = augmentation.transforms if augmentation is not None else ()
        self._crops = any(isinstance(step, _JitterScale) for step in steps)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor | str, dict[str, Tensor], int]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        read = partial(self.samples.read, epoch=epoch, masks=self.masks)
        if isinstance(key, tuple):
            found, position = self._read_or_next(position, read)
        else:
            found = self._read(position, read)
            if isinstance(found, str):
                return found, {}, position
        pixels, objects = found
        image = tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        target = objects.as_target()
        if isinstance(key, tuple):
            with seeded(self.seed, epoch, position):
                image, target = self._augmented(image, target)
        return image.as_subclass(Tensor).float() / 255, target, position

    def _augmented(self, image: Any, target: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        size = tuple(image.shape[-2:])
        target = {key: value[target["iscrowd"] == 0] for key, value in target.items()}
        wrapped: dict[str, Any] = {
            **target,
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
        }
        if "masks" in target:
            wrapped["masks"] = tv_tensors.Mask(target["masks"])
        if self.augmentation is not None:
            image, wrapped = self.augmentation(image, wrapped)
            wrapped["boxes"] = v2.functional.clamp_bounding_boxes(wrapped["boxes"])
        target = {key: value.as_subclass(Tensor) for key, value in wrapped.items()}
        return image, _tightened(target, cropped=self._crops)


def _tightened(target: dict[str, Tensor], *, cropped: bool) -> dict[str, Tensor]:
    """Without the objects that lie outside; after a crop, boxes as tight as what is left of the masks."""
    boxes = target["boxes"]
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    if "masks" in target:
        kept &= target["masks"].bool().flatten(1).any(dim=1)
    target = {key: value[kept] for key, value in target.items()}
    if cropped and "masks" in target and len(target["masks"]):
        target["boxes"] = masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0, 1, 1])  # its corners are inclusive
    return target


def collate(
    items: list[tuple[Tensor, dict[str, Tensor], int]],
) -> tuple[list[Tensor], list[dict[str, Tensor]], Tensor]:
    """A batch: images of any sizes, targets, positions."""
    images, targets, positions = zip(*items, strict=True)
    return list(images), list(targets), torch.tensor(positions)


def detection_train_loader(
    samples: DetectionSamples,
    config: DataConfig,
    augmentation: v2.Compose,
    seed: int,
    *,
    masks: bool,
    pin_memory: bool = False,
) -> TrainLoader:
    """Augmented batches ``images, targets, positions`` in an order drawn anew each epoch.

    Args:
        samples: the training split.
        config: batch size and workers.
        augmentation: of ``train_augmentation``.
        seed: of order and augmentation.
        masks: whether targets have masks.
        pin_memory: whether batches lie where a GPU can fetch them while it computes.

    Raises:
        ValueError: when there are more processes than images.
    """
    if len(samples) < world_size():
        raise ValueError(f"{config.source} has {len(samples)} images to train on for {world_size()} processes")
    workers = worker_count(config)
    return TrainLoader(
        DetectionDataset(samples, augmentation, seed, config.on_bad_image, masks=masks),
        batch_sampler=EpochOrder(len(samples), config.batch_size, seed),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
    )


def detection_evaluation_loader(samples: DetectionSamples, config: DataConfig, *, masks: bool) -> EvaluationLoader:
    """Batches ``images, targets, positions``, each image that can be read once in one of the processes, in order.

    Args:
        samples: a split.
        config: batch size, workers, and what to do with images that cannot be read.
        masks: whether targets have masks.

    Raises:
        ValueError: when there are more processes than images.
    """
    check_enough(samples, config)
    return EvaluationLoader(
        DetectionDataset(samples, on_bad_image=config.on_bad_image, masks=masks),
        EvaluationOrder(len(samples), config.batch_size),
        collate,
        num_workers=worker_count(config),
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )
