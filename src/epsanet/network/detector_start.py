"""First weights of a detector: its backbone from a classifier, or all but its classes from another detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from epsanet.network.detectors import Detector, LoadedDetector, RuntimeDetector
from epsanet.network.inherit import inherit
from epsanet.network.psa import PSA
from epsanet.network.weights import LoadedModel

__all__ = ["start_detector_from"]

_CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "head.classification_head.cls_logits.",
)
"""Of torchvision's detectors: what has an output for each class."""


def start_detector_from(detector: Detector, class_names: Sequence[str], source: LoadedModel | LoadedDetector) -> str:
    """Load the weights of another network into a new detector, and normalise images as it does.

    A classifier gives the backbone; PSA modules inherit from convolutions of the same name, as in ``start_from``. A
    detector gives everything, and of the layers that give the classes what is of those that it knows by name.

    Args:
        detector: changed in place.
        class_names: one a class.
        source: the other network.

    Returns:
        What was taken, in a few words.

    Raises:
        ValueError: when layers differ, of which the first is named, or when PSA modules that have only just inherited
            would stay frozen.
    """
    transform = detector.network.transform
    if isinstance(source, LoadedDetector):
        if isinstance(source.model, RuntimeDetector):
            raise ValueError("init_from is an exported bundle, whose layers cannot be had; give the model folder")
        other = source.model.network.transform
        transform.image_mean, transform.image_std = list(other.image_mean), list(other.image_std)
        return _take_detector(detector, list(class_names), source)
    transform.image_mean, transform.image_std = (list(source.data_config[key]) for key in ("mean", "std"))
    return _take_backbone(detector, source)


def _take_backbone(detector: Detector, source: LoadedModel) -> str:
    body: Any = detector.network.backbone.body
    given = source.model.state_dict()
    heirs = [name for name, module in body.named_modules() if isinstance(module, PSA) and f"{name}.weight" in given]
    frozen = [
        name for name in heirs if not all(weight.requires_grad for weight in body.get_submodule(name).parameters())
    ]
    if frozen:
        raise ValueError(
            f"{frozen[0]} and {len(frozen) - 1} other PSA modules have only just inherited from 3×3 convolutions and "
            "must learn; use --detector.frozen_stages -1"
        )
    found, wanted = inherit(given, body), body.state_dict()
    _check_same(found, wanted, detector.backbone_name)
    body.load_state_dict({name: found[name] for name in wanted})
    psa = f", {len(heirs)} PSA modules from 3×3 convolutions" if heirs else ""
    return f"{len(wanted)} tensors of the backbone{psa}; pyramid and heads are new"


def _take_detector(detector: Detector, class_names: list[str], source: LoadedDetector) -> str:
    given, own = source.model.network.state_dict(), detector.network.state_dict()
    wanted = {name: value for name, value in own.items() if not name.startswith(_CLASS_LAYERS)}
    _check_same(given, wanted, f"{detector.config.architecture} on {detector.backbone_name}")
    found = {name: given[name] for name in wanted}
    known = [
        (place, source.class_names.index(name)) for place, name in enumerate(class_names) if name in source.class_names
    ]
    outputs = [name for name in own if name.startswith(_CLASS_LAYERS)]
    for name in outputs if known else ():
        background = 0 if detector.config.architecture == "retinanet" else 1
        theirs = _by_class(given[name], len(source.class_names) + background, background)
        ours = _by_class(own[name].clone(), len(class_names) + background, background)
        ours[:background] = theirs[:background]
        for place, other in known:
            ours[place + background] = theirs[other + background]
        found[name] = ours if background else ours.transpose(0, 1)
        found[name] = found[name].reshape(own[name].shape)
    detector.network.load_state_dict({**own, **found})
    came = (
        "its classes" if len(known) == len(class_names) else f"{len(known)} of its classes" if known else "new classes"
    )
    return f"{len(found)} tensors of a detector, {came}"


def _by_class(weights: Tensor, classes: int, background: int) -> Tensor:
    """A layer's weights with the class as the first axis; torchvision's RetinaNet has the anchor before it."""
    if background:
        return weights.unflatten(0, (classes, -1))
    return weights.unflatten(0, (-1, classes)).transpose(0, 1)


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    wrong = [key for key, value in wanted.items() if key not in found or found[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"init_from holds another network than {name}: {len(wrong)} of {len(wanted)} tensors are lacking or of "
            f"another shape, first {wrong[0]}"
        )
