"""Checkpoints and model folders made to run code, take all memory, or pass for what they are not.

One process with little memory tries them all, one after the other; what it says of each is examined here. A canary is a
folder that code in a file would make.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from epsanet.network.shipped import shipped_folders
from epsanet.network.weights import load_model
from epsanet.tasks.checkpoints import AtomicCheckpointIO

GIB = 2**30
MEMORY, SECONDS = 2 * GIB, 20
CANARY = "canary"


# --- pickles --------------------------------------------------------------------------------------------------------


class Calls:
    """Has a function called when it is unpickled carelessly."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


class SetsState:
    """Makes the canary in ``__setstate__``."""

    def __init__(self) -> None:
        self.canary = CANARY

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["canary"]).mkdir()


def saved(content: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def repacked(
    data: bytes, change: Mapping[str, Callable[[bytes], bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """The zip of ``torch.save`` with some of its entries changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, change.get(name, lambda content: content)(old.read(entry)))
    return file.getvalue()


def pickled(data: bytes) -> bytes:
    """A zip of torch with this for its pickle."""
    return repacked(saved({}), {"data.pkl": lambda _: data})


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


def overlapping() -> bytes:
    """A directory of a thousand entries, all over the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"weight": torch.zeros(100_000)}))) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.filelist *= 1000
    return file.getvalue()


def legacy_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps(Calls(os.mkdir, CANARY), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def cyclic() -> bytes:
    content: dict[str, Any] = {}
    content["state_dict"] = content
    return saved(content)


def bad_sparse() -> bytes:
    with torch.sparse.check_sparse_tensor_invariants(False):
        indices, values = torch.tensor([[2**40], [-7]]), torch.ones(1)
        return saved({"state_dict": {"conv1.weight": torch.sparse_coo_tensor(indices, values, (2, 2))}})


def released(change: Callable[[dict[str, Tensor]], None]) -> bytes:
    """A state dict of the released layout, in half precision, with something changed."""
    from epsanet.network.weights import to_released

    with torch.device("meta"):
        shapes = to_released(timm.create_model("epsanet50_small", num_classes=2).state_dict())
    state = {
        name: torch.zeros(tensor.shape, dtype=torch.float16 if tensor.is_floating_point() else torch.int64)
        for name, tensor in shapes.items()
    }
    change(state)
    return saved({"state_dict": state})


def one_number(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros((), dtype=torch.float16).expand(shape)


MANY = 10**9
WEIGHT = {"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}
NUMEL = b"M" + struct.pack("<H", 64 * 3 * 49)  # of the storage, as pickled
PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a call": (lambda: saved({**WEIGHT, "optimizer": {"state": [Calls(os.mkdir, CANARY)]}}), "refused: .*mkdir"),
    "a call, legacy": (lambda: saved({**WEIGHT, "epoch": Calls(os.mkdir, CANARY)}, legacy=True), "refused: .*mkdir"),
    "a call, tar": (legacy_tar, "no checkpoint"),
    "a call, no file of torch": (lambda: pickle.dumps(Calls(os.mkdir, CANARY)), "no checkpoint"),
    "eval": (lambda: saved({**WEIGHT, "x": Calls(eval, f"__import__('os').mkdir('{CANARY}')")}), "refused: .*eval"),
    "a state that is set": (lambda: saved({**WEIGHT, "x": SetsState()}), "refused: .*SetsState"),
    "a call by the stack": (lambda: pickled(pickle.dumps(Calls(os.mkdir, CANARY), 4)), "refused: .*STACK_GLOBAL"),
    "a call that torch allows": (lambda: saved({**WEIGHT, "x": Calls(bytearray, 10**11)}), "refused: .*bytearray"),
    "a zip bomb": (
        lambda: repacked(saved(WEIGHT), {"data/0": lambda _: bytes(200 * 2**20)}, zipfile.ZIP_DEFLATED),
        "refused: .*compressed",
    ),
    "entries over one another": (overlapping, "refused: .*longer than the file"),
    "a million lists in one another": (
        lambda: pickled(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."),
        "no state",
    ),
    "a string longer than the file": (lambda: pickled(b"\x80\x02X\xff\xff\xff\x7fabc."), "no checkpoint"),
    "more numbers than there are": (
        lambda: repacked(saved(WEIGHT), {"data.pkl": replaced(NUMEL, b"J" + struct.pack("<i", 2**30))}),
        "another network",
    ),
    "fewer bytes than numbers": (lambda: repacked(saved(WEIGHT), {"data/0": lambda data: data[:8]}), "no checkpoint"),
    "another kind of number": (
        lambda: repacked(saved(WEIGHT), {"data.pkl": replaced(b"FloatStorage", b"DoubleStorage")}),
        "no checkpoint",
    ),
    "a tensor outside its storage": (
        lambda: repacked(saved(WEIGHT), {"data.pkl": replaced(b"QK\x00", b"QJ\xff\xff\xff\x0f")}),
        "no checkpoint",
    ),
    "sparse at impossible places": (bad_sparse, "refused: .*sparse"),
    "itself": (cyclic, "holds no state_dict"),
    "lists for tensors": (lambda: saved({"state_dict": {"conv1.weight": [0.0] * 100}}), "holds no state_dict"),
    "a billion classes on one number": (
        lambda: released(
            lambda state: state.update({"fc.weight": one_number((MANY, 2048)), "fc.bias": one_number((MANY,))})
        ),
        r"fc\.weight of shape \(1000000000, 2048\) on fewer numbers",
    ),
    "integers for weights": (
        lambda: released(lambda state: state.update({"conv1.weight": state["conv1.weight"].to(torch.int8)})),
        r"conv1\.weight as torch\.int8",
    ),
    "no numbers": (lambda: released(lambda state: state["layer3.1.bn2.weight"].fill_(torch.nan)), "layer3.1.bn2.*NaN"),
}


# --- Lightning ------------------------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {"state_dict": {}, "optimizer_states": [], "loops": {}, "callbacks": {}, "lr_schedulers": []}
INJECTED = {
    "_instantiator": "os.mkdir",
    "class_path": "os.mkdir",
    "_class_path": "os.mkdir",
    "init_args": {"path": CANARY},
}
RUNS: dict[str, tuple[dict[str, Any], str, str]] = {
    "hyper-parameters that name a function": ({**TRAINING, "hyper_parameters": INJECTED}, "", "last.ckpt is damaged"),
    "hyper-parameters of the data": (
        {**TRAINING, "datamodule_hyper_parameters": INJECTED, "datamodule_hparams_name": "os.mkdir"},
        "",
        "last.ckpt is damaged",
    ),
    "a callback that is called": (
        {**TRAINING, "callbacks": {"History": Calls(os.mkdir, CANARY)}},
        "",
        "last.ckpt is damaged",
    ),
    "a recipe that constructs": (TRAINING, f"model_args: !!python/object/apply:os.mkdir [{CANARY}]\n", "yaml|YAML|tag"),
    "a recipe that names a class": (
        TRAINING,
        f"data: {{class_path: os.mkdir, init_args: {{path: {CANARY}}}}}\n",
        "class_path",
    ),
}


def write_run(folder: Path, checkpoint: dict[str, Any], recipe: str) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(recipe or "model: epsanet14_tiny\ndata: {source: digits}\n")
    AtomicCheckpointIO().save_checkpoint(checkpoint, folder / "checkpoints" / "last.ckpt")  # its checksum is right


# --- model folders --------------------------------------------------------------------------------------------------


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the header of the safetensors file; its length is kept right."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length])
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(text: bytes) -> bytes:
        content = json.loads(text)
        change(content)
        return json.dumps(content).encode()

    return header(edit)


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(change(path.read_text()))

    return damage


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file

        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cleared(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def both_classes(number: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["num_classes"] = content["model_args"]["num_classes"] = number
        content["pretrained_cfg"]["num_classes"] = number

    return change


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a header of 2^62 bytes": (lambda folder: cleared(folder, 2**62), "damaged"),
    "a header that ends in the numbers": (lambda folder: cleared(folder, 5000), "damaged"),
    "two tensors at one place": (
        described(lambda header: header["fc.bias"].update(data_offsets=header["fc.weight"]["data_offsets"])),
        "damaged",
    ),
    "a shape beyond all memory": (
        described(lambda header: header["fc.weight"].update(shape=[2**40, 2**40])),
        "damaged",
    ),
    "a tensor named twice": (
        header(lambda text: text[:1] + b'"fc.bias":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' + text[1:]),
        "damaged",
    ),
    "a header in Latin-1": (header(lambda text: text.replace(b"fc.bias", b"fc.b\xeeas")), "damaged"),
    "integers for weights": (
        weights(lambda state: state.update({"fc.weight": state["fc.weight"].to(torch.int8)})),
        "fc.w",
    ),
    "infinite weights": (weights(lambda state: state["fc.bias"].fill_(torch.inf)), "fc.bias with NaN or infinite"),
    "weights at an address": (
        config(lambda content: content["pretrained_cfg"].update(url="http://127.0.0.1:9/model.pth")),
        "the weights are elsewhere .url.",
    ),
    "weights in a file": (
        config(lambda content: content["pretrained_cfg"].update(file="/etc/passwd")),
        "the weights are elsewhere .file.",
    ),
    "weights on the Hub": (
        config(lambda content: content["pretrained_cfg"].update(hf_hub_id="someone/else", source="hf-hub")),
        "the weights are elsewhere .hf_hub_id.",
    ),
    "another model for a network": (config(lambda content: content.update(architecture="hf-hub:a/b")), "'hf-hub:a/b'"),
    "a path for a network": (config(lambda content: content.update(architecture="local-dir:../x")), "'local-dir:../x'"),
    "a module for a layer": (config(lambda content: content["model_args"].update(act_layer="os.mkdir")), "damaged"),
    "weights may be lacking": (
        config(lambda content: content["model_args"].update(pretrained_strict=False)),
        "model_args.pretrained_strict",
    ),
    "a trillion classes": (config(both_classes(10**12)), "num_classes=1000000000000"),
    "fifty million classes": (config(both_classes(5 * 10**7)), "num_classes=50000000"),
    "a list of classes": (config(lambda content: content.update(num_classes=[])), r"num_classes=\[\]"),
    "two numbers of classes": (config(lambda content: content.update(num_classes=9)), "several numbers of classes"),
    "a billion blocks": (config(lambda content: content["model_args"].update(layers=[MANY] * 4)), "layers=1000000000"),
    "wide blocks of wide kernels": (
        config(
            lambda content: content["model_args"].update(
                channels=[1024] * 4, block_args={"kernel_sizes": [255] * 4, "groups": [1] * 4}
            )
        ),
        "describes a network of",
    ),
    "a network of other shapes": (config(lambda content: content["model_args"].update(base_width=128)), "damaged"),
    "a million pixels a side": (
        config(lambda content: content["pretrained_cfg"].update(input_size=[3, 10**6, 10**6])),
        "input_size=",
    ),
    "half a pixel": (config(lambda content: content["pretrained_cfg"].update(input_size=[3, 0.5, 16])), "input_size="),
    "a crop of almost nothing": (
        config(lambda content: content["pretrained_cfg"].update(crop_pct=1e-9)),
        "crop_pct=1e-09",
    ),
    "no spread": (config(lambda content: content["pretrained_cfg"].update(std=[0, 1, 1])), "std="),
    "an unknown interpolation": (
        config(lambda content: content["pretrained_cfg"].update(interpolation="os.mkdir")),
        "interpolation='os.mkdir'",
    ),
    "an interpolation that is a list": (
        config(lambda content: content["pretrained_cfg"].update(interpolation=[1])),
        r"interpolation=\[1\]",
    ),
    "one mean": (config(lambda content: content["pretrained_cfg"].update(mean=-1)), "mean=-1, not numbers"),
    "names that are objects": (
        config(lambda content: content.update(label_names=[{"a": 1}] * 10)),
        "label_names that are no list of names",
    ),
    "a key twice": (text(lambda content: '{"architecture": "resnet18",' + content.lstrip()[1:]), "a key twice"),
    "a hundred thousand lists": (text(lambda _: "[" * 10**5), r"config\.json is damaged"),
    "twenty million bytes": (text(lambda content: content + " " * (20 * 10**6)), r"config\.json is damaged"),
}


# --- all of them ----------------------------------------------------------------------------------------------------

DRIVER = """
import json, resource, sys, time
import torch
from epsanet.network.weights import load_model
from epsanet.tasks.train import train
load_model("epsanet14_tiny.digits")  # so that nothing is imported under the limit
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
limit = size + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for kind, name, path in json.load(open("sources.json")):
    start = time.process_time()
    try:
        train(resume=path) if kind == "run" else load_model(path)
        said = ["nothing", "it was taken"]
    except BaseException as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps([kind, name, *said, time.process_time() - start]), flush=True)
"""

ALL = [
    *(("pickle", name) for name in PICKLES),
    *(("run", name) for name in RUNS),
    ("pickle", "a checkpoint of Lightning as a model"),
    *(("folder", name) for name in FOLDERS),
]
MESSAGES = {
    **{("pickle", name): message for name, (_, message) in PICKLES.items()},
    **{("run", name): message for name, (*_, message) in RUNS.items()},
    ("pickle", "a checkpoint of Lightning as a model"): "holds no state_dict",
    **{("folder", name): message for name, (_, message) in FOLDERS.items()},
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, str, float]]:
    """What a process with two GiB says of each source: the kind of error, its text, seconds of processor time."""
    root = tmp_path_factory.mktemp("hostile")
    sources = []
    for number, (kind, name) in enumerate(ALL):
        path = root / f"{number:03d}"
        if kind == "run":
            write_run(path, *RUNS[name][:2])
        elif kind == "folder":
            shutil.copytree(shipped_folders()["epsanet14_tiny.digits"], path)
            FOLDERS[name][0](path)
        elif name in PICKLES:
            path.write_bytes(PICKLES[name][0]())
        else:
            torch.save({**TRAINING, "hyper_parameters": INJECTED}, path)
        sources.append((kind, name, str(path)))
    (root / "sources.json").write_text(json.dumps(sources))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(MEMORY)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    results = {(kind, name): tuple(rest) for kind, name, *rest in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"ended by {done.returncode} after {list(results)[-1:]}: {done.stderr[-2000:]}"
    assert not list(root.rglob(CANARY)), "code was run"
    return results  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "name"), ALL, ids=lambda value: value)
def test_it_is_refused_in_one_line_and_nothing_runs(
    said: dict[tuple[str, str], tuple[str, str, float]], kind: str, name: str
) -> None:
    error, message, seconds = said[kind, name]
    assert error in ("ValueError", "DamagedCheckpointError"), message
    assert "\n" not in message
    assert len(message) < 700
    assert "weights_only" not in message, "torch's advice to switch the check off was passed on"
    assert re.search(MESSAGES[kind, name], message), message
    assert seconds < SECONDS


def test_the_calls_would_run_if_they_were_let(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the canary proved nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("a call", "a call, legacy", "eval", "a state that is set"):
        Path("source").write_bytes(PICKLES[name][0]())
        torch.load("source", weights_only=False)
        assert Path(CANARY).is_dir(), name
        Path(CANARY).rmdir()


def test_sound_files_pass(tmp_path: Path) -> None:
    """In every format, with an optimiser, and in half precision."""
    from epsanet.network.weights import load_released, save_released

    model = timm.create_model("epsanet50_small", num_classes=3)
    save_released(tmp_path / "sound.pth.tar", model, data_parallel=True)
    wanted = model.state_dict()
    content = torch.load(tmp_path / "sound.pth.tar", weights_only=True)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in content["state_dict"].items()
    }
    torch.save({"state_dict": half, "best_prec1": torch.tensor(1.0)}, tmp_path / "half.pth")
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name, tolerance in (("sound.pth.tar", 0), ("legacy.pth", 0), ("half.pth", 1e-3)):
        state = load_released(tmp_path / name).model.state_dict()
        assert state.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(state[key], tensor, rtol=tolerance, atol=tolerance)
    assert load_model("epsanet14_tiny.digits").class_names == list("0123456789")
