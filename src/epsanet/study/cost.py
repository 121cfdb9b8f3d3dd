"""What each network costs: parameters and multiply-accumulates, counted, beside the published figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from epsanet.network.detector_config import Architecture, DetectorConfig
from epsanet.network.detectors import create_detector
from epsanet.network.weights import create_model
from epsanet.study.published import PUBLISHED, PUBLISHED_DETECTORS, Published, PublishedDetector

__all__ = ["Cost", "DetectorCost", "cost", "cost_table", "count", "detector_table"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Arithmetic of a network at its own input size."""

    name: str
    """As timm knows it."""
    input_size: int
    """Height and width in pixels."""
    parameters: int
    """All of them."""
    macs: int
    """Multiply-accumulates of convolutions and linear layers for one image."""
    published: Published | None
    """What the paper says, if it has the network."""


def cost(name: str) -> Cost:
    """Count a network without memory for its weights.

    Args:
        name: any network of timm.

    Raises:
        ValueError: when there is none of that name.
    """
    with torch.device("meta"):
        model = create_model(name)
    size = model.pretrained_cfg["input_size"][-1]
    parameters, macs = _count(model, size)
    return Cost(name=name, input_size=size, parameters=parameters, macs=macs, published=PUBLISHED.get(name))


def count(name: str, input_size: int, **model_args: Any) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of convolutions, linear layers and matrix products for one image.

    Args:
        name: any network of timm.
        input_size: height and width.
        **model_args: of the network.

    Raises:
        ValueError: when there is none of that name, or an argument is impossible.
    """
    with torch.device("meta"):
        model = create_model(name, **model_args)
    return _count(model, input_size)


def _count(model: Any, input_size: int) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model.eval()(torch.empty(1, 3, input_size, input_size))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def cost_table() -> list[Cost]:
    """Every EPSANet, the published ones first, each group by size."""
    rows = [cost(name) for name in timm.list_models("epsanet*")]
    return sorted(rows, key=lambda row: (row.published is None, -row.input_size, row.parameters))


COCO_CLASSES = 80
"""The "things" of COCO 2017."""


@dataclass(frozen=True, kw_only=True)
class DetectorCost:
    """Size of a detector as the 1x schedule trains it on COCO."""

    architecture: Architecture
    """As ``DetectorConfig`` names it."""
    backbone: str
    """As timm knows it."""
    parameters: int
    """Those that are trained: stem and first stage are frozen."""
    published: PublishedDetector
    """What the paper says."""


def detector_table() -> list[DetectorCost]:
    """The paper's detectors, counted without memory for their weights."""
    rows = []
    for (architecture, backbone), published in PUBLISHED_DETECTORS.items():
        with torch.device("meta"):
            detector = create_detector(backbone, COCO_CLASSES, DetectorConfig(architecture=architecture))
        trained = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
        rows.append(DetectorCost(architecture=architecture, backbone=backbone, parameters=trained, published=published))
    return rows
