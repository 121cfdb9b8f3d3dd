"""A trained network for other runtimes: written, run there on real images, compared, and kept only if it agrees."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsanet.deploy.config import ExportConfig
from epsanet.deploy.detection_agreement import DetectionAgreement
from epsanet.deploy.images import CALIBRATION_IMAGES, RealImages, included_images, open_images
from epsanet.deploy.portable import portable, reference_logits
from epsanet.deploy.quantize import quantize_onnx, quantize_openvino
from epsanet.deploy.tune import TUNED_BATCHES, Progress, best_forms, race
from epsanet.deploy.write import (
    check_place,
    exported_program,
    read_openvino,
    save_openvino,
    write_bundle,
    write_onnx,
    write_pt2,
)
from epsanet.network.bundle import BUNDLE_NAME, NETWORK_NAMES, RuntimeNetwork, open_runtime
from epsanet.network.weights import LoadedModel, load_model

__all__ = ["Agreement", "Exported", "compare", "export", "unseen"]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How an exported network's answers compare with the original's on real images."""

    images: int
    """Compared."""
    largest: float
    """Largest difference of a probability."""
    mean: float
    """Mean absolute difference of all probabilities."""
    same_top1: float
    """Share of images with the same first class, in percent."""
    top1: tuple[float, float] | None = None
    """Top-1 accuracy before and after, in percent, where the images have labels."""

    def __str__(self) -> str:
        accuracy = f"; top-1 {self.top1[0]:.2f} % before, {self.top1[1]:.2f} % after" if self.top1 else ""
        return (
            f"{self.images} images: probabilities differ by {self.largest:.2g} at most, {self.mean:.2g} on average; "
            f"same top class {self.same_top1:.2f} %{accuracy}"
        )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    """The bundle."""
    bytes: int
    """Of the network."""
    agreement: Agreement | DetectionAgreement
    """With the original."""
    dynamic_size: bool
    """Whether other heights and widths than the network's own are taken."""
    forms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Groups of each branch by PSA module, where they were tuned and changed."""
    milliseconds: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Time of an image before and after tuning, by batch."""


def compare(expected: Tensor, logits: Tensor, labels: Tensor) -> Agreement:
    """Two sets of logits of the same images, as probabilities.

    Args:
        expected: of the original, shape ``N, classes``.
        logits: of the exported network, shape ``N, classes``.
        labels: shape ``N``, -1 where unknown.
    """
    before, after = expected.double().softmax(1), logits.double().softmax(1)
    difference = (before - after).abs()
    difference[~torch.isfinite(difference)] = torch.inf
    known = labels >= 0
    accuracy = None
    if bool(known.any()):
        right = [100 * (p.argmax(1) == labels)[known].double().mean().item() for p in (before, after)]
        accuracy = right[0], right[1]
    return Agreement(
        images=len(labels),
        largest=difference.max().item(),
        mean=difference.mean().item(),
        same_top1=100 * (before.argmax(1) == after.argmax(1)).double().mean().item(),
        top1=accuracy,
    )


def unseen(items: Iterable[Any], total: int, title: str) -> Iterable[Any]:  # noqa: ARG001
    """Progress that nobody is shown."""
    return items


def export(
    model: str | Path | LoadedModel,
    folder: str | Path,
    config: ExportConfig,
    *,
    progress: Progress = unseen,
    note: Callable[[str], None] = print,
) -> Exported:
    """Write a network for another runtime as a bundle, whole or not at all.

    It is exported from torch's own convolutions with norms folded, for any number of images and, where the network
    allows, any size; run in its runtime on real images; and refused when it answers differently.

    Args:
        model: whatever ``load_model`` takes, or a loaded model.
        folder: where to; an older bundle there is replaced.
        config: format and options.
        progress: shows how far the longer steps are.
        note: told what is being done.

    Raises:
        ValueError: for a model, images or library that is not there, a network that the format cannot hold, or one
            whose answers differ by more than accepted.
    """
    folder = Path(folder)
    check_place(folder, config.format)
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if isinstance(loaded.model, RuntimeNetwork):
        raise ValueError("this is an exported bundle already; give the model folder that it was made from")
    network = loaded.model.float().cpu().eval()
    _, height, width = loaded.data_config["input_size"]
    shape = (3, height, width)
    calibration, check = _images(config, loaded, note)
    batches = list(check.batches(_BATCH))
    running = progress(batches, len(batches), "running the original")
    expected = torch.cat([reference_logits(network, batch) for batch in running])
    forms: dict[str, list[int]] = {}
    if config.tune:
        note(f"measuring the forms of branches for {config.format}")
        forms = _changed(network, best_forms(network, config.format, shape, progress))
    with tempfile.TemporaryDirectory() as scratch:
        writer = _Writer(config, loaded, calibration, check, Path(scratch))
        note(f"exporting to {config.format}{' in int8' if config.int8 else ''}")
        path = writer.write(portable(network), "plain")
        milliseconds: dict[int, tuple[float, float]] = {}
        if forms:
            tuned = writer.write(portable(network, forms), "tuned")
            milliseconds = _times(config.format, path, tuned, shape)
            if sum(after / before for before, after in milliseconds.values()) < len(milliseconds):
                path = tuned
            else:
                note("the tuned network as a whole is not faster; the plain one is kept")
                forms = {}
        run = open_runtime(config.format, path, (1, *shape))
        logits = torch.cat([run(batch) for batch in progress(batches, len(batches), "comparing")])
        agreement = compare(expected, logits, check.labels)
        _accept(agreement, config)
        described = _description(config, loaded, writer.dynamic_size, agreement)
        written = write_bundle(folder, list(path.parent.iterdir()), described, _readme(described, agreement))
    return Exported(
        folder=folder,
        bytes=written,
        agreement=agreement,
        dynamic_size=writer.dynamic_size,
        forms=forms,
        milliseconds=milliseconds,
    )


def _images(
    config: ExportConfig, loaded: LoadedModel, note: Callable[[str], None]
) -> tuple[RealImages | None, RealImages]:
    """Images to calibrate with, and images to check with; not the same ones where the data set has several splits."""
    arguments = loaded.data_config, loaded.class_names
    calibration = (
        None if config.calibrate is None else open_images(config.calibrate, *arguments, "train", CALIBRATION_IMAGES)
    )
    source, measured = config.images or config.calibrate, config.accuracy_drop is not None
    if source is None:
        check = included_images(loaded.data_config)
    else:
        check = open_images(source, *arguments, None, labelled=measured, note=note)
    if measured and not bool((check.labels >= 0).all()):
        raise ValueError(f"--accuracy-drop needs labels, and {source} has none; give folders of classes with --images")
    return calibration, check


def _changed(network: nn.Module, forms: dict[str, list[int]]) -> dict[str, list[int]]:
    own = {name: [conv.groups for conv in network.get_submodule(name).spc.branches] for name in forms}  # type: ignore
    return {name: groups for name, groups in forms.items() if groups != own[name]}


def _times(kind: str, plain: Path, tuned: Path, shape: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    runs = [open_runtime(kind, path, (1, *shape)) for path in (plain, tuned)]
    result = {}
    for batch in TUNED_BATCHES:
        before, after = race(runs, torch.randn(batch, *shape))
        result[batch] = before / batch, after / batch
    return result


def _accept(agreement: Agreement, config: ExportConfig) -> None:
    tolerance = config.tolerance if config.tolerance is not None else 1.0 if config.int8 else 1e-4
    least = config.agreement if config.agreement is not None else 95.0 if config.int8 else 99.0
    drop = agreement.top1[0] - agreement.top1[1] if agreement.top1 else 0.0
    reasons = []
    if not agreement.largest <= tolerance:
        reasons.append(f"more than --tolerance {tolerance:g}")
    if agreement.same_top1 < least:
        reasons.append(f"less than --agreement {least:g} %")
    if config.accuracy_drop is not None and drop > config.accuracy_drop:
        reasons.append(f"top-1 drops by more than --accuracy-drop {config.accuracy_drop:g}")
    if reasons:
        raise ValueError(
            f"the exported network answers differently ({'; '.join(reasons)}): {agreement}; nothing is kept"
        )


def _description(config: ExportConfig, loaded: LoadedModel, dynamic_size: bool, agreement: Agreement) -> dict[str, Any]:
    return {
        "format": config.format,
        "architecture": loaded.architecture,
        "int8": config.int8,
        "dynamic_size": dynamic_size,
        "label_names": loaded.class_names,
        "data_config": _plain(loaded.data_config),
        "agreement": dataclasses.asdict(agreement),
    }


def _plain(data_config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {key: list(data_config[key]) if isinstance(data_config[key], tuple) else data_config[key] for key in keys}


def _readme(described: dict[str, Any], agreement: Agreement) -> str:
    network = NETWORK_NAMES[described["format"]]
    classes = len(described["label_names"])
    return (
        f"# {described['architecture']}, {described['format']}{', int8' if described['int8'] else ''}\n\n"
        f"`{network}` takes float32 images of shape `N, 3, H, W`, normalised as `{BUNDLE_NAME}` says, and gives logits "
        f"of shape `N, {classes}`.\n\n    epsanet predict THIS_FOLDER IMAGES\n\nCompared with the original on "
        f"{agreement}.\n"
    )


class _Writer:
    """Writes networks of one configuration into a scratch folder.

    Attributes:
        dynamic_size: whether the last network that was written takes other sizes.
    """

    def __init__(
        self,
        config: ExportConfig,
        loaded: LoadedModel,
        calibration: RealImages | None,
        check: RealImages,
        scratch: Path,
    ) -> None:
        self.config, self.calibration, self.check, self.scratch = config, calibration, check, scratch
        self.metadata = {
            "architecture": loaded.architecture,
            "label_names": json.dumps(loaded.class_names, ensure_ascii=False),
            "data_config": json.dumps(_plain(loaded.data_config)),
        }
        self.dynamic_size = True

    def write(self, network: nn.Module, title: str) -> Path:
        """The file of a network, alone in a folder, or with its ``.bin``."""
        program = self._program(network)
        folder = self.scratch / title
        folder.mkdir()
        path = folder / NETWORK_NAMES[self.config.format]
        if self.config.format == "pt2":
            write_pt2(program, path)
            return path
        onnx_path = self.scratch / f"{title}.onnx"
        write_onnx(program, onnx_path, self.metadata, {"logits": "N"})
        if self.config.format == "openvino":
            self._write_openvino(onnx_path, path)
        elif self.calibration is not None:
            quantize_onnx(onnx_path, self.calibration, path)
        else:
            onnx_path.replace(path)
        return path

    def _program(self, network: nn.Module) -> torch.export.ExportedProgram:
        """Any number of images, and any size where the network allows."""
        example = self.check.images[:2] if len(self.check) > 1 else self.check.images.repeat(2, 1, 1, 1)
        height, width = example.shape[2:]
        try:
            self.dynamic_size = True
            other = torch.zeros(3, 3, height + 32, width + 64)  # torch may hold "any size" that has one area
            return exported_program(network, example.clone(), (0, 2, 3), other)
        except ValueError:
            self.dynamic_size = False
            return exported_program(network, example.clone(), (0,))

    def _write_openvino(self, source: Path, path: Path) -> None:
        network = read_openvino(source)
        if self.calibration is not None:
            network = quantize_openvino(network, self.calibration, self.config.accuracy_drop, self.check)
        save_openvino(network, path, self.metadata)
