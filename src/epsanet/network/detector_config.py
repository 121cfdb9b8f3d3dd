"""A detector as data. Importable without torch, so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ["Architecture", "DetectorConfig"]

_MAX_SIDE = 8192
"""Pixels that an image is scaled to."""
Architecture = Literal["faster_rcnn", "mask_rcnn", "retinanet"]


@dataclass(kw_only=True)
class DetectorConfig:
    """A detector of torchvision over a backbone of timm; the defaults are those of the 1x schedule on COCO."""

    architecture: Architecture = "faster_rcnn"
    """faster_rcnn and retinanet give boxes, mask_rcnn gives boxes and masks."""
    min_size: int = 800
    """Images are scaled until their shorter side has so many pixels …"""
    max_size: int = 1333
    """… or their longer side has so many, whichever comes first."""
    out_indices: list[int] | None = None
    """Feature maps of the backbone under the pyramid, timm's numbers; the last four (RetinaNet: three) if left out."""
    frozen_stages: int = 1
    """Keep the weights of the stem and of so many stages as they are; 0 freezes the stem alone, -1 nothing."""
    norm_eval: bool = True
    """Norms of the backbone use their running statistics and leave them as they are; false when training from random
    weights."""
    fpn_channels: int = 256
    """Width of the feature pyramid, and of the heads that slide over it."""
    representation_size: int = 1024
    """Width of the two linear layers of the box head (not RetinaNet's)."""
    mask_channels: int = 256
    """Width of the four convolutions of the mask head (Mask R-CNN's)."""
    group_norm: bool = False
    """Whether the pyramid and the convolutions of mask head or RetinaNet's heads have group norms, as is usual when
    training from random weights (He et al., ICCV 2019)."""
    sampling_ratio: int = 2
    """Each cell of a pooled region is the mean of so many points a side (not RetinaNet's); 1 takes a quarter of the
    time, which counts on CPUs."""
    anchor_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    """Side of the anchors in pixels of the scaled image, one a level of the pyramid, which has one or two levels more
    than out_indices; RetinaNet has three sizes up to the next octave."""
    aspect_ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Height / width of the anchors."""
    score_thresh: float = 0.05
    """Detections below this score are left out."""
    detector_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of torchvision's detector, for example box_batch_size_per_image."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(
                f"detector.architecture={self.architecture!r} is unknown; use {', '.join(get_args(Architecture))}"
            )
        if not 16 <= self.min_size <= self.max_size <= _MAX_SIDE:
            raise ValueError(
                f"detector.min_size={self.min_size} and max_size={self.max_size} do not fit; use 16 to {_MAX_SIDE}, "
                "rising"
            )
        if self.frozen_stages < -1:
            raise ValueError(f"detector.frozen_stages={self.frozen_stages} is impossible; use -1 or more")
        for name in ("fpn_channels", "representation_size", "mask_channels", "sampling_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"detector.{name}={getattr(self, name)} is impossible; use 1 or more")
        if not self.anchor_sizes or not all(1 <= size <= _MAX_SIDE for size in self.anchor_sizes):
            raise ValueError(
                f"detector.anchor_sizes={self.anchor_sizes} is impossible; use one a pyramid level, 1 to {_MAX_SIDE}"
            )
        if not self.aspect_ratios or min(self.aspect_ratios) <= 0:
            raise ValueError(f"detector.aspect_ratios={self.aspect_ratios} is impossible; use ratios above 0")
        if not 0 <= self.score_thresh < 1:
            raise ValueError(f"detector.score_thresh={self.score_thresh} is impossible; use 0 up to below 1")

    @property
    def has_masks(self) -> bool:
        """Whether the detector gives instance masks."""
        return self.architecture == "mask_rcnn"
