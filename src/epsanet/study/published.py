"""Figures of the paper, to stand beside ours (tables 2 to 5; ``arXiv:2105.14447``)."""

from __future__ import annotations

from dataclasses import dataclass

from epsanet.network.detector_config import Architecture

__all__ = ["PUBLISHED", "PUBLISHED_DETECTORS", "Published", "PublishedDetector"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper says of a network on ImageNet."""

    parameters: float
    """Millions."""
    gmacs: float
    """10⁹ multiply-accumulates at 224×224, norms, activations and pools included."""
    top1: float
    """Percent."""
    top5: float
    """Percent."""


PUBLISHED = {
    "epsanet50_small": Published(parameters=22.56, gmacs=3.62, top1=77.49, top5=93.54),
    "epsanet101_small": Published(parameters=38.90, gmacs=6.82, top1=78.43, top5=94.11),
    "epsanet50_large": Published(parameters=27.90, gmacs=4.72, top1=78.64, top5=94.18),
    "epsanet101_large": Published(parameters=49.59, gmacs=8.97, top1=79.38, top5=94.58),
    "epsanet50_large_g32": Published(parameters=27.90, gmacs=4.72, top1=78.64, top5=94.18),
    "epsanet101_large_g32": Published(parameters=49.59, gmacs=8.97, top1=79.38, top5=94.58),
}
"""By the name of the variant; the paper has one Large, of which both readings are registered."""


@dataclass(frozen=True, kw_only=True)
class PublishedDetector:
    """What the paper says of a detector on COCO val2017 after the 1x schedule; averages in percent."""

    parameters: float
    """Millions that are trained."""
    box_ap: float
    """Mean over IoU 0.50 to 0.95."""
    box_ap50: float
    """At IoU 0.50."""
    box_ap75: float
    """At IoU 0.75."""
    mask_ap: float | None = None
    """Of Mask R-CNN's masks."""


PUBLISHED_DETECTORS: dict[tuple[Architecture, str], PublishedDetector] = {
    ("faster_rcnn", "epsanet50_small"): PublishedDetector(parameters=38.56, box_ap=39.2, box_ap50=60.3, box_ap75=42.3),
    ("faster_rcnn", "epsanet50_large"): PublishedDetector(parameters=43.85, box_ap=40.9, box_ap50=62.1, box_ap75=44.6),
    ("mask_rcnn", "epsanet50_small"): PublishedDetector(
        parameters=41.20, box_ap=40.0, box_ap50=60.9, box_ap75=43.3, mask_ap=35.9
    ),
    ("mask_rcnn", "epsanet50_large"): PublishedDetector(
        parameters=46.50, box_ap=41.4, box_ap50=62.3, box_ap75=45.3, mask_ap=37.1
    ),
    ("retinanet", "epsanet50_small"): PublishedDetector(parameters=34.78, box_ap=38.2, box_ap50=58.1, box_ap75=40.6),
    ("retinanet", "epsanet50_large"): PublishedDetector(parameters=40.07, box_ap=39.6, box_ap50=59.4, box_ap75=42.3),
}
"""By architecture and backbone."""
