"""Explanations: Grad-CAM against its formula, figures that show their image, a command that says what fails."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from making import class_folders
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from epsanet import cli, kernels
from epsanet.data.images import read_image
from epsanet.data.loaders import evaluation_transform
from epsanet.insight.explain import explain
from epsanet.insight.saliency import cam_layer, grad_cam
from epsanet.insight.scales import record_scales
from epsanet.network.weights import load_model, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("explained") / "model"
    model = timm.create_model("epsanet14_tiny", num_classes=3)
    save_model(path, model, ["ant", "bee", "cow"], {"input_size": (3, 32, 32), "crop_pct": 1.0})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    class_folders(root, {"small": 3, "large": 2}, size=24)
    return root


@pytest.mark.parametrize("chosen", ["reference", "auto"])
def test_grad_cam_is_the_papers_formula(chosen: kernels.Choice) -> None:
    model, x = timm.create_model("epsanet14_tiny", num_classes=3).eval(), torch.randn(2, 3, 32, 45)
    classes = torch.tensor([2, 0])
    with kernels.use(chosen):
        found = grad_cam(model, x, classes, "layer3")
    stages = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    features = model.layer3(model.layer2(model.layer1(stages)))
    logits = model.forward_head(model.layer4(features))
    (gradient,) = torch.autograd.grad(logits[torch.arange(2), classes].sum(), features)
    maps = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).clamp(min=0)
    large = F.interpolate(maps.detach(), (32, 45), mode="bilinear", align_corners=False)[:, 0].numpy()
    assert large.max() > 0
    np.testing.assert_allclose(found, large / np.maximum(large.max((1, 2), keepdims=True), 1e-30), atol=2e-4)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("epsanet50_small", 224, "layer4"),
        ("epsanet14_tiny", 32, "layer3"),
        ("epsanet14_tiny", 16, "layer2"),
        ("epsanet50_small", 10, "act1"),
        ("mobilenetv3_small_050", 224, "blocks.5"),
    ],
)
def test_the_layer_of_grad_cam_is_the_deepest_that_is_still_fine(name: str, size: int, layer: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert cam_layer(model, (size, size)) == layer


def test_a_network_without_stages_asks_for_a_layer() -> None:
    with pytest.raises(ValueError, match="name one with --layer"):
        cam_layer(torch.nn.Linear(2, 2), (32, 32))
    with pytest.raises(ValueError, match="there is no layer 'nose'; stages are conv1, "):
        grad_cam(timm.create_model("epsanet14_tiny"), torch.zeros(1, 3, 32, 32), torch.tensor([0]), "nose")


class Windows(nn.Module):
    """Looks at four windows of an image, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.spare = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(2, (2, 16)).unflatten(4, (2, 16)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return self.conv(windows).mean((2, 3)).unflatten(0, (-1, 4)).mean(1)


def swin() -> Any:
    sizes: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **sizes)


def convnext() -> Any:
    return timm.create_model("convnext_tiny", num_classes=2, depths=(1, 1, 1, 1), dims=(16, 16, 16, 16))


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (swin, "layers.1", "SwinTransformer gives NHWC"),
        (convnext, "stages.0.blocks.0.mlp", r"no map of the image but shape \(1, 1, 8, 16\)"),
        (Windows, "conv", r"no map of the image but shape \(4, 1, 14, 14\)"),
        (Windows, "spare", "the network goes around layer 'spare'"),
    ],
)
def test_what_is_no_map_of_the_image_is_not_shown_as_one(make: Callable[[], Any], layer: str, message: str) -> None:
    """Channels last, in the whole network or in a part of it; windows in the place of images."""
    with pytest.raises(ValueError, match=message):
        grad_cam(make().eval(), torch.randn(1, 3, 32, 32), torch.tensor([1]), layer)


def test_an_explanation_holds_what_the_network_saw_and_said(folder: Path, pictures: Path) -> None:
    path = pictures / "small" / "000.png"
    (found,) = explain(folder, [path], topk=2)
    loaded = load_model(folder)
    pixels = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    assert found.picture is not None
    np.testing.assert_allclose(found.picture, pixels, atol=0.01)
    mean, std = (torch.tensor(loaded.data_config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        x = (torch.tensor(found.picture).permute(2, 0, 1).float() - mean) / std
        best = loaded.model(x[None]).softmax(1)[0].topk(2)
    assert found.classes == tuple(["ant", "bee", "cow"][index] for index in best.indices.tolist())
    assert found.probabilities == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [module.name for module in found.scales] == [f"layer{stage}.0.conv2" for stage in range(1, 5)]


def test_the_command_draws_a_figure_an_image_and_goes_on_after_a_damaged_one(
    folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_text("words")
    images = [str(pictures / name / "000.png") for name in ("small", "large")]
    assert cli.main(["explain", str(folder), *images, str(damaged), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert f"{damaged}: not an image" in said.out
    assert "1 of 3 images could not be read" in said.err
    drawn = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in drawn] == ["000-2.png", "000.png"]
    left = np.s_[20:400, 60:370]  # where each figure shows its image
    means = {name: np.asarray(Image.open(pictures / name / "000.png")).mean((0, 1)) for name in ("small", "large")}
    for path, name in zip(drawn, ("large", "small"), strict=True):
        shown = np.asarray(Image.open(path).convert("RGB"))[left].mean((0, 1))
        assert min(means, key=lambda one: np.abs(means[one] - shown).max()) == name
    assert cli.main(["explain", str(folder), str(damaged), "-o", str(tmp_path / "none")]) == 2


def test_networks_of_several_pyramids_and_names_that_meet_are_explained(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyConvResNet has four kernels, then three, then two; ``img`` and ``IMG`` are one name on many file systems."""
    model = timm.create_model("pyconvresnet26_tiny", num_classes=3)
    save_model(tmp_path / "model", model, ["$5_$10", "bee", "cow"], {"input_size": (3, 32, 32)})
    images = [tmp_path / name for name in ("a/IMG.png", "b/img.png")]
    for path in images:
        path.parent.mkdir()
        path.write_bytes((pictures / "small" / "000.png").read_bytes())
    damaged = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Path(damaged).write_text("words")
    words = ["explain", str(tmp_path / "model"), *map(str, images), damaged, "-o", str(tmp_path / "out")]
    assert cli.main([*words, "--topk", "3"]) == 0
    assert r"\xff.png: not an image" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["IMG.png", "img-2.png"]


def test_a_loaded_network_stays_as_it_is(folder: Path, pictures: Path) -> None:
    loaded = load_model(folder)
    loaded.model.train()
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    assert len(list(explain(loaded, [pictures / "small" / "000.png"]))) == 1
    assert loaded.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())


def test_the_command_tells_the_preferences_of_a_data_set(folder: Path, pictures: Path, tmp_path: Path) -> None:
    assert cli.main(["explain", str(folder), "--data", str(pictures), "-o", str(tmp_path), "--data.workers", "0"]) == 0
    with (tmp_path / "scales.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"]: int(row["images"]) for row in rows} == {"all": 5, "small": 3, "large": 2}
    assert len(rows) == 3 * 4 * 4
    for group in ("all", "small", "large"):
        shares = [float(r["attention"]) for r in rows if (r["class"], r["block"]) == (group, "layer2.0.conv2")]
        assert sum(shares) == pytest.approx(1)
    with Image.open(tmp_path / "scales.png") as drawn:
        assert drawn.size[0] > 1000


def test_preferences_are_those_of_the_size_that_is_asked_for(folder: Path, pictures: Path, tmp_path: Path) -> None:
    flags = ["explain", str(folder), "--data", str(pictures), "--data.workers", "0"]
    loaded = load_model(folder)
    transform = evaluation_transform({**loaded.data_config, "input_size": (3, 16, 16)})
    x = torch.stack([transform(read_image(path)) for path in sorted(pictures.rglob("*.png"))])
    wanted = record_scales(loaded.model, x)[1].attention_NS.mean(0)
    assert cli.main([*flags, "-o", str(tmp_path), "--data.input_size", "16"]) == 0
    with (tmp_path / "scales.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["class"], row["block"]) == ("all", "layer2.0.conv2")]
    assert [float(row["attention"]) for row in rows] == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to explain"),
        (["nowhere/*.png"], "nothing matches"),
        (["--layer", "nose", "{image}"], "no layer"),
        (
            ["--layer", "layer1.0.conv2.se", "{image}"],
            "'layer1.0.conv2.se' gives no map of the image but shape (1, 1, 1,",
        ),
        (["--topk", "0", "{image}"], "topk=0 must be 1 or more"),
        (["{image}", "--data", "nowhere"], "there is no data set 'nowhere'"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word.format(image=pictures / "small" / "000.png") for word in arguments]
    assert cli.main(["explain", str(folder), *words, "-o", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()
