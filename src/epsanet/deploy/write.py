"""Programs of ``torch.export`` as network files, and bundles as folders."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from epsanet._files import atomic_folder
from epsanet._optional import require, without_telemetry
from epsanet.network.bundle import BUNDLE_NAME, NETWORK_NAMES

__all__ = [
    "check_place",
    "exported_program",
    "read_openvino",
    "save_openvino",
    "write_bundle",
    "write_network",
    "write_onnx",
    "write_pt2",
]

_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "pt2": ()}
_AXES = ["N", "3", "H", "W"]


def check_place(folder: Path, kind: str) -> None:
    """See that a bundle can be written.

    Args:
        folder: where to.
        kind: its format.

    Raises:
        ValueError: when something else is there, or in an older bundle there, or a library is missing.
    """
    if folder.exists() and not (folder / BUNDLE_NAME).is_file():
        raise ValueError(f"{folder} is there and no bundle; name another folder with --output")
    if folder.exists():  # it is replaced as a whole
        names = {BUNDLE_NAME, "README.md", "network.bin", *NETWORK_NAMES.values()}
        other = sorted(entry.name for entry in folder.iterdir() if entry.name not in names)
        if other:
            raise ValueError(
                f"{folder} holds other files than a bundle ({other[0]}); name another folder with --output"
            )
    for library in _NEEDED[kind]:
        require(library, "deploy")


def exported_program(
    network: nn.Module, example: Tensor, axes: Sequence[int], other: Tensor | None = None
) -> torch.export.ExportedProgram:
    """A network as a program.

    Args:
        network: in plain operators.
        example: images.
        axes: of the images, that may have any length.
        other: images of another shape, which the program must run on.

    Raises:
        ValueError: when ``torch.export`` cannot hold it.
    """
    some = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    try:
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(network, (example,), dynamic_shapes=(some,))
        if other is not None:
            program.module()(other)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        torch._dynamo.exc.TorchDynamoException,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"torch.export cannot hold this network: {reason}") from error
    return program


def write_network(
    program: torch.export.ExportedProgram,
    kind: str,
    folder: Path,
    metadata: Mapping[str, str],
    outputs: Mapping[str, str],
) -> Path:
    """Write a program in one of the formats, in float32.

    Args:
        program: that takes images.
        kind: the format.
        folder: empty, or to be made.
        metadata: to keep inside, where the format has a place for it.
        outputs: names of the outputs, and of the first axis of each.

    Returns:
        The network's file, in the folder.
    """
    folder.mkdir(exist_ok=True)
    path = folder / NETWORK_NAMES[kind]
    if kind == "pt2":
        write_pt2(program, path)
    elif kind == "onnx":
        write_onnx(program, path, metadata, outputs)
    else:
        between = folder / NETWORK_NAMES["onnx"]
        write_onnx(program, between, metadata, outputs)
        save_openvino(read_openvino(between), path, metadata)
        between.unlink()
    return path


def write_pt2(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program without the images that it was made with."""
    program.example_inputs = None
    torch.export.save(program, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter, without its remarks about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    """Write a program as one ONNX file.

    Args:
        program: that takes images.
        path: where to.
        metadata: to keep inside.
        outputs: names of the outputs, and of the first axis of each.
    """
    import onnx

    with _quiet():
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["images"], output_names=list(outputs)
        )
    assert written is not None
    model = written.model_proto
    for value in (*model.graph.input, *model.graph.output, *model.graph.node, *model.graph.value_info):
        del value.metadata_props[:]  # traces of this machine's file names
    for name, dimension in zip(_AXES, model.graph.input[0].type.tensor_type.shape.dim, strict=True):
        if dimension.HasField("dim_param"):
            dimension.dim_param = name
    for output, axis in zip(model.graph.output, outputs.values(), strict=True):
        output.type.tensor_type.shape.dim[0].dim_param = axis
    del model.graph.value_info[:]
    onnx.helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())


def read_openvino(path: Path) -> Any:
    """A network of a file, as OpenVINO has it."""
    without_telemetry()
    import openvino

    return openvino.Core().read_model(path)


def save_openvino(network: Any, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network that OpenVINO has read, in float32.

    Args:
        network: OpenVINO's.
        path: of the ``.xml``; the ``.bin`` comes beside it.
        metadata: to keep inside.
    """
    import openvino

    for key, value in metadata.items():
        network.set_rt_info(value, ["epsanet", key])
    openvino.save_model(network, path, compress_to_fp16=False)


def write_bundle(folder: Path, files: Sequence[Path], described: dict[str, Any], readme: str) -> int:
    """Write a bundle, whole or not at all.

    Args:
        folder: where to; an older bundle there is replaced.
        files: of the network.
        described: for ``bundle.json``.
        readme: for ``README.md``.

    Returns:
        Bytes of the network.
    """
    with atomic_folder(folder) as temporary:
        for file in files:
            (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / BUNDLE_NAME).write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return sum(file.stat().st_size for file in folder.glob("network.*"))
