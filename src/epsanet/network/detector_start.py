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
    detector gives everything, but for the layers that give the classes where these are others.

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
    same_classes = source.class_names == class_names
    wanted = {name: value for name, value in own.items() if same_classes or not name.startswith(_CLASS_LAYERS)}
    _check_same(given, wanted, f"{detector.config.architecture} on {detector.backbone_name}")
    detector.network.load_state_dict({**own, **{name: given[name] for name in wanted}})
    return f"{len(wanted)} tensors of a detector, {'its classes' if same_classes else 'new classes'}"


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    wrong = [key for key, value in wanted.items() if key not in found or found[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"init_from holds another network than {name}: {len(wrong)} of {len(wanted)} tensors are lacking or of "
            f"another shape, first {wrong[0]}"
        )
