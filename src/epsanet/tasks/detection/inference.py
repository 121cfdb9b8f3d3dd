"""The detector that evaluation and prediction run: its backbone optimised on CPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from epsanet.network.detectors import Detector, RuntimeDetector
from epsanet.tasks.inference import inference_network

__all__ = ["inference_detector"]

_EXAMPLE = 64
"""Height and width of the image that the optimised backbone is compared on."""


def inference_detector(
    detector: Detector, device: torch.device, precision: str = "32-true", note: Callable[[str], None] = lambda _: None
) -> Detector:
    """The detector with the same detections, but for rounding, whose backbone runs fastest (``inference_network``).

    That of a bundle stays as it is.

    Args:
        detector: in float32; it stays as it is.
        device: where it is to run.
        precision: Lightning's name of the arithmetic.
        note: told what was done, or why not.
    """
    if isinstance(detector, RuntimeDetector):
        return detector.eval()
    body = detector.network.backbone.body.eval()
    optimised = inference_network(body, (3, _EXAMPLE, _EXAMPLE), device, precision, note)
    if optimised is body:
        elsewhere = any(weight.device.type != device.type for weight in detector.parameters())
        return (copy.deepcopy(detector) if elsewhere else detector).eval()
    detector.network.backbone.body = None  # weights that are not needed twice
    try:
        result = copy.deepcopy(detector)
    finally:
        detector.network.backbone.body = body
    result.network.backbone.body = optimised
    return result.eval()
