"""Figures of the paper (tables 2 to 5; ``arXiv:2105.14447``), and of the networks it is compared with, beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from epsanet.network.detector_config import Architecture

__all__ = [
    "PUBLISHED",
    "PUBLISHED_DETECTORS",
    "PUBLISHED_RIVALS",
    "Published",
    "PublishedDetector",
    "PublishedRival",
]


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


@dataclass(frozen=True, kw_only=True)
class PublishedRival:
    """What another paper or its release says of a network on ImageNet; None where it could not be looked up."""

    parameters: float | None = None
    """Millions."""
    gmacs: float | None = None
    """10⁹ multiply-accumulates at 224×224, as its authors count."""
    top1: float | None = None
    """Percent, by the training of its authors."""
    source: str
    """Where the figures were read."""
    why: str = ""
    """Why ours differ, where they do."""


_ECA = (
    "it counts 24.37 M for ResNet-50, which torchvision and timm have with 25.56 M; the layers add 86 weights in both"
)
_MACS = "their count includes more than convolutions and linear layers"
_NONLOCAL = "of the placement that BAT's release uses; the paper gives no cost on ImageNet"
_TIMM_SE = "timm's two maps have biases, 16,048 at depth 50"

PUBLISHED_RIVALS: dict[str, PublishedRival] = {
    "resnet50": PublishedRival(parameters=25.56, gmacs=4.09, top1=76.13, source="torchvision, ResNet50_Weights"),
    "resnet101": PublishedRival(parameters=44.55, gmacs=7.80, top1=77.37, source="torchvision, ResNet101_Weights"),
    "seresnet50": PublishedRival(top1=76.71, source="EPSANet's paper, as 1.93 below its own", why=_TIMM_SE),
    "cbamresnet50": PublishedRival(top1=77.62, source="github.com/Jongchan/attention-module"),
    "gcresnet50": PublishedRival(top1=77.70, source="arXiv:1904.11492"),
    "ecaresnet50": PublishedRival(
        parameters=24.37, gmacs=3.86, top1=77.42, source="github.com/BangguWu/ECANet", why=_ECA
    ),
    "ecaresnet101": PublishedRival(
        parameters=42.49, gmacs=7.35, top1=78.65, source="github.com/BangguWu/ECANet", why=_ECA
    ),
    "skresnext50_32x4d": PublishedRival(
        parameters=27.5, gmacs=4.47, top1=79.21, source="github.com/implus/SKNet", why=_MACS
    ),
    "skresnext101_32x4d": PublishedRival(
        parameters=48.9, gmacs=8.46, top1=79.81, source="github.com/implus/SKNet", why="unknown: depth 50 agrees"
    ),
    "nlresnet50": PublishedRival(source="arXiv:1711.07971", why=_NONLOCAL),
    "nlresnet101": PublishedRival(source="arXiv:1711.07971", why=_NONLOCAL),
    "batresnet50": PublishedRival(
        parameters=30.2, gmacs=5.4, top1=78.3, source="github.com/BA-Transform/BAT-Image-Classification"
    ),
    "batresnet101": PublishedRival(
        parameters=49.2, gmacs=9.2, top1=79.1, source="github.com/BA-Transform/BAT-Image-Classification", why=_MACS
    ),
    "resnest50d": PublishedRival(
        parameters=27.5, gmacs=5.39, top1=81.03, source="github.com/zhanghang1989/ResNeSt, PaddleClas", why=_MACS
    ),
    "resnest101e": PublishedRival(top1=82.83, source="github.com/zhanghang1989/ResNeSt", why="top-1 at 256×256"),
    "fcanet50": PublishedRival(parameters=28.07, top1=78.52, source="arXiv:2012.11879, github.com/cfzd/FcaNet"),
    "fcanet101": PublishedRival(top1=79.64, source="github.com/cfzd/FcaNet"),
    "pyconvresnet50": PublishedRival(top1=77.88, source="github.com/iduta/pyconv"),
    "pyconvresnet101": PublishedRival(top1=79.01, source="github.com/iduta/pyconv"),
}
"""By timm's name. A network that is not here has no figure that could be read in a source."""
