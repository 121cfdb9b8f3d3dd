"""Network files from strangers: looked at before a runtime opens them.

Refused are files that reach for other files (links, external data), that could run code (pickles, unknown operators),
that loop, and that claim sizes which no network of images has. A runtime may still have faults of its own; for
files that you do not trust at all, use a sandbox.
"""

from __future__ import annotations

import io
import json
import math
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

__all__ = [
    "check_file",
    "check_onnx",
    "check_openvino",
    "check_openvino_maps",
    "check_pt2",
    "check_pt2_maps",
    "first_line",
]

MOST_BYTES = 2 * 2**30
MOST_NUMBERS = 2**28
"""Of one tensor or map; a gibibyte of float32."""
MOST_PIXELS_A_SIDE = 4096


def first_line(error: BaseException) -> str:
    """The start of a message, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is refused: {reason}")


def check_file(path: Path, most: int = MOST_BYTES) -> int:
    """The size of a plain file.

    Raises:
        ValueError: when it is missing, empty, a link, no file, or larger than ``most`` bytes.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise ValueError(f"{path} is missing; copy the bundle again") from error
    if stat.S_ISLNK(found.st_mode):
        raise _refuse(path, "it is a link; a bundle holds its files itself")
    if not stat.S_ISREG(found.st_mode):
        raise _refuse(path, "it is no plain file")
    if not 0 < found.st_size <= most:
        raise _refuse(path, f"{found.st_size:,} bytes are {'nothing' if found.st_size == 0 else 'too many'}")
    return found.st_size


def _check_size(path: Path, what: str, dimensions: list[int]) -> None:
    if any(dimension < 0 for dimension in dimensions) or math.prod(dimensions) > MOST_NUMBERS:
        raise _refuse(path, f"{what} has the absurd dimensions {' × '.join(map(str, dimensions[:8]))}")


# ----------------------------------------------------------------------------------------------------------------- ONNX


def check_onnx(path: Path, shape: tuple[int, ...], outputs: int) -> None:
    """Look at an ONNX file without running it.

    Args:
        path: of the file.
        shape: of a batch of images.
        outputs: that it must have.

    Raises:
        ValueError: when it is damaged, refers to other files, has control flow, functions or operators of other
            makers, or absurd dimensions.
    """
    check_file(path)
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, RecursionError) as error:
        raise _refuse(path, "it is no ONNX file, or cut short") from error
    graph = model.graph
    foreign_domains = {opset.domain for opset in model.opset_import} - {"", "ai.onnx", "com.microsoft"}
    if model.functions or foreign_domains or graph.sparse_initializer:
        raise _refuse(path, "it has functions, sparse tensors or operators of other makers")
    for tensor in _onnx_tensors(path, graph):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise _refuse(path, "it has external data; export it with its weights inside")
        _check_size(path, f"tensor {tensor.name!r}", list(tensor.dims))
        try:
            size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except (KeyError, ValueError, TypeError) as error:
            raise _refuse(path, f"tensor {tensor.name!r} is of an unknown type") from error
        if tensor.raw_data and len(tensor.raw_data) != math.prod(tensor.dims) * size:
            raise _refuse(path, f"tensor {tensor.name!r} holds less or more than its dimensions say")
    if len(graph.input) != 1 or len(graph.output) != outputs:
        raise _refuse(path, f"it has {len(graph.input)} inputs and {len(graph.output)} outputs, not 1 and {outputs}")
    if graph.input[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise _refuse(path, "its input is not float32")
    _check_onnx_maps(path, model, shape)


def _onnx_tensors(path: Path, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise _refuse(path, f"operator {node.op_type} has control flow")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise _refuse(path, "it has sparse tensors")
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _check_onnx_maps(path: Path, model: Any, shape: tuple[int, ...]) -> None:
    import onnx

    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    if len(dimensions) != len(shape):
        raise _refuse(path, f"its input has {len(dimensions)} axes; images have {len(shape)}")
    for dimension, wanted in zip(dimensions, shape, strict=True):
        if dimension.HasField("dim_value") and dimension.dim_value not in (wanted, 1):
            raise _refuse(path, f"its input has the absurd dimension {dimension.dim_value} instead of {wanted}")
        dimension.dim_value = wanted
    for value in (*model.graph.value_info, *model.graph.output):
        known = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        _check_size(path, f"map {value.name!r}", known)
    del model.graph.value_info[:]  # what the file claims is not needed any more
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise _refuse(path, f"its dimensions do not fit together: {first_line(error)}") from error
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        known = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        _check_size(path, f"map {value.name!r}", known)


# ------------------------------------------------------------------------------------------------------------- OpenVINO

_BITS = {
    "boolean": 8,
    "u1": 1,
    "u4": 4,
    "i4": 4,
    "u8": 8,
    "i8": 8,
    "f16": 16,
    "bf16": 16,
    "u16": 16,
    "i16": 16,
    "f32": 32,
    "u32": 32,
    "i32": 32,
    "f64": 64,
    "u64": 64,
    "i64": 64,
}


def check_openvino(path: Path) -> None:
    """Look at an OpenVINO IR, ``.xml`` and ``.bin``, without running it.

    Args:
        path: of the ``.xml`` file.

    Raises:
        ValueError: when a file is damaged, missing or does not fit the other, or there are control flow or absurd
            dimensions.
    """
    check_file(path, most=256 * 2**20)
    weights = path.with_suffix(".bin")
    available = check_file(weights)
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise _refuse(path, "it declares entities")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise _refuse(path, f"it is no XML: {first_line(error)}") from error
    used = 0
    for layer in root.iter("layer"):
        kind, data = layer.get("type", ""), layer.find("data")
        if kind in ("If", "Loop", "TensorIterator") or layer.find("body") is not None:
            raise _refuse(path, f"layer {kind} has control flow")
        if kind == "Const" and data is not None:
            used = max(used, _check_constant(path, data, available))
    if used != available:
        raise _refuse(weights, f"it has {available:,} bytes, and the network uses {used:,}")


def _check_constant(path: Path, data: ElementTree.Element, available: int) -> int:
    try:
        offset, size = int(data.get("offset", "")), int(data.get("size", ""))
        shape = [int(number) for number in data.get("shape", "").split(",") if number.strip()]
    except ValueError as error:
        raise _refuse(path, "a constant has no numbers for its place") from error
    _check_size(path, "a constant", shape)
    bits = _BITS.get(data.get("element_type", ""), 8)
    if offset < 0 or size < 0 or offset + size > available:
        raise _refuse(path, f"a constant lies beyond the end of the .bin ({offset + size:,} of {available:,} bytes)")
    if data.get("element_type") in _BITS and size != -(-math.prod(shape) * bits // 8):
        raise _refuse(path, f"a constant of {size:,} bytes has dimensions for another number")
    return offset + size


def check_openvino_maps(path: Path, network: Any, shape: tuple[int, ...], outputs: int) -> None:
    """Sizes of all maps of a network that OpenVINO has read, which is reshaped for it.

    Raises:
        ValueError: for absurd dimensions, or when it takes no images or has other than so many outputs.
    """
    found = len(network.inputs), len(network.outputs)
    if found != (1, outputs) or len(network.input(0).partial_shape) != len(shape):
        raise _refuse(path, f"it has {found[0]} inputs and {found[1]} outputs, not 1 with four axes and {outputs}")
    try:
        network.reshape(list(shape))
    except RuntimeError as error:
        raise _refuse(path, f"it does not take images of {shape[2]}×{shape[3]}: {first_line(error)}") from error
    for operator in network.get_ops():
        for output in operator.outputs():
            if output.partial_shape.is_static:
                _check_size(path, f"map {operator.friendly_name!r}", [int(size) for size in output.shape])


# ------------------------------------------------------------------------------------------------------------------ pt2

_MEMBERS = re.compile(
    r"[^/]+/(byteorder|archive_format|archive_version|\.data/\w+|models/\w+\.json"
    r"|data/(weights|constants)/\w+\.json|data/weights/weight_\d+|data/constants/tensor_\d+"
    r"|data/sample_inputs/\w+\.pt)"
)
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.ops\.torchvision\.(nms|roi_align)\.default|torch\.sym_(min|max)"
    r"|_operator\.\w+|math\.\w+"
)
_SYMBOL = r"(?:Symbol\('[su]\d{1,9}'(?:, (?:positive|nonnegative|integer)=True)*\)|[su]\d{1,9}(?!\d))"
# No power but a small one of a size, and no long numbers: working out 9**9**9**9 takes all time and memory.
_EXPRESSION = re.compile(
    rf"(?:{_SYMBOL}|Pow\({_SYMBOL}, (?:Integer\(\d\)|\d)\)|\d{{1,20}}(?!\d)|int_oo|oo|Integer|Add|Mul|Mod|Max|Min"
    r"|FloorDiv|ModularIndexing|PythonMod|GreaterThan|LessThan|\*(?!\*)|[ ()+,-])++"
)
_LONGEST_EXPRESSION = 10_000
"""Characters of one."""
_END = 2**63 - 1
"""What slices write for "to the end"."""


def check_pt2(path: Path) -> None:
    """Look at an archive of ``torch.export`` without loading it.

    That format may hold pickles, and expressions that are evaluated. Accepted are plain weights, torch's own
    operators, those of torchvision's detectors, and sums, products and bounds of sizes.

    Args:
        path: of the ``.pt2`` file.

    Raises:
        ValueError: for anything else.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise _refuse(path, "it has two members of one name")
            for name, member in members.items():
                if not _MEMBERS.fullmatch(name) or member.compress_type != zipfile.ZIP_STORED:
                    raise _refuse(path, f"it has the member {name[:80]!r}, which no plain network needs")
            for name in members:
                if name.endswith(".json"):
                    _check_pt2_json(path, name, json.loads(archive.read(name)))
                elif name.endswith(".pt") and members[name].file_size:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, json.JSONDecodeError, RecursionError) as error:
        raise _refuse(path, f"it is no archive of torch.export, or cut short ({type(error).__name__})") from error
    except (RuntimeError, ModuleNotFoundError) as error:
        raise _refuse(path, "it holds more than plain tensors") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise _refuse(path, "its example holds more than tensors, so that loading it could run code") from error
        raise


def _check_pt2_json(path: Path, name: str, content: Any) -> None:
    for key, value in _pairs(content):
        if key == "use_pickle" and value is not False:
            raise _refuse(path, f"{name} has pickled weights, which could run code")
        if key in ("as_custom_obj", "as_operator", "as_graph") and value is not None:
            raise _refuse(path, f"{name} has {key}, which no plain network needs")
        if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
            raise _refuse(path, f"it calls {value[:80]!r}; only torch's own operators are accepted")
        if key == "expr_str" and not (
            isinstance(value, str) and len(value) <= _LONGEST_EXPRESSION and _EXPRESSION.fullmatch(value)
        ):
            raise _refuse(path, f"it has the expression {str(value)[:80]!r}, which could run code, or without end")
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
            raise _refuse(path, f"{name} has the weights {str(value)[:80]!r}")
        if key == "as_int" and isinstance(value, int) and MOST_NUMBERS < abs(value) < _END:
            raise _refuse(path, f"it has the absurd dimension {value}")
        if key == "sizes" and isinstance(value, list):
            sizes = [entry.get("as_int") for entry in value if isinstance(entry, dict)]
            _check_size(path, "a tensor", [size for size in sizes if isinstance(size, int)])


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings with its value."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def check_pt2_maps(path: Path, module: Any, shape: tuple[int, ...], outputs: int) -> None:
    """Sizes of all maps of a network that torch has read, worked out without computing them.

    Raises:
        ValueError: for absurd dimensions, or when it takes no images or has other than so many outputs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for made in result if isinstance(result, tuple | list) else (result,):
                if isinstance(made, torch.Tensor):  # how many objects are found cannot be known before
                    _check_size(path, f"a map of {func}", [size for size in made.shape if isinstance(size, int)])
            return result

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torchvision about itself
            with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), Watch(), torch.no_grad():
                found = module(torch.empty(shape))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise _refuse(path, f"it does not take images of {shape[2]}×{shape[3]}: {first_line(error)}") from error
    made = 1 if isinstance(found, torch.Tensor) else len(found)
    if made != outputs:
        raise _refuse(path, f"it has {made} outputs, not {outputs}")
