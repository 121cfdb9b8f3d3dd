"""A trained detector for other runtimes: written, run there on real images, compared, and kept only if it agrees."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epsanet import kernels
from epsanet.data.config import DataConfig
from epsanet.data.digits_scenes import DIGITS_DETECTION, open_digits_scenes
from epsanet.data.images import ImageError, image_files, read_image
from epsanet.deploy.config import ExportConfig
from epsanet.deploy.detection_agreement import DetectionAgreement, DetectionComparison
from epsanet.deploy.export import Exported, unseen
from epsanet.deploy.images import photographs
from epsanet.deploy.portable_detector import PortableDetector
from epsanet.deploy.tune import Progress
from epsanet.deploy.write import check_place, exported_program, write_bundle, write_network
from epsanet.network.bundle import BUNDLE_NAME, DETECTIONS, NETWORK_NAMES
from epsanet.network.detectors import Detector, LoadedDetector, RuntimeDetector, load_detector
from epsanet.network.model_folder import DETECTION

__all__ = ["export_detector"]

MOST_IMAGES = 32
"""Of a folder, to check with."""
_PIXELS = 1.0
"""Largest accepted difference of a box."""
_EXAMPLES = ((1, 3, 80, 112), (1, 3, 192, 96))
"""Shapes of the images that the program is made with and tried on; neither a multiple of the other."""


def export_detector(
    model: str | Path | LoadedDetector,
    folder: str | Path,
    config: ExportConfig,
    *,
    progress: Progress = unseen,
    note: Callable[[str], None] = print,
) -> Exported:
    """Write a detector for another runtime as a bundle, whole or not at all.

    All is in the network's file: from an image of any size, scaled and normalised, to boxes, scores, labels and masks,
    an image at a time. It is run in its runtime on real images, and refused when it finds other things.

    Args:
        model: whatever ``load_detector`` takes, or a loaded detector.
        folder: where to; an older bundle there is replaced.
        config: format and options.
        progress: shows how far the longer steps are.
        note: told what is being done.

    Raises:
        ValueError: for a detector, images or library that is not there, options that detectors do not have, a network
            that the format cannot hold, or one that finds other things.
    """
    folder = Path(folder)
    if config.int8 or config.tune:
        raise ValueError(f"--{'int8' if config.int8 else 'tune'} is for classifiers; leave it out for a detector")
    check_place(folder, config.format)
    loaded = model if isinstance(model, LoadedDetector) else load_detector(model)
    detector = loaded.model.float().cpu().eval()
    if isinstance(detector, RuntimeDetector):
        raise ValueError("this is an exported bundle already; give the model folder that it was made from")
    images = _images(config.images, loaded.class_names)
    described = _description(config, loaded)
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in described.items()
        if key in ("task", "architecture", "backbone", "label_names", "data_config")
    }
    outputs = dict.fromkeys(DETECTIONS if detector.config.has_masks else DETECTIONS[:3], "D")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        note(f"exporting to {config.format}")
        example, other = map(torch.zeros, _EXAMPLES)
        program = exported_program(PortableDetector(detector), example, (2, 3), other)
        network = write_network(program, config.format, scratch, metadata, outputs)
        (scratch / BUNDLE_NAME).write_text(json.dumps(described), encoding="utf-8")
        runtime = load_detector(scratch).model
        agreement = _compared(detector, runtime, progress(images, len(images), "comparing"), config)
        _accept(agreement, config)
        described["agreement"] = dataclasses.asdict(agreement)
        files = [file for file in scratch.iterdir() if file.stem == network.stem]
        written = write_bundle(folder, files, described, _readme(described, agreement))
    return Exported(folder=folder, bytes=written, agreement=agreement, dynamic_size=True)


def _images(source: str | None, class_names: list[str]) -> list[Any]:
    """Image files, or images already open."""
    if source not in (None, DIGITS_DETECTION):
        if not Path(str(source)).is_dir():
            raise ValueError(f"there is no folder {source} of images to check with")
        files = image_files(str(source))
        if not files:
            raise ValueError(f"{source} holds no images")
        places = np.linspace(0, len(files) - 1, min(MOST_IMAGES, len(files))).round().astype(int)
        return [Path(files[place]) for place in places]
    scenes = open_digits_scenes(DataConfig(source=DIGITS_DETECTION))
    if source is None and class_names != scenes.class_names:
        return list(photographs())
    assert scenes.test is not None
    return [scenes.test.read(position, masks=False)[0] for position in range(MOST_IMAGES)]


def _description(config: ExportConfig, loaded: LoadedDetector) -> dict[str, Any]:
    model = loaded.model
    transform = model.network.transform
    return {
        "task": DETECTION,
        "format": config.format,
        "architecture": model.config.architecture,
        "backbone": model.backbone_name,
        "int8": False,
        "dynamic_size": True,
        "label_names": loaded.class_names,
        "data_config": {
            "min_size": model.config.min_size,
            "max_size": model.config.max_size,
            "mean": list(transform.image_mean),
            "std": list(transform.image_std),
        },
    }


def _compared(original: Detector, runtime: Detector, images: Any, config: ExportConfig) -> DetectionAgreement:
    comparison = DetectionComparison(original.config.score_thresh + _tolerance(config))
    for image in images:
        try:
            pixels = _as_tensor(read_image(image))
        except ImageError:
            continue
        with torch.inference_mode(), kernels.use("reference"):
            (expected,) = original([pixels])
        (found,) = runtime([pixels])
        comparison.add(expected, found)
    agreement = comparison.result()
    if agreement.detections + agreement.new == 0:
        raise ValueError(
            f"nothing is found in {agreement.images} images, and so nothing can be compared; give images with objects "
            "with --images FOLDER"
        )
    return agreement


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _tolerance(config: ExportConfig) -> float:
    return 1e-3 if config.tolerance is None else config.tolerance


def _accept(agreement: DetectionAgreement, config: ExportConfig) -> None:
    tolerance, least = _tolerance(config), 99.0 if config.agreement is None else config.agreement
    reasons = []
    if agreement.same < least:
        reasons.append(f"less than --agreement {least:g} % are the same")
    if not agreement.largest_score <= tolerance:
        reasons.append(f"scores differ by more than --tolerance {tolerance:g}")
    if not agreement.largest_box <= _PIXELS:
        reasons.append(f"boxes by more than {_PIXELS:g} pixel")
    if reasons:
        raise ValueError(
            f"the exported detector finds other things ({'; '.join(reasons)}): {agreement}; nothing is kept"
        )


def _readme(described: dict[str, Any], agreement: DetectionAgreement) -> str:
    network, masks = NETWORK_NAMES[described["format"]], described["architecture"] == "mask_rcnn"
    also = ", and `masks` of shape `D, 1, M, M`, the probabilities of the cells of each box" if masks else ""
    data = described["data_config"]
    return (
        f"# {described['architecture']} on {described['backbone']}, {described['format']}\n\n"
        f"`{network}` takes one float32 image of shape `1, 3, H, W`, scaled to a shorter side of {data['min_size']} "
        f"pixels (the longer at most {data['max_size']}) and normalised as `{BUNDLE_NAME}` says. It gives the `D` "
        "detections, best first: `boxes` of shape `D, 4`, x0, y0, x1, y1 in pixels of that image, `scores` and "
        "`labels` of shape `D`"
        f"{also}.\n\n    epsanet predict THIS_FOLDER IMAGES\n\nCompared with the original on {agreement}.\n"
    )
