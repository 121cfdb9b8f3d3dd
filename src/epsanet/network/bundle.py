"""Bundles: an exported network with its preprocessing and class names, run by the runtime that its format needs.

A **bundle** is a folder of ``bundle.json`` and one network, ``network.onnx``, ``network.xml`` with ``network.bin``, or
``network.pt2``; ``epsanet export`` writes it, ``load_model`` and ``load_detector`` read it. It may come from anywhere:
``bundle_checks`` looks at it before a runtime does. Runtimes run on the CPU, in float32 (and int8 where the network
has it).
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from epsanet._optional import require, without_telemetry
from epsanet.network import bundle_checks
from epsanet.network.bundle_checks import first_line
from epsanet.network.detector_config import Architecture
from epsanet.network.model_folder import BUNDLE_NAME, DETECTION, NETWORK_NAMES

__all__ = [
    "BUNDLE_NAME",
    "DETECTIONS",
    "NETWORK_NAMES",
    "RuntimeNetwork",
    "open_outputs",
    "open_runtime",
    "read_bundle",
    "read_detector_bundle",
    "runtime_outputs",
]

DETECTIONS = ("boxes", "scores", "labels", "masks")
"""What a detector gives, in this order; masks where its architecture has them."""
_KEYS = ("format", "architecture", "int8", "dynamic_size", "label_names", "data_config")

Run = Callable[[Tensor], list[Tensor]]
"""From images to the outputs of a network."""


class RuntimeNetwork(nn.Module):
    """A network in another runtime that looks like a module: images in, logits out, no gradients, on the CPU.

    Args:
        run: gives logits for images.
        num_classes: of the logits.
        size: height and width that the network was exported for, when it takes no others.
        digest: of its files; the module's only state, by which one bundle can be told from another.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], num_classes: int, size: tuple[int, int] | None, digest: bytes
    ) -> None:
        super().__init__()
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))
        self.run, self.num_classes, self.size = run, num_classes, size

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits of shape ``N, classes`` for images of shape ``N, 3, H, W``.

        Raises:
            ValueError: for images of a size that the network does not take, and when the runtime fails.
        """
        height, width = x_NCHW.shape[2:]
        if self.size is not None and (height, width) != self.size:
            raise ValueError(f"this bundle takes {self.size[0]}×{self.size[1]} pixels only, not {height}×{width}")
        logits = runtime_outputs(self.run, x_NCHW)
        if logits.shape != (len(x_NCHW), self.num_classes):
            raise ValueError(f"the network gives {tuple(logits.shape)}, not one of {self.num_classes} classes an image")
        return logits.to(x_NCHW.device)


def runtime_outputs(run: Callable[[Tensor], Any], x_NCHW: Tensor) -> Any:
    """What a runtime gives for images from anywhere.

    Raises:
        ValueError: when it fails.
    """
    try:
        return run(x_NCHW.detach().float().cpu().contiguous())
    except _runtime_errors() as error:
        raise ValueError(f"the runtime failed at {tuple(x_NCHW.shape)}: {first_line(error)}") from error


def read_bundle(folder: Path) -> tuple[RuntimeNetwork, dict[str, Any]]:
    """Open the bundle of a classifier.

    Args:
        folder: with ``bundle.json``.

    Returns:
        The network, and what ``bundle.json`` says: ``label_names``, ``data_config`` and the like.

    Raises:
        ValueError: when it is damaged, may do harm, holds a detector, or its runtime is not installed.
    """
    description = _read_description(folder)
    if description.get("task") == DETECTION:
        raise ValueError(
            f"{folder} holds a detector; epsanet.load_detector reads it, and so do predict, evaluate, export and serve"
        )
    path = folder / NETWORK_NAMES[description["format"]]
    _, height, width = description["data_config"]["input_size"]
    run = open_runtime(description["format"], path, (1, *description["data_config"]["input_size"]))
    fixed = None if description["dynamic_size"] else (height, width)
    return RuntimeNetwork(run, len(description["label_names"]), fixed, _digest(path)), description


def read_detector_bundle(folder: Path) -> tuple[Run, bytes, dict[str, Any]]:
    """Open the bundle of a detector.

    Args:
        folder: with ``bundle.json``.

    Returns:
        What gives ``DETECTIONS`` of an image of shape ``1, 3, H, W``, the digest of its files, and what
        ``bundle.json`` says.

    Raises:
        ValueError: when it is damaged, may do harm, holds no detector, or its runtime is not installed.
    """
    description = _read_description(folder)
    if description.get("task") != DETECTION:
        raise ValueError(f"{folder} holds a classifier; epsanet.load_model reads it")
    path = folder / NETWORK_NAMES[description["format"]]
    data = description["data_config"]
    outputs = len(DETECTIONS) - (description["architecture"] != "mask_rcnn")
    run = open_outputs(description["format"], path, (1, 3, data["min_size"], data["max_size"]), outputs)
    return run, _digest(path), description


def _digest(path: Path) -> bytes:
    found = hashlib.sha256(path.read_bytes())
    if path.with_suffix(".bin").is_file():
        found.update(path.with_suffix(".bin").read_bytes())
    return found.digest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / BUNDLE_NAME
    bundle_checks.check_file(path, most=64 * 2**20)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}; copy the bundle again") from error
    wrong = _wrong_with(description)
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong}; copy or export the bundle again")
    data = description["data_config"]
    description["data_config"] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return dict(description)


def _wrong_with(description: Any) -> str:
    if not isinstance(description, dict) or any(key not in description for key in _KEYS):
        return f"it must say {', '.join(_KEYS)}"
    if description["format"] not in list(NETWORK_NAMES):  # it may be a list
        return f"format {description['format']!r} is none of {', '.join(NETWORK_NAMES)}"
    names = description["label_names"]
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        return "label_names is no list of names"
    data = description["data_config"]
    if not isinstance(data, dict):
        return "data_config is no mapping"
    wrong = wrong_with_colours(data)
    if wrong:
        return wrong
    return _wrong_with_detector(description) if description.get("task") == DETECTION else _wrong_with_classifier(data)


def wrong_with_colours(data: dict[str, Any]) -> str:
    """What keeps ``mean`` and ``std`` from being numbers of three colours, nothing if they are."""
    for key in ("mean", "std"):
        numbers = data.get(key)
        if not (
            isinstance(numbers, list)
            and len(numbers) == 3
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        ):
            return f"{key}={numbers!r} is not three numbers"
    return f"std={data['std']!r} is not positive" if min(data["std"]) <= 0 else ""


def _wrong_with_detector(description: dict[str, Any]) -> str:
    if description["architecture"] not in get_args(Architecture):
        return f"architecture {description['architecture']!r} is none of {', '.join(get_args(Architecture))}"
    sizes = [description["data_config"].get(key) for key in ("min_size", "max_size")]
    if not (
        all(type(number) is int for number in sizes) and 16 <= sizes[0] <= sizes[1] <= bundle_checks.MOST_PIXELS_A_SIDE
    ):
        return f"min_size, max_size={sizes!r} are not 16 to {bundle_checks.MOST_PIXELS_A_SIDE} pixels, rising"
    return ""


def _wrong_with_classifier(data: dict[str, Any]) -> str:
    size = data.get("input_size")
    if not (
        isinstance(size, list)
        and len(size) == 3
        and all(type(number) is int for number in size)
        and size[0] == 3
        and 1 <= min(size[1:]) <= max(size[1:]) <= bundle_checks.MOST_PIXELS_A_SIDE
    ):
        return f"input_size={size!r} is not 3, height, width up to {bundle_checks.MOST_PIXELS_A_SIDE}"
    if type(data.get("crop_pct")) not in (int, float) or not 0.01 <= data["crop_pct"] <= 1:
        return f"crop_pct={data.get('crop_pct')!r} is no share"
    if data.get("interpolation") not in ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"):
        return f"interpolation={data.get('interpolation')!r} is unknown"
    if data.get("crop_mode") not in ("center", "squash", "border"):
        return f"crop_mode={data.get('crop_mode')!r} is unknown"
    return ""


def open_runtime(kind: str, path: Path, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A function from images to logits that runs a network file.

    Args:
        kind: ``onnx``, ``openvino`` or ``pt2``.
        path: of the file.
        shape: of a batch, to work out the sizes of all maps before one is allocated.

    Raises:
        ValueError: when the file is damaged, may do harm, or the runtime is not installed.
    """
    run = open_outputs(kind, path, shape, 1)
    return lambda images: run(images)[0]


def open_outputs(kind: str, path: Path, shape: tuple[int, ...], outputs: int) -> Run:
    """As ``open_runtime``, for a network of several outputs.

    Args:
        kind: ``onnx``, ``openvino`` or ``pt2``.
        path: of the file.
        shape: of a batch, the largest that is to come.
        outputs: how many there must be.

    Raises:
        ValueError: as ``open_runtime``, and for other than so many outputs.
    """
    opened = {"onnx": _open_onnx, "openvino": _open_openvino, "pt2": _open_pt2}
    return opened[kind](path, shape, outputs)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """What runtimes raise; ONNX Runtime's errors share no base class but ``Exception``."""
    import sys

    module = sys.modules.get("onnxruntime.capi.onnxruntime_pybind11_state")
    found = [] if module is None else list(vars(module).values())
    return RuntimeError, *(value for value in found if isinstance(value, type) and issubclass(value, Exception))


def _open_onnx(path: Path, shape: tuple[int, ...], outputs: int) -> Run:
    require("onnxruntime", "deploy")
    require("onnx", "deploy")
    bundle_checks.check_onnx(path, shape, outputs)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except _runtime_errors() as error:
        raise ValueError(f"ONNX Runtime cannot read {path}: {first_line(error)}") from error
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]


def _open_openvino(path: Path, shape: tuple[int, ...], outputs: int) -> Run:
    require("openvino", "deploy")
    bundle_checks.check_openvino(path)
    without_telemetry()
    import openvino

    try:
        core = openvino.Core()
        bundle_checks.check_openvino_maps(path, core.read_model(path), shape, outputs)
        # Without the hint, processors that know bfloat16 would compute in it.
        config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(path), "CPU", config)
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot read {path}: {first_line(error)}") from error
    own = threading.local()  # a request is for one thread at a time

    def run(images: Tensor) -> list[Tensor]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer(images.numpy(), share_inputs=True)
        return [torch.from_numpy(output.copy()) for output in found.values()]

    return run


def _open_pt2(path: Path, shape: tuple[int, ...], outputs: int) -> Run:
    bundle_checks.check_pt2(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise ValueError(f"torch cannot read {path}: {first_line(error)}") from error
    bundle_checks.check_pt2_maps(path, module, shape, outputs)

    def run(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            found = module(images)
        return [found] if isinstance(found, Tensor) else list(found)

    return run
