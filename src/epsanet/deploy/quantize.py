"""Eight-bit networks by the runtimes' own tools: NNCF for OpenVINO, ONNX Runtime's for ONNX.

Both are calibrated, without training, on real images: they see which values each map takes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from epsanet._optional import require, without_telemetry
from epsanet.deploy.images import RealImages

__all__ = ["quantize_onnx", "quantize_openvino"]


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the progress and advice that a library logs."""
    logger = logging.getLogger(name)
    level, disabled = logger.level, logger.disabled
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.disabled = disabled


def quantize_onnx(path: Path, calibration: RealImages, output: Path) -> None:
    """Quantise an ONNX file: convolutions and matrix products, each output channel by its own scale.

    Args:
        path: of the float32 network.
        calibration: images.
        output: file to write.
    """
    require("onnxruntime", "deploy")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = calibration.batches(1)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with _quiet("root"):
        quantize_static(
            path,
            output,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Concat"],
            per_channel=True,
            reduce_range=True,  # without VNNI, products of eight bits are added up in sixteen, which overflows
        )


def quantize_openvino(network: Any, calibration: RealImages, accuracy_drop: float | None, check: RealImages) -> Any:
    """Quantise a network of OpenVINO by NNCF.

    Args:
        network: ``openvino.Model`` in float32.
        calibration: images.
        accuracy_drop: keep layers in float32, those that harm most first, until top-1 on ``check`` drops by no more
            points than this; all are quantised when left out.
        check: images with labels, for ``accuracy_drop``.

    Returns:
        Another ``openvino.Model``.
    """
    require("nncf", "deploy")
    without_telemetry()
    import nncf

    images = nncf.Dataset([batch.numpy() for batch in calibration.batches(1)])
    with _quiet("nncf"), contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else None):
        if accuracy_drop is None:
            return nncf.quantize(network, images, subset_size=len(calibration))
        pairs = list(zip(check.images.split(1), check.labels.tolist(), strict=True))

        def top1(compiled: Any, wanted: Iterable[tuple[Any, int]]) -> tuple[float, list[float]]:
            right = [float(np.argmax(compiled(image)[0]) == label) for image, label in wanted]
            return sum(right) / len(right), right

        return nncf.quantize_with_accuracy_control(
            network,
            calibration_dataset=images,
            validation_dataset=nncf.Dataset(
                [(image.numpy(), label) for image, label in pairs], transform_func=lambda pair: pair[0]
            ),
            validation_fn=top1,
            max_drop=accuracy_drop / 100,
            subset_size=len(calibration),
        )
