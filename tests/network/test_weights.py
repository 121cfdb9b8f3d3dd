"""Model folders and released checkpoints, against a network written here in the layout of the released code.

That network (below) knows nothing of ``epsanet``: its module and tensor names, the reversed order in which it
concatenates its branches, and its checkpoint's keys are those that the released code's users have on their disks.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.utils import prune

from epsanet.cli import main
from epsanet.network.replace import psa_replace
from epsanet.network.weights import (
    convert,
    create_model,
    from_released,
    load_model,
    load_released,
    save_model,
    save_released,
    to_released,
)

# --- the released layout, longhand ----------------------------------------------------------------------------------


class ReleasedSE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class ReleasedPSA(nn.Module):
    def __init__(self, channels: int, stride: int, groups: tuple[int, ...]) -> None:
        super().__init__()
        width = channels // 4
        self.conv_1 = nn.Conv2d(channels, width, 3, stride, 1, groups=groups[0], bias=False)
        self.conv_2 = nn.Conv2d(channels, width, 5, stride, 2, groups=groups[1], bias=False)
        self.conv_3 = nn.Conv2d(channels, width, 7, stride, 3, groups=groups[2], bias=False)
        self.conv_4 = nn.Conv2d(channels, width, 9, stride, 4, groups=groups[3], bias=False)
        self.se = ReleasedSE(width)

    def forward(self, x: Tensor) -> Tensor:
        feats = [self.conv_1(x), self.conv_2(x), self.conv_3(x), self.conv_4(x)]
        weights = [torch.exp(self.se(feat)) for feat in feats]
        total = weights[0] + weights[1] + weights[2] + weights[3]
        first, second, third, fourth = (feat * weight / total for feat, weight in zip(feats, weights, strict=True))
        return torch.cat([fourth, third, second, first], dim=1)  # in reverse


class ReleasedBlock(nn.Module):
    def __init__(self, seen: int, width: int, made: int, stride: int, groups: tuple[int, ...], shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(seen, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = ReleasedPSA(width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, made, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.downsample = None
        if shortcut:
            self.downsample = nn.Sequential(nn.Conv2d(seen, made, 1, stride, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ReleasedEPSANet(nn.Module):
    def __init__(
        self, layers: tuple[int, ...], groups: tuple[int, ...] = (1, 4, 8, 16), wide: int = 1, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        seen = 64
        for stage, blocks in enumerate(layers):
            width, made = 64 * 2**stage * wide, 256 * 2**stage
            modules = []
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                modules.append(ReleasedBlock(seen, width, made, stride, groups, shortcut=not block))
                seen = made
            setattr(self, f"layer{stage + 1}", nn.Sequential(*modules))
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


DEPTH_50, DEPTH_101 = (3, 4, 6, 3), (3, 4, 23, 3)
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]


def randomised(model: nn.Module) -> nn.Module:
    """No two channels alike, so that an exchange of any two is seen; magnitudes as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(1234)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, std=0.5)
            nn.init.normal_(module.bias, std=1.0)
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def released() -> nn.Module:
    torch.manual_seed(2)
    return randomised(ReleasedEPSANet(DEPTH_50))


@pytest.fixture(scope="module")
def released_7() -> nn.Module:
    torch.manual_seed(3)
    return randomised(ReleasedEPSANet(DEPTH_50, num_classes=7))


def checkpoint(model: nn.Module, path: Path, *, prefix: str = "", legacy: bool = False) -> Path:
    content = {
        "epoch": 120,
        "arch": "epsanet50",
        "state_dict": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "best_prec1": torch.tensor(77.49),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4).state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, output = theirs.eval()(x), ours.eval()(x)
    assert expected.shape == output.shape
    assert (expected[0] - expected[1]).abs().max() > 1e-3, "the logits do not depend on the image"
    assert (output - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def assert_one_line(raised: pytest.ExceptionInfo[ValueError]) -> None:
    assert type(raised.value) is ValueError, repr(raised.value)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    assert len(message) < 600


# --- released checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data parallel"])
def test_a_released_checkpoint_gives_the_released_networks_logits(
    released_7: nn.Module, tmp_path: Path, prefix: str, legacy: bool
) -> None:
    loaded = load_released(checkpoint(released_7, tmp_path / "best.pth.tar", prefix=prefix, legacy=legacy))
    assert_same_logits(loaded.model, released_7)
    assert loaded.model.pretrained_cfg["architecture"] == "epsanet50_small"
    assert loaded.class_names == ["0", "1", "2", "3", "4", "5", "6"]
    assert not loaded.model.training


def test_a_checkpoint_of_1000_classes_has_imagenets_names_and_a_bare_state_dict_will_do(
    released: nn.Module, tmp_path: Path
) -> None:
    torch.save(released.state_dict(), tmp_path / "bare.pth")
    loaded = load_model(tmp_path / "bare.pth")
    assert_same_logits(loaded.model, released)
    assert loaded.class_names == ImageNetInfo().label_names()
    assert loaded.data_config["input_size"] == (3, 224, 224)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "data parallel"])
def test_a_state_dict_of_ours_keeps_the_order_of_its_channels(tmp_path: Path, prefix: str) -> None:
    ours = randomised(timm.create_model("epsanet50_small", num_classes=7))
    torch.save({prefix + name: tensor for name, tensor in ours.state_dict().items()}, tmp_path / "ours.pth")
    assert_same_logits(load_model(tmp_path / "ours.pth").model, ours)


@pytest.mark.parametrize(
    ("layers", "groups", "wide", "variant"),
    [
        (DEPTH_101, (1, 4, 8, 16), 1, "epsanet101_small"),
        (DEPTH_50, (32, 32, 32, 32), 2, "epsanet50_large_g32"),
    ],
)
def test_the_variant_follows_from_the_shapes(
    tmp_path: Path, layers: tuple[int, ...], groups: tuple[int, ...], wide: int, variant: str
) -> None:
    theirs = randomised(ReleasedEPSANet(layers, groups, wide, num_classes=3))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "x.pth")
    loaded = load_released(tmp_path / "x.pth")
    assert loaded.model.pretrained_cfg["architecture"] == variant
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # deep and random: values grow, so the difference is taken relative to them
        expected = theirs(x)
        torch.testing.assert_close(loaded.model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("data_parallel", [False, True])
def test_our_network_written_as_a_released_checkpoint_runs_in_the_released_network(
    tmp_path: Path, data_parallel: bool
) -> None:
    ours = randomised(timm.create_model("epsanet50_small", num_classes=7))
    save_released(tmp_path / "out.pth.tar", ours, data_parallel=data_parallel)
    content = torch.load(tmp_path / "out.pth.tar", weights_only=True)
    assert content.keys() == {"epoch", "arch", "state_dict", "best_prec1", "optimizer"}
    assert content["arch"] == "epsanet50"
    theirs = ReleasedEPSANet(DEPTH_50, num_classes=7)
    (nn.DataParallel(theirs) if data_parallel else theirs).load_state_dict(content["state_dict"])
    assert_same_logits(ours, theirs)
    torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9).load_state_dict(content["optimizer"])


def test_there_and_back_is_the_same_to_the_last_bit(released_7: nn.Module, tmp_path: Path) -> None:
    state = released_7.state_dict()
    back = to_released(from_released(state))
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)

    source = checkpoint(released_7, tmp_path / "a.pth.tar", prefix="module.")
    convert(source, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "b.pth.tar", data_parallel=True)
    first, second = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("a.pth.tar", "b.pth.tar")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_conversion_exchanges_the_quarters_after_each_module_and_nothing_else(released_7: nn.Module) -> None:
    state = released_7.state_dict()
    ours = from_released({f"module.{name}": tensor for name, tensor in state.items()})
    for name, tensor in state.items():
        if ".conv2.conv_" in name:
            head, _, number = name.removesuffix(".weight").rpartition(".conv_")
            assert torch.equal(ours[f"{head}.spc.branches.{int(number) - 1}.weight"], tensor)
        elif ".bn2." in name and "tracked" not in name:
            assert torch.equal(ours[name], torch.cat(tensor.split(len(tensor) // 4)[::-1]))
        elif name.endswith("conv3.weight"):
            quarters = tensor.split(tensor.shape[1] // 4, 1)
            assert torch.equal(ours[name], torch.cat([quarters[3], quarters[2], quarters[1], quarters[0]], 1))
        else:
            assert torch.equal(ours[name], tensor)
    assert len(ours) == len(state)


def test_convert_writes_a_model_folder_that_gives_the_released_networks_logits(
    released_7: nn.Module, tmp_path: Path
) -> None:
    returned = convert(checkpoint(released_7, tmp_path / "x.pth.tar"), tmp_path / "deep" / "folder")
    assert_same_logits(returned.model, released_7)
    assert_same_logits(load_model(tmp_path / "deep" / "folder").model, released_7)
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert "x.pth.tar" in (tmp_path / "deep" / "folder" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("epsanet18", {}),
        ("epsanet14_tiny", {}),
        ("epsanet50_large", {}),
        ("resnet18", {}),
        ("epsanet50_small", {"block_args": {"softmax": "channels"}}),
        ("epsanet50_small", {"block_args": {"kernel_sizes": (3, 3, 3, 3)}}),
        ("epsanet50_small", {"block_args": {"reduction": 8}}),
        ("epsanet50_small", {"block_args": {"groups": (1, 1, 1, 1)}}),
        ("epsanet50_small", {"output_stride": 8}),
        ("epsanet50_small", {"global_pool": "max"}),
        ("epsanet50_small", {"stem_type": "deep", "stem_width": 32}),
        ("epsanet50_small", {"act_layer": "silu"}),
        ("epsanet50_small", {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}),
    ],
)
def test_a_network_that_the_released_code_cannot_hold_is_not_written_as_its_checkpoint(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    with pytest.raises(ValueError, match="the released code holds only") as raised:
        save_released(tmp_path / "x.pth", model)
    assert_one_line(raised)
    assert list(tmp_path.iterdir()) == []


# --- files that are none of these -----------------------------------------------------------------------------------


class Executable:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.canary),))


def truncated(path: Path, fraction: float) -> None:
    small = timm.create_model("epsanet14_tiny").state_dict()
    torch.save({"state_dict": small}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])


def changed(change: Callable[[dict[Any, Any]], Any]) -> Callable[[Path], None]:
    """A bare state dict of the released layout, on no memory worth the name, with one thing changed."""

    def write(path: Path) -> None:
        with torch.device("meta"):
            state = ReleasedEPSANet(DEPTH_50, num_classes=2).state_dict()
        content = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}
        torch.save(change(content) or content, path)

    return write


def without(lost: str) -> Callable[[Path], None]:
    return changed(lambda state: {name: tensor for name, tensor in state.items() if name != lost})


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda _: None, "no such file|there is no"),
    "empty": (lambda path: path.write_bytes(b""), "no checkpoint that torch can read"),
    "text": (lambda path: path.write_text("epoch,loss\n1,2.3\n" * 50), "no checkpoint that torch can read"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "no checkpoint that torch can read"),
    "an image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "no checkpoint that torch can read"),
    "another zip": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "no checkpoint that torch can read"),
    "truncated early": (lambda path: truncated(path, 0.2), "no checkpoint that torch can read"),
    "truncated late": (lambda path: truncated(path, 0.98), "no checkpoint that torch can read"),
    "folder": (lambda path: path.mkdir(), "no model folder"),
    "another network": (lambda path: torch.save(timm.create_model("resnet50").state_dict(), path), "another network"),
    "another network in a checkpoint": (
        lambda path: torch.save({"state_dict": timm.create_model("resnet18").state_dict()}, path),
        "another network",
    ),
    "our own state dict": (
        lambda path: torch.save(timm.create_model("epsanet14_tiny").state_dict(), path),
        "no EPSANet",
    ),
    "a list": (lambda path: torch.save([torch.zeros(3)], path), "holds no state_dict"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds no state_dict"),
    "an empty dict": (lambda path: torch.save({}, path), "holds no state_dict"),
    "an optimiser": (lambda path: torch.save({"optimizer": {"lr": 0.1}}, path), "holds no state_dict"),
    "numbers for names": (lambda path: torch.save({0: torch.zeros(3)}, path), "holds no state_dict"),
    "a missing stem": (without("conv1.weight"), "conv1.weight"),
    "a missing head bias": (without("fc.bias"), "fc.bias"),
    "a flat head": (changed(lambda state: state.update({"fc.weight": torch.zeros(2048)})), "first fc.bias"),
    "a small stem": (changed(lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 3, 3)})), "conv1.weight"),
    "a lost layer": (without("layer3.2.bn2.weight"), "layer3.2.bn2.weight"),
    "a scalar norm": (changed(lambda state: state.update({"layer1.0.bn2.weight": torch.tensor(1.0)})), "bn2.weight"),
}


@pytest.mark.parametrize(("write", "message"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_file_that_is_no_released_checkpoint_is_one_line_and_nothing_is_written(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    source = tmp_path / "source.pth.tar"
    write(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as raised:
        convert(source, tmp_path / "folder")
    assert_one_line(raised)
    assert "source.pth.tar" in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_an_executable_pickle_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    canary, source = tmp_path / "canary", tmp_path / "evil.pth.tar"
    refusal = "no checkpoint that torch can read" if how == "pickle" else "refused: .* could run code"
    content = {"state_dict": {"fc.weight": torch.zeros(2, 2)}, "extra": Executable(canary)}
    if how == "pickle":
        source.write_bytes(pickle.dumps(Executable(canary)))
        pickle.loads(source.read_bytes())  # it does run when it is let
        assert canary.is_dir()
        canary.rmdir()
    else:
        torch.save(content, source, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match="evil.pth.tar is " + refusal) as raised:
        convert(source, tmp_path / "folder")
    assert_one_line(raised)
    assert "weights_only" not in str(raised.value), "torch's advice to switch the check off was passed on"
    assert not canary.exists()
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("destination", ["folder", "file.pth"])
def test_an_existing_destination_is_an_error_and_stays_as_it_is(tmp_path: Path, destination: str) -> None:
    save_model(tmp_path / "source", timm.create_model("epsanet14_tiny"), NAMES)
    target = tmp_path / destination
    if destination == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(ValueError, match=r"exists; remove it or choose another name") as raised:
        convert(tmp_path / "source", target)
    assert_one_line(raised)
    assert (target / "notes.txt" if target.is_dir() else target).read_text() == "mine"


# --- model folders --------------------------------------------------------------------------------------------------


def tiny(**arguments: Any) -> nn.Module:
    return randomised(timm.create_model("epsanet14_tiny", **arguments))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("epsanet14_tiny", {}),
        ("epsanet14_tiny", {"block_args": {"softmax": "channels", "kernel_sizes": (3, 5), "groups": (2, 1)}}),
        ("epsanet14_tiny", {"in_chans": 1, "output_stride": 4, "block_args": {"spc": "split"}}),
        ("epsanet26_tiny_x2", {"global_pool": "max", "zero_init_last": True}),
    ],
)
def test_a_saved_model_comes_back_the_same_with_its_arguments_names_and_preprocessing(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    model = randomised(timm.create_model(name, num_classes=3, **arguments))
    channels = arguments.get("in_chans", 3)
    preprocessing = {
        "input_size": (channels, 40, 40),
        "mean": (0.1,) * channels,
        "std": (0.3,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    names = ["Ärmelkanal", "b, c", "日本"]
    save_model(tmp_path / "folder", model, names, preprocessing, card="# Card ☂\n")
    loaded = load_model(tmp_path / "folder")
    x = torch.randn(2, channels, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model(x))
    assert loaded.class_names == names
    listed = {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.data_config.items()}
    assert listed == preprocessing
    assert (tmp_path / "folder" / "README.md").read_text(encoding="utf-8") == "# Card ☂\n"
    assert load_model(tmp_path / "folder").model.training is False


def test_a_run_folder_stands_for_the_model_inside_it(tmp_path: Path) -> None:
    model = tiny()
    save_model(tmp_path / "run" / "model", model, NAMES)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "run").model(x), model(x))


def test_timm_alone_reads_a_model_folder_with_local_dir(tmp_path: Path) -> None:
    model = tiny(block_args={"softmax": "channels"})
    save_model(tmp_path / "a folder", model, NAMES)
    x = torch.randn(1, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, json, torch, timm, epsanet\n"
        f"model = timm.create_model('local-dir:{tmp_path / 'a folder'}', pretrained=True).eval()\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "with torch.no_grad(): print(json.dumps([model(x)[0].tolist(), model.pretrained_cfg['label_names']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logits, names = json.loads(done.stdout)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor([logits]), model(x), rtol=1e-5, atol=1e-5)
    assert names == NAMES


def test_the_number_of_class_names_must_be_the_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 class names for a network of 10 classes") as raised:
        save_model(tmp_path / "folder", tiny(), NAMES[:9])
    assert_one_line(raised)
    assert list(tmp_path.iterdir()) == []


def replaced() -> Any:
    model = tiny()
    psa_replace(model, "conv1", kernel_sizes=(3,), groups=(1,))
    return model


def pruned() -> Any:
    model = tiny()
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    return model


@pytest.mark.parametrize("change", [replaced, pruned])
def test_a_network_that_was_changed_is_not_written_as_a_folder_that_nobody_can_load(
    tmp_path: Path, change: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=r"psa_replace.* \"conv1.weight\".*; keep its state_dict") as raised:
        save_model(tmp_path / "folder", change(), NAMES)
    assert_one_line(raised)
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_other_classes_than_it_was_made_with_or_under_torch_compile_is_saved(tmp_path: Path) -> None:
    model, x = tiny(), torch.randn(1, 3, 32, 32)
    model.reset_classifier(3, "max")
    save_model(tmp_path / "folder", torch.compile(model), NAMES[:3])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "folder").model(x), model(x))


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config is cut": (
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text()[:200]),
        r"config\.json is damaged",
    ),
    "config is empty": (lambda folder: (folder / "config.json").write_text(""), r"config\.json is damaged"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is damaged"),
    "config is binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), r"config\.json is damaged"),
    "no architecture": (edit_config(lambda config: config.pop("architecture")), r"config\.json is damaged"),
    "unknown architecture": (edit_config(lambda config: config.update(architecture="epsanet9")), "'epsanet9'"),
    "architecture is a number": (edit_config(lambda config: config.update(architecture=5)), "network 5"),
    "another architecture": (edit_config(lambda config: config.update(architecture="resnet18")), "damaged"),
    "another depth": (edit_config(lambda config: config.update(architecture="epsanet26_tiny")), "damaged"),
    "no preprocessing": (edit_config(lambda config: config.pop("pretrained_cfg")), ""),
    "preprocessing is a list": (edit_config(lambda config: config.update(pretrained_cfg=[1])), "damaged"),
    "arguments are a list": (edit_config(lambda config: config.update(model_args=[1])), "damaged"),
    "an unknown argument": (edit_config(lambda config: config["model_args"].update(colour=1)), "damaged.*colour"),
    "an impossible argument": (
        edit_config(lambda config: config["model_args"].update(block_args={"softmax": "x"})),
        "softmax='x' is unknown",
    ),
    "other shapes": (
        edit_config(lambda config: config["model_args"].update(block_args={"reduction": 1})),
        "damaged",
    ),
    "too few names": (edit_config(lambda config: config["label_names"].pop()), "10 outputs but names 9 classes"),
    "too many names": (
        edit_config(lambda config: config["label_names"].append("x")),
        "10 outputs but names 11 classes",
    ),
    "names are a number": (edit_config(lambda config: config.update(label_names=3)), "label_names"),
    "mean is a word": (edit_config(lambda config: config["pretrained_cfg"].update(mean="grey")), "mean='grey'"),
    "input size is a word": (
        edit_config(lambda config: config["pretrained_cfg"].update(input_size="big")),
        "input_size=",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "empty weights": (edit_weights(lambda _: b""), "damaged"),
    "weights are cut": (edit_weights(lambda data: data[: len(data) // 2]), "damaged"),
    "weights lack a byte": (edit_weights(lambda data: data[:-1]), "damaged"),
    "a bit of the length is flipped": (edit_weights(lambda data: bytes([data[0] ^ 1]) + data[1:]), "damaged"),
    "a large length": (edit_weights(lambda data: data[:7] + b"\x40" + data[8:]), "damaged"),
    "a bit of the header is flipped": (edit_weights(lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:]), ""),
    "weights are text": (edit_weights(lambda _: b"<html>not found</html>" * 9), "damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no model folder: it has no config\.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_folder_is_one_line_that_names_it(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "folder"
    save_model(folder, tiny(), NAMES)
    load_model(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message or "folder") as raised:
        load_model(folder)
    assert_one_line(raised)
    if "softmax" not in message:
        assert str(folder) in str(raised.value)


def test_any_flipped_bit_of_the_safetensors_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    """A loaded folder then holds the same numbers; anything else is one line."""
    folder = tmp_path / "folder"
    model = tiny()
    save_model(folder, model, NAMES)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    state = model.state_dict()
    refused = 0
    for position in range(0, 8 + header, 8 + header // 40):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        try:
            loaded = load_model(folder).model.state_dict()
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError, repr(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert all(torch.equal(loaded[name], state[name]) for name in state), position
    assert refused > 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/thing", "there is no model 'no/such/thing'"),
        ("epsanet50_small", "epsanet50_small has no pretrained weights"),
        ("epsanet51", "there is no model 'epsanet51'"),
    ],
)
def test_a_source_that_is_no_model_is_one_line(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_model(source)
    assert_one_line(raised)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "KeyError: 'architecture'"),
        ({"architecture": "epsanet14_tiny", "pretrained_cfg": None}, "TypeError|AttributeError"),
        ({"architecture": ["BertModel"]}, "is no model of timm's"),
    ],
)
def test_a_repository_of_the_hub_that_is_not_timms_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("timm.models._hub.download_from_hf", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=message) as raised:
        load_model("hf-hub:somebody/bert")
    assert_one_line(raised)
    assert "hf-hub:somebody/bert" in str(raised.value)


def test_create_model_makes_timms_networks_and_explains_what_it_cannot() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = create_model("epsanet14_tiny", num_classes=4)
    same = timm.create_model("epsanet14_tiny", num_classes=4)
    same.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), same.eval()(x))
    for name, arguments, message in (
        ("epsanet50_smal", {}, "no network 'epsanet50_smal'; near it: epsanet50_small"),
        ("unheard-of", {}, "near it: epsanet14_tiny"),
        ("epsanet14_tiny", {"colour": 1}, "cannot be built with .*colour"),
        ("epsanet14_tiny", {"block_args": {"colour": 1}}, "cannot be built with .*colour"),
        ("epsanet14_tiny", {"output_stride": 5}, r"output_stride=5 is impossible"),
        ("epsanet14_tiny", {"act_layer": "wobbly"}, "cannot be built with .*: timm knows no 'wobbly'"),
        ("epsanet14_tiny", {"norm_layer": "wobblynorm"}, "cannot be built with .*: timm knows no 'wobblynorm'"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            create_model(name, **arguments)
        assert_one_line(raised)


# --- whole or not at all --------------------------------------------------------------------------------------------


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("culprit", ["save", "save_config_for_hf"])
def test_an_error_while_saving_leaves_the_old_folder_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    folder = tmp_path / "folder"
    save_model(folder, tiny(), NAMES, card="old")
    before = content_of(folder)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"epsanet.network.weights.{culprit}", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(folder, tiny(), NAMES, card="new")
    assert content_of(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_without_room_for_a_model_is_one_line_and_keeps_nothing_of_it(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "model"
    assert main(["convert", "epsanet14_tiny.digits", str(folder)]) == 2
    assert capsys.readouterr().err == f"epsanet: [Errno 28] No space left on device: '{folder}'\n"
    assert list(small_disk.iterdir()) == []


def test_saving_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save_model(folder, tiny(), NAMES, card="old")
    (folder / "left-over.txt").write_text("of the old model")
    model = tiny()
    save_model(folder, model, NAMES, card="new")
    assert set(content_of(folder)) == {"config.json", "model.safetensors", "README.md"}
    assert content_of(folder)["README.md"] == b"new"
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == [folder]


def test_a_process_killed_while_saving_leaves_the_old_folder_readable(tmp_path: Path) -> None:
    """It is stopped for good in the middle of writing: after the weights, before the configuration."""
    folder = tmp_path / "folder"
    save_model(folder, tiny(), NAMES, card="old")
    before = content_of(folder)
    code = (
        "import time, timm, epsanet.network.weights as weights\n"
        "def wait(*_, **__):\n    print('now', flush=True)\n    time.sleep(100)\n"
        "weights.save_config_for_hf = wait\n"
        f"weights.save_model({str(folder)!r}, timm.create_model('epsanet14_tiny'), {NAMES!r}, card='new')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    assert content_of(folder) == before
    assert len(load_model(folder).class_names) == 10


def test_a_model_folder_says_the_number_of_classes_once_for_transformers_passes_arguments_beside_it(
    tmp_path: Path,
) -> None:
    save_model(tmp_path / "model", timm.create_model("epsanet14_tiny", num_classes=3), ["ant", "bee", "cow"])
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["num_classes"] == 3
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["in_chans"] == 3, "the others are there"
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.num_classes == again.fc.out_features == 3
