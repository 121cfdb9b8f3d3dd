"""Files from elsewhere: what is made sure of before one is believed.

A checkpoint is a pickle, which can name any function and have it called; torch's ``weights_only=True`` calls a few
dozen only. Of these, a network's weights need fewer still, and the rest (``bytearray(10**12)``, sparse tensors without
checks) is refused before anything is unpickled. A model folder holds no code, but numbers that a network is built from.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn

__all__ = [
    "check_counts",
    "check_data_config",
    "check_model_folder",
    "check_tensors",
    "read_checkpoint",
    "reason_without_advice",
]

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_CALLABLE = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {name}" for name in _DTYPES),
    *(f"torch {name}Storage" for name in _STORAGES),
}
"""What a checkpoint of weights, optimiser state and plain values names."""

_ZIP_START = b"PK\x03\x04"
_LEGACY_START = re.compile(rb"\x80[\x02-\x05]" + re.escape(pickle.dumps(0x1950A86A20F9469CFC6C, 2)[2:]), re.DOTALL)
"""torch's magic number as a pickle of its own; four pickles more and the raw numbers follow."""
_LEGACY_PICKLES = 5

_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_SIDE = 8192
"""Pixels; of a network's input, and of what an image is resized to before the crop."""
_ANY_COUNT = 1024
"""A number in a network's arguments up to this is never suspicious."""
_WHERE_WEIGHTS_ARE = ("file", "url", "hf_hub_id", "hf_hub_filename", "state_dict", "source")
NOT_OF_A_NETWORK = {
    "cache_dir",
    "checkpoint_path",
    "feature_cfg",
    "feature_cls",
    "features_only",
    "kwargs_filter",
    "model_cfg",
    "out_indices",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "pruned",
}
"""Arguments of timm's builder that change where weights come from, or let some be left out."""


# --- checkpoints ----------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Any:
    """Content of a file of ``torch.save``: tensors and plain values; nothing in it runs.

    Raises:
        ValueError: when it cannot be read, or holds anything else.
    """
    try:
        _check_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about unusual pickles; what matters comes as an error
            # A mapped file is not unpacked, and a tensor cannot reach past its own bytes.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except _UnsafeError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values ({error}), so loading it could run code "
            "or take all memory; save its state_dict alone and try again"
        ) from error
    except Exception as error:  # torch raises what unpickling meets
        reason = f"it is cut short or no file of torch.save ({reason_without_advice(error)})"
        raise ValueError(f"{path} is no checkpoint that torch can read: {reason}") from error


def reason_without_advice(error: BaseException) -> str:
    """Why torch could not load a file; its advice to switch the check off is left out."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values" if "WeightsUnpickler" in str(error) else "no pickle"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class _UnsafeError(Exception):
    """Something that a checkpoint of weights does not need."""


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP_START)) == _ZIP_START


def _check_pickles(path: Path) -> None:
    """Read the opcodes of every pickle in a file of ``torch.save``, without executing any."""
    if not _is_zip(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if not _LEGACY_START.match(content):
                raise ValueError("another beginning")
            for _ in range(_LEGACY_PICKLES):
                _check_opcodes(content)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _UnsafeError("compressed entries, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise _UnsafeError("entries that together are longer than the file")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_opcodes(archive.read(entry))


def _check_opcodes(content: bytes | mmap.mmap) -> None:
    for opcode, argument, _ in pickletools.genops(content):  # type: ignore[arg-type]  # a map reads like a file
        if opcode.name == "GLOBAL" and str(argument).replace("__builtin__", "builtins") not in _CALLABLE:
            raise _UnsafeError(str(argument).replace(" ", "."))
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise _UnsafeError(f"the opcode {opcode.name}")


def check_tensors(state_dict: dict[str, Tensor], model: nn.Module, source: object) -> None:
    """Make sure that tensors are numbers of the right kind, each with memory of its own, all finite.

    Raises:
        ValueError: for the first that is not.
    """
    for name, wanted in model.state_dict().items():
        tensor = state_dict.get(name, wanted)
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{source} holds {name} as {tensor.dtype}, where {wanted.dtype} or the like is needed")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{source} holds {name} of shape {tuple(tensor.shape)} on fewer numbers than that")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{source} holds {name} with NaN or infinite values; its training had diverged")


# --- model folders --------------------------------------------------------------------------------------------------


def check_model_folder(folder: Path) -> None:
    """Make sure that ``config.json`` describes a network of the size that ``model.safetensors`` has.

    Raises:
        ValueError: when it does not, or either file is malformed.
    """
    path = folder / "config.json"
    config = _read_config(path)
    architecture = config.get("architecture")
    if architecture is None:
        raise ValueError(f"{path} is damaged (it names no architecture); copy the folder again")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"{path} names the network {architecture!r}, which is not known here")
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} has no model.safetensors; copy the folder again")
    preprocessing, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    if not isinstance(preprocessing, dict) or not isinstance(arguments, dict):
        raise ValueError(f"{path} is damaged (pretrained_cfg and model_args must be objects); copy the folder again")
    for key in _WHERE_WEIGHTS_ARE:
        if preprocessing.get(key):
            raise ValueError(f"{path} says that the weights are elsewhere ({key}); remove {key} from it")
    for key in NOT_OF_A_NETWORK & arguments.keys():
        raise ValueError(f"{path} has model_args.{key}, which is no argument of a network; remove it")
    _check_size(folder, architecture, preprocessing, config, arguments)


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is damaged (longer than {_MAX_CONFIG_BYTES:,} bytes); copy the folder again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:200]}); copy the folder again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (no object); copy the folder again")
    return config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _check_size(
    folder: Path, architecture: str, preprocessing: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    path = folder / "config.json"
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
            shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
            floating = {name: "F" in part.get_dtype() for name, part in found.items()}
        _check_header(folder / "model.safetensors")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"the model folder {folder} is damaged: {error}; copy it again") from error
    classes = {
        "num_classes": config.get("num_classes"),
        "pretrained_cfg.num_classes": preprocessing.get("num_classes"),
        "model_args.num_classes": arguments.get("num_classes"),
    }
    for name, number in classes.items():
        if number is not None and not isinstance(number, int):
            raise ValueError(f"{path} has {name}={str(number)[:40]}, not a whole number; correct it")
    check_counts(classes | {"model_args": arguments}, list(shapes.values()), path)
    if len({number for number in classes.values() if number is not None}) > 1:
        raise ValueError(f"{path} gives several numbers of classes: {classes}; correct it")
    try:
        with torch.device("meta"):
            wanted = timm.create_model(architecture, **{"num_classes": preprocessing.get("num_classes"), **arguments})
        state: dict[str, Tensor] = wanted.state_dict()
    except Exception:  # noqa: BLE001 - it is built once more for good, and the error is told there
        return
    asked, held = (sum(map(math.prod, sizes)) for sizes in ((t.shape for t in state.values()), shapes.values()))
    if asked > 2 * held:
        raise ValueError(
            f"{path} is damaged: it describes a network of {asked:,} numbers, model.safetensors has {held:,}; copy the "
            "folder again"
        )
    for name in state.keys() & floating.keys():
        if state[name].is_floating_point() != floating[name]:
            raise ValueError(f"{folder} holds {name} as another kind of number than {state[name].dtype}; copy it again")


def check_counts(arguments: dict[str, Any], shapes: Sequence[Sequence[int]], path: Path) -> None:
    """Refuse numbers that are larger than anything among the weights: a network of so many blocks is never built.

    Args:
        arguments: of a network, by name; numbers in lists and objects count too.
        shapes: of its weights.
        path: of the configuration, for the message.

    Raises:
        ValueError: for the first of them.
    """
    most = max([_ANY_COUNT, len(shapes), *(size for shape in shapes for size in shape)])
    for key, value in arguments.items():
        for name, number in _numbers(value, key):
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ValueError(f"{path} has {name}={number}, more than anything in model.safetensors; copy it again")


def _check_header(path: Path) -> None:
    """Of two tensors with one name, safetensors takes the last."""
    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=_without_duplicates)


def _numbers(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    else:
        yield name, value


def check_data_config(data_config: dict[str, Any], source: object) -> None:
    """Make sure that preprocessing can be done, and in reasonable memory.

    Raises:
        ValueError: for a field that makes no sense.
    """
    for key in ("input_size", "mean", "std"):
        numbers = data_config[key]
        if not isinstance(numbers, list | tuple) or not all(
            isinstance(number, int | float) and math.isfinite(number) for number in numbers
        ):
            raise ValueError(f"{source} has {key}={numbers!r}, not numbers; correct it in config.json")
    size, crop = data_config["input_size"], data_config["crop_pct"]
    sides = size[1:]
    if len(size) != 3 or not all(isinstance(side, int) and 1 <= side <= _MAX_SIDE for side in size):
        raise ValueError(f"{source} has input_size={size!r}; use channels, height, width of at most {_MAX_SIDE} pixels")
    if not isinstance(crop, int | float) or not 0 < crop <= 2 or max(sides) / crop > _MAX_SIDE:
        raise ValueError(f"{source} has crop_pct={crop!r}; use a share of the image, usually 0.8 to 1")
    if len(data_config["mean"]) != len(data_config["std"]) or not all(data_config["std"]):
        raise ValueError(f"{source} has mean={data_config['mean']!r} and std={data_config['std']!r}, which do not fit")
    if data_config["crop_mode"] not in ("center", "squash", "border"):
        raise ValueError(f"{source} has crop_mode={data_config['crop_mode']!r}; use center, squash or border")
    try:
        str_to_interp_mode(data_config["interpolation"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{source} has interpolation={data_config['interpolation']!r}; use bilinear or bicubic"
        ) from error
