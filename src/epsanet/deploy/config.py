"""What to export. Importable without torch, so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["ExportConfig", "Format"]

Format = Literal["onnx", "openvino", "pt2"]


@dataclass(kw_only=True)
class ExportConfig:
    """What to write, and how well it must agree with the network."""

    format: Format = "onnx"
    """onnx (ONNX Runtime and others), openvino (Intel's, also fast on other CPUs) or pt2 (torch.export)."""
    images: str | None = None
    """Images to check with, or a data set as --data takes it but torch/NAME (for a detector a folder); those of
    --calibrate, or included ones, when left out."""
    int8: bool = False
    """Quantise to eight bits; needs --calibrate."""
    calibrate: str | None = None
    """Images to calibrate int8 with, like those it will see: a folder, or a data set as --data takes it but
    torch/NAME."""
    accuracy_drop: float | None = None
    """Points of top-1 that int8 may lose at most; layers that harm stay float32. OpenVINO, labelled images."""
    tune: bool = False
    """Measure which form of each grouped convolution is fastest in the runtime on this machine."""
    tolerance: float | None = None
    """Largest accepted difference of a probability; 0.0001, or any with --int8. Of a detection's score; 0.001."""
    agreement: float | None = None
    """Least accepted share of images with the same top class, in percent; 99, or 95 with --int8. Of detections that are
    found again; 99."""

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise ValueError(f"format={self.format!r} is unknown; use {', '.join(get_args(Format))}")
        if self.int8 and self.format == "pt2":
            raise ValueError("int8 is for onnx and openvino; pt2 is float32")
        if self.int8 and self.calibrate is None:
            raise ValueError("int8 must see images like those it will be used on; add --calibrate FOLDER")
        if self.calibrate is not None and not self.int8:
            raise ValueError("--calibrate is for --int8; give images to check with as --images")
        if self.accuracy_drop is not None and not (self.int8 and self.format == "openvino"):
            raise ValueError("--accuracy-drop is NNCF's accuracy control; use it with --int8 --format openvino")
        for name, most in (("accuracy_drop", 100), ("tolerance", 1), ("agreement", 100)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name}={value} is impossible; use 0 to {most}")
