"""Weights on disk: model folders, and checkpoints of the released code.

A **model folder** is timm's and the Hugging Face Hub's format: ``config.json`` (architecture, its arguments, class
names, preprocessing), ``model.safetensors``, ``README.md``. ``timm.create_model("local-dir:FOLDER",
pretrained=True)`` reads it.

A **released checkpoint** is what the authors' training script writes: a pickled dict ``{epoch, arch, state_dict,
best_prec1, optimizer}``, its names prefixed with ``module.`` when trained with DataParallel. That code concatenates
its branches in reverse, largest kernel first, so the channel quarters that follow a PSA module (its norm, and the
input of ``conv3``) are exchanged on the way in and out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.layers import DropPath
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from epsanet._files import atomic_file, atomic_folder
from epsanet.network.bundle import RuntimeNetwork, read_bundle
from epsanet.network.epsanet import EPSABlock, EPSANet
from epsanet.network.foreign import check_data_config, check_model_folder, check_tensors, read_checkpoint
from epsanet.network.model_folder import find_bundle, is_detector
from epsanet.network.shipped import shipped_folders

__all__ = [
    "LoadedModel",
    "convert",
    "create_model",
    "find_model_folder",
    "from_released",
    "load_model",
    "load_released",
    "save_model",
    "save_released",
    "to_released",
]

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"

_OTHER_FILES = (".bin", ".ckpt", ".onnx", ".pickle", ".pkl", ".pt", ".pt2", ".safetensors", ".tar")
_BRANCHES = 4
_RELEASED_BRANCH = re.compile(r"(layer\d\.\d+\.conv2)\.conv_(\d)\.weight")
_OUR_BRANCH = re.compile(r"(layer\d\.\d+\.conv2)\.spc\.branches\.(\d)\.weight")
_AFTER_PSA = re.compile(r"layer\d\.\d+\.bn2\.(weight|bias|running_mean|running_var)")
# What timm raises for a configuration or weights that are not its own, or damaged.
_CANNOT_BE_READ = (
    SafetensorError,
    RuntimeError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    OSError,
    MemoryError,
)
_RELEASED_VARIANTS = (
    "epsanet50_small",
    "epsanet101_small",
    "epsanet50_large_g32",
    "epsanet101_large_g32",
)


@dataclass(kw_only=True)
class LoadedModel:
    """A network with what it needs to be used: names of its classes, and its preprocessing."""

    model: Any
    """The network, a ``torch.nn.Module`` with timm's attributes, in evaluation mode."""
    class_names: list[str]
    """One name a class, in the order of the outputs."""
    data_config: dict[str, Any] = field(default_factory=dict)
    """timm's preprocessing: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``."""

    @property
    def architecture(self) -> str:
        """timm's name of the network."""
        return str(self.model.pretrained_cfg["architecture"])


def create_model(name: str, **model_args: Any) -> Any:
    """``timm.create_model`` with one-line errors.

    Args:
        name: any registered network.
        **model_args: of the network; timm refuses what it does not know.

    Raises:
        ValueError: for an unknown name (the nearest ones are suggested) or an impossible argument.
    """
    if not timm.is_model(name.split(".")[0]):
        import difflib

        near = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("epsanet*")
        raise ValueError(f"there is no network {name!r}; near it: {', '.join(near)} (epsanet models lists EPSANets)")
    try:
        return timm.create_model(name, **model_args)
    except KeyError as error:
        raise ValueError(f"{name} cannot be built with {model_args}: timm knows no {error}") from error
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built with {model_args}: {error}") from error


def save_model(
    folder: str | Path,
    model: Any,
    class_names: Sequence[str],
    data_config: dict[str, Any] | None = None,
    card: str = "",
) -> None:
    """Write a model folder, whole or not at all; an existing one is replaced.

    Args:
        folder: where to.
        model: a network made by ``timm.create_model``.
        class_names: one name a class.
        data_config: preprocessing to store; the network's own when left out.
        card: text of ``README.md``.

    Raises:
        ValueError: when the number of names is not the network's number of classes, or the network was changed after it
            was made, so that a folder's description of it does not fit.
        OSError: when there is no room for it; it names the folder.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper puts that before every name
    if len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for a network of {model.num_classes} classes; give one each")
    _check_unchanged(model)
    with atomic_folder(folder) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        # Not save_file, for which a full disk is no OSError.
        (temporary / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        save_config_for_hf(
            model,
            str(temporary / CONFIG_NAME),
            model_config={"label_names": list(class_names)},
            data_config=data_config,
        )
        _drop_num_classes(temporary / CONFIG_NAME)
        (temporary / CARD_NAME).write_text(card, encoding="utf-8")


def _check_unchanged(model: Any) -> None:
    """Refuse a network that is not what its name and arguments make: the folder holds those, and would not load."""
    try:
        with torch.device("meta"):
            made = timm.create_model(model.pretrained_cfg["architecture"], **get_model_args(model))
    except Exception:  # noqa: BLE001 - networks of other packages may need memory to be made; loading them tells
        return
    try:
        made.load_state_dict({name: tensor.to("meta") for name, tensor in model.state_dict().items()})
    except RuntimeError as error:
        raise ValueError(
            "the network was changed after it was made (by psa_replace?), and a model folder could not be loaded: "
            f"{_first_line(error)}; keep its state_dict (torch.save) and how it was made"
        ) from error


def _drop_num_classes(path: Path) -> None:
    """Say the number of classes once: timm writes it among the arguments too, and transformers then passes it twice."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def load_model(source: str | Path) -> LoadedModel:
    """A network from wherever users have one.

    Args:
        source: a model folder (also as ``local-dir:FOLDER``), a run folder of ``epsanet train``, a bundle of
            ``epsanet export``, a released checkpoint (``.pth``, ``.pth.tar``), weights of this package
            (``epsanet14_tiny.digits``; ``epsanet models`` lists them), a Hugging Face Hub id (``hf-hub:user/name``), or
            a name with pretrained weights in timm (``resnet50.a1_in1k``).

    Raises:
        ValueError: when there is nothing such, or it is damaged; one line that says which.
    """
    path = Path(str(source).removeprefix("local-dir:"))
    bundle = find_bundle(path)
    if bundle is not None:
        network, description = read_bundle(bundle)
        return LoadedModel(
            model=network, class_names=description["label_names"], data_config=description["data_config"]
        )
    if path.is_file():
        _refuse_part(path)
        return load_released(path)
    folder = find_model_folder(path)
    if folder is not None:
        return _load_folder(folder)
    if path.is_dir():
        raise ValueError(f"{path} is no model folder: it has no {CONFIG_NAME}; give the folder that training wrote")
    name = str(source)
    if name.startswith("hf-hub:") or timm.is_model(name.split(".")[0]):
        return _load_named(name)
    raise ValueError(
        f"there is no model {name!r}: no such file or folder, and no network of that name; give a model folder, a "
        f"checkpoint, {', '.join(shipped_folders())}, hf-hub:USER/NAME, or a name of timm's with pretrained weights"
    )


def _refuse_part(path: Path) -> None:
    """Name the folder of a file that a run or a model folder is made of."""
    run = path.parent.parent
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        raise ValueError(f"{path} is for resuming; give the run folder, {run}")
    if path.name in (CONFIG_NAME, WEIGHTS_NAME) and (path.parent / CONFIG_NAME).is_file():
        raise ValueError(f"{path} is a part of a model folder; give the folder, {path.parent}")


def find_model_folder(source: str | Path) -> Path | None:
    """The model folder that a model folder, a run folder, or the name of shipped weights stands for, if it is one."""
    path = Path(source)
    folders = [path, path / "model", *(folder for name, folder in shipped_folders().items() if name == str(source))]
    return next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)


def _load_folder(folder: Path) -> LoadedModel:
    if is_detector(folder):
        raise ValueError(
            f"{folder} holds a detector; epsanet.load_detector reads it, and so do predict, evaluate, export and serve"
        )
    check_model_folder(folder)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except _CANNOT_BE_READ as error:
        raise ValueError(f"the model folder {folder} is damaged: {_first_line(error)}; copy it again") from error
    return _with_names(model, str(folder))


def _load_named(name: str) -> LoadedModel:
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError) as error:  # timm without weights; the Hub without a connection or such a model
        raise ValueError(f"{name} has no weights that can be had: {_first_line(error)}") from error
    except _CANNOT_BE_READ as error:
        raise ValueError(
            f"{name} is no model of timm's, or damaged ({type(error).__name__}: {_first_line(error)}); give one whose "
            f"{CONFIG_NAME} names an architecture of timm's"
        ) from error
    return _with_names(model, name)


def _with_names(model: Any, source: str) -> LoadedModel:
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if names is None:
        names = _default_names(model.num_classes)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source} has label_names that are no list of names; correct it in {CONFIG_NAME}")
    if len(names) != model.num_classes:
        raise ValueError(
            f"{source} has {model.num_classes} outputs but names {len(names)} classes; "
            f"correct label_names in {CONFIG_NAME}"
        )
    data_config = resolve_model_data_config(model)
    check_data_config(data_config, source)
    check_tensors({}, model, source)
    # timm's says 3 of every network.
    data_config["input_size"] = (getattr(model, "in_chans", 3), *data_config["input_size"][1:])
    return LoadedModel(model=model.eval(), class_names=list(names), data_config=data_config)


def _default_names(num_classes: int) -> list[str]:
    """ImageNet's WordNet ids for 1000 classes, else the class numbers."""
    if num_classes == ImageNetInfo().num_classes():
        return list(ImageNetInfo().label_names())
    return [str(index) for index in range(num_classes)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _flip_scales(tensor: Tensor, dim: int) -> Tensor:
    """Reverse the order of the four scales along a channel axis; its own inverse."""
    return torch.cat(tensor.chunk(_BRANCHES, dim)[::-1], dim)


def _exchange(state_dict: dict[str, Tensor], branch: re.Pattern[str], rename: str, offset: int) -> dict[str, Tensor]:
    """Rename the branches and reverse the scales after each PSA module; the same both ways but for the names."""
    result = {}
    for name, tensor in state_dict.items():
        match = branch.fullmatch(name)
        if match:
            result[rename.format(match[1], int(match[2]) + offset)] = tensor
        elif _AFTER_PSA.fullmatch(name) and tensor.ndim == 1:
            result[name] = _flip_scales(tensor, 0)
        elif re.fullmatch(r"layer\d\.\d+\.conv3\.weight", name) and tensor.ndim == 4:
            result[name] = _flip_scales(tensor, 1)
        else:
            result[name] = tensor
    return result


def from_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and channel order of the released code to ours.

    Args:
        state_dict: of the released network, with or without ``module.`` prefixes.
    """
    return _exchange(_bare(state_dict), _RELEASED_BRANCH, "{}.spc.branches.{}.weight", -1)


def _bare(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def to_released(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and channel order to those of the released code; the inverse of ``from_released``."""
    return _exchange(state_dict, _OUR_BRANCH, "{}.conv_{}.weight", 1)


def load_released(path: str | Path) -> LoadedModel:
    """Read a checkpoint of the released code; the variant and the number of classes follow from its shapes.

    The names of the branches say whose order the channels have: a ``state_dict`` of this package is taken as it is.

    It is unpickled with ``weights_only=True``: a file that holds more than tensors and plain values is refused and
    nothing in it runs.

    Args:
        path: ``.pth``, ``.pth.tar`` or any file of ``torch.save``.

    Raises:
        ValueError: when the file is unreadable, holds code, or holds no EPSANet that the released code can make.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    content = read_checkpoint(path)
    found = content.get("state_dict", content) if isinstance(content, dict) else None
    if not (
        isinstance(found, dict)
        and found
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    ):
        raise ValueError(f"{path} holds no state_dict; a checkpoint of the released EPSANet code has one")
    bare = _bare(found)
    state_dict = bare if any(map(_OUR_BRANCH.fullmatch, bare)) else from_released(bare)
    variant, num_classes = _recognise(state_dict, path)
    with torch.device("meta"):
        check_tensors(state_dict, create_model(variant), path)
    model = create_model(variant, num_classes=num_classes, in_chans=state_dict["conv1.weight"].shape[1])
    model.load_state_dict(state_dict)
    return _with_names(model, str(path))


def _recognise(state_dict: dict[str, Tensor], source: str | Path) -> tuple[str, int]:
    """The variant whose tensors have these names and shapes, the numbers of classes and image channels left open."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if not any(_OUR_BRANCH.fullmatch(name) for name in shapes) or "fc.weight" not in shapes:
        raise ValueError(f"{source} holds another network: no EPSANet of the released code (conv2.conv_1 … conv_4, fc)")
    num_classes = shapes["fc.weight"][0] if shapes["fc.weight"] else 0
    in_chans = shapes.get("conv1.weight", ())[1:2]
    nearest, fewest = "", len(shapes)
    for variant in _RELEASED_VARIANTS:
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in create_model(variant).state_dict().items()}
        wanted["fc.weight"], wanted["fc.bias"] = (num_classes, wanted["fc.weight"][1]), (num_classes,)
        wanted["conv1.weight"] = (wanted["conv1.weight"][0], *(in_chans or (3,)), *wanted["conv1.weight"][2:])
        different = {name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name)}
        if not different:
            return variant, num_classes
        if len(different) < fewest:
            nearest, fewest = f"{variant} differs in {len(different)} tensors, first {min(different)}", len(different)
    raise ValueError(f"{source} holds no EPSANet known here; {nearest or 'none is near'}")


def _computations(model: nn.Module) -> dict[str, str]:
    """What each layer computes when it is not trained."""
    found = {}
    for name, layer in model.named_modules():
        if type(layer) in (nn.BatchNorm2d, nn.SyncBatchNorm):
            found[name] = f"norm, eps={layer.eps}"
        elif not isinstance(layer, nn.Identity | nn.Dropout | DropPath):
            found[name] = f"{type(layer).__name__}({layer.extra_repr()})"
    return found


def save_released(path: str | Path, model: Any, *, data_parallel: bool = False) -> None:
    """Write a checkpoint that the released code reads.

    Args:
        path: where to.
        model: an EPSANet of bottlenecks with four multiplex branches, softmax across scales.
        data_parallel: put ``module.`` before each name, as that code's DataParallel expects.

    Raises:
        ValueError: for a network that the released code cannot hold.
    """
    blocks = [module for module in model.modules() if isinstance(module, EPSABlock)]
    plain = isinstance(model, EPSANet) and model.global_pool.pool_type == "avg" and blocks
    try:
        if not plain or any(
            block.conv2.spc.mode != "multiplex"
            or block.conv2.softmax != "scales"
            or not block.conv2.standard
            or any(branch.dilation != (1, 1) for branch in block.conv2.spc.branches)
            for block in blocks
        ):
            raise ValueError("this network computes something else")
        variant, num_classes = _recognise(model.state_dict(), "this network")
        with torch.device("meta"):
            wanted = _computations(create_model(variant, num_classes=num_classes, in_chans=model.conv1.in_channels))
        found = _computations(model)
        for name in (*wanted, *found):
            if wanted.get(name) != found.get(name):
                raise ValueError(f"{name} is {found.get(name)}, there {wanted.get(name)}")
    except ValueError as error:
        raise ValueError(
            "the released code holds only EPSANets of bottlenecks with a 7×7 stem, four multiplex branches and softmax "
            f"across scales ({error}); the others stay in model folders"
        ) from error
    prefix = "module." if data_parallel else ""
    state_dict = {prefix + name: tensor.cpu() for name, tensor in to_released(model.state_dict()).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    arch = f"epsanet{50 if len(model.layer3) == 6 else 101}"
    with atomic_file(path) as temporary:
        torch.save(
            {
                "epoch": 0,
                "arch": arch,
                "state_dict": state_dict,
                "best_prec1": 0.0,
                "optimizer": optimizer.state_dict(),
            },
            temporary,
        )


def convert(source: str | Path, destination: str | Path, *, data_parallel: bool = False) -> LoadedModel:
    """Released checkpoint to model folder, or model folder to released checkpoint.

    Args:
        source: a released checkpoint, or anything ``load_model`` takes.
        destination: a folder, or a file that ends in ``.pth`` or ``.pth.tar``.
        data_parallel: for a checkpoint, put ``module.`` before each name.

    Returns:
        The network that was converted.

    Raises:
        ValueError: when the source is neither, or the destination exists or is named like another kind of file; nothing
            is written then.
    """
    destination = Path(destination)
    if destination.exists():
        raise ValueError(f"{destination} exists; remove it or choose another name")
    to_checkpoint = destination.name.endswith((".pth", ".pth.tar"))
    if not to_checkpoint and destination.suffix in _OTHER_FILES:
        raise ValueError(f"{destination} is named like a file; end it in .pth or .pth.tar, or name a folder")
    if data_parallel and not to_checkpoint:
        raise ValueError(f"data_parallel is for checkpoints, and {destination} is to be a model folder; leave it out")
    loaded = load_model(source)
    if isinstance(loaded.model, RuntimeNetwork):
        raise ValueError("this is an exported bundle already; give the model folder that it was made from")
    if to_checkpoint:
        save_released(destination, loaded.model, data_parallel=data_parallel)
        return loaded
    name = loaded.model.pretrained_cfg["architecture"]
    card = (
        "---\nlibrary_name: timm\npipeline_tag: image-classification\ntags:\n- epsanet\n---\n"
        f"# {name}\n\nConverted from `{Path(source).name}` by epsanet; the weights are those of their authors.\n"
        f"\n```python\nimport epsanet, timm\n\nmodel = timm.create_model('local-dir:.', pretrained=True)\n```\n"
    )
    save_model(destination, loaded.model, loaded.class_names, card=card)
    return loaded
