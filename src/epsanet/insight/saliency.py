"""Where in an image a class is seen: Grad-CAM, by captum, on the layer that suits the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epsanet._optional import require

__all__ = ["cam_layer", "check_layer", "grad_cam"]

_FEWEST_CELLS = 7
"""Along each side of the map; what the last stage has at 224×224."""


def cam_layer(model: Any, size: tuple[int, int]) -> str:
    """The deepest stage whose map is still 7×7 or finer, by timm's ``feature_info``; for coarser ones, the finest.

    At 224×224 that is the last stage of a ResNet; for small images an earlier one, where the last has 2×2 or 4×4.

    Args:
        model: a network of timm.
        size: height and width of the images.

    Raises:
        ValueError: for a network whose stages timm does not describe.
    """
    stages = [entry for entry in getattr(model, "feature_info", None) or [] if "reduction" in entry]
    stages = [entry for entry in stages if entry["module"] in dict(model.named_modules())]
    if not stages:
        raise ValueError(f"Grad-CAM knows no layer of {type(model).__name__}; name one with --layer")
    fine = [entry for entry in stages if min(size) >= _FEWEST_CELLS * entry["reduction"]]
    return str((fine or stages[:1])[-1]["module"])


def check_layer(model: nn.Module, layer: str) -> None:
    """Raise a ``ValueError`` when a network has no module of this name, or has the channels of its maps last."""
    output_format = getattr(model, "output_fmt", "NCHW")
    if output_format != "NCHW":
        raise ValueError(
            f"Grad-CAM reads maps of shape N, C, H, W, and {type(model).__name__} gives {output_format}; choose a "
            "network of convolutions"
        )
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        raise ValueError(f"there is no layer {layer!r}; stages are {', '.join(n for n in names if '.' not in n)}")


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layer: str) -> np.ndarray:
    """How much each place speaks for a class (Selvaraju et al., ICCV 2017).

    Args:
        model: a classifier in evaluation mode.
        images: shape ``N, 3, H, W``.
        classes: of each image, shape ``N``.
        layer: name of a module whose output has shape ``N, C, h, w``.

    Returns:
        Shape ``N, H, W``, from 0 to 1 in each image; 0 everywhere where nothing speaks for the class.

    Raises:
        ValueError: when captum is not installed, there is no such layer, or it gives no such map.
    """
    require("captum", "insight")
    from captum.attr import LayerGradCam

    check_layer(model, layer)
    try:
        with torch.enable_grad():
            maps = LayerGradCam(model, model.get_submodule(layer)).attribute(
                images.clone().requires_grad_(), target=classes, relu_attributions=True
            )
    except AssertionError as error:  # captum's, where the layer was never called
        raise ValueError(f"the network goes around layer {layer!r}; choose a module that it is a part of") from error
    if not _covers(maps.shape, images.shape):
        raise ValueError(
            f"layer {layer!r} gives no map of the image but shape {tuple(maps.shape)}; choose a stage of convolutions"
        )
    large = F.interpolate(maps.detach(), images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    peaks = large.flatten(1).amax(1)[:, None, None]
    return np.asarray(torch.where(peaks > 0, large / peaks.clamp_min(1e-30), 0).cpu().numpy())


def _covers(map_shape: Sequence[int], image_shape: Sequence[int]) -> bool:
    """Whether maps have places, in the proportions of the images: other axes, or windows of it, have not, but for
    rounding."""
    count, _, height, width = image_shape
    return (
        len(map_shape) == 4
        and map_shape[0] == count
        and map_shape[2] * map_shape[3] > 1
        and abs(map_shape[2] * width - map_shape[3] * height) <= height + width
    )
