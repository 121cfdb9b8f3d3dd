"""Weights in the package: a folder there is a name everywhere, and does what its card says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import epsanet
from epsanet.network.shipped import ShippedWeights, shipped_folders, shipped_weights
from epsanet.network.weights import find_model_folder, load_model, save_model

ROOT = Path(__file__).parents[2]
NAMES = sorted(shipped_folders())


def test_the_digits_are_shipped() -> None:
    assert "epsanet14_tiny.digits" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_give_the_same_logits_by_name_by_timm_and_by_folder(name: str) -> None:
    folder = shipped_folders()[name]
    loaded = load_model(name)
    by_timm = timm.create_model(name, pretrained=True).eval()
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, *loaded.data_config["input_size"])
    with torch.no_grad():
        wanted = by_folder(x)
        assert torch.equal(loaded.model(x), wanted)
        assert torch.equal(by_timm(x), wanted)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert loaded.class_names == list(by_timm.pretrained_cfg["label_names"]) == config["label_names"]
    assert timm.data.resolve_model_data_config(by_timm) == {
        key: tuple(value) if isinstance(value, list) else value for key, value in loaded.data_config.items()
    }
    assert name in timm.list_pretrained("epsanet*")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_small_and_hold_numbers(name: str) -> None:
    path = shipped_folders()[name] / "model.safetensors"
    state = load_file(path)
    assert path.stat().st_size <= 8 * 2**20
    assert sum(tensor.numel() for tensor in state.values()) <= 2_000_000
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_the_digits_have_the_accuracy_that_their_card_gives() -> None:
    """By timm alone, one pass over the images that training never saw."""
    from epsanet.data.config import DataConfig
    from epsanet.data.sources import open_split

    (found,) = [found for found in shipped_weights() if found.name == "epsanet14_tiny.digits"]
    model = timm.create_model("epsanet14_tiny.digits", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    samples, split, _ = open_split(DataConfig(source="digits"), "test", load_model(found.name).class_names)
    images = [transform(samples.open(place).convert("RGB")) for place in range(len(samples))]
    with torch.no_grad():
        correct = int((model(torch.stack(images)).argmax(1).numpy() == samples.labels).sum())
    assert (split, len(images)) == ("test", 360)
    assert 100 * correct / 360 == pytest.approx(found.top1)
    assert correct >= 351, "97.5 %"
    card = (shipped_folders()[found.name] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"\| test \| 360 \| ([\d.]+) \|", card)
    assert float(shown) == round(100 * correct / 360, 2)
    assert found == ShippedWeights(
        name="epsanet14_tiny.digits",
        classes=10,
        input_size=16,
        file_bytes=(shipped_folders()[found.name] / "model.safetensors").stat().st_size,
        measured_on="digits, test",
        top1=found.top1,
    )
    assert found.of == "epsanet14_tiny"


def test_an_architecture_stays_as_it_is_though_weights_of_it_are_shipped() -> None:
    plain = timm.create_model("epsanet14_tiny")
    assert plain.pretrained_cfg["input_size"] == (3, 32, 32)
    assert "label_names" not in plain.pretrained_cfg
    assert "file" not in plain.pretrained_cfg
    with pytest.raises(ValueError, match=r"has no pretrained weights by that name alone; use epsanet14_tiny\.digits"):
        timm.create_model("epsanet14_tiny", pretrained=True)
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(nothing\) for epsanet14_tiny"):
        load_model("epsanet14_tiny.nothing")


def test_shipped_weights_start_another_task_with_another_head() -> None:
    trained = timm.create_model("epsanet14_tiny.digits", pretrained=True)
    model = timm.create_model("epsanet14_tiny.digits", pretrained=True, num_classes=3)
    assert model.fc.out_features == 3
    for name, tensor in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, trained.state_dict()[name])


def test_a_folder_of_ones_own_goes_before_shipped_weights_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model_folder("epsanet14_tiny.digits") == shipped_folders()["epsanet14_tiny.digits"]
    save_model("epsanet14_tiny.digits", timm.create_model("epsanet14_tiny", num_classes=2), ["mine", "other"])
    assert load_model("epsanet14_tiny.digits").class_names == ["mine", "other"]


def test_a_folder_that_is_put_into_the_package_is_all_that_it_takes(tmp_path: Path) -> None:
    """A copy of the package with one folder more, in a process of its own; no socket can be opened there."""
    import shutil

    shutil.copytree(Path(epsanet.__file__).parent, tmp_path / "epsanet", ignore=shutil.ignore_patterns("__pycache__"))
    model = timm.create_model("epsanet26_tiny", num_classes=2).eval()
    save_model(tmp_path / "epsanet" / "weights" / "epsanet26_tiny.coins", model, ["heads", "tails"])
    x = torch.randn(1, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import socket, sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in type(finder).__module__]\n"
        "def refuse(*_, **__): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import timm, torch, epsanet\n"
        "assert epsanet.__file__.startswith(sys.argv[1]), epsanet.__file__\n"
        "model = timm.create_model('epsanet26_tiny.coins', pretrained=True).eval()\n"
        "with torch.no_grad(): print(model(torch.load(sys.argv[1] + '/x.pt'))[0].tolist())\n"
        "print(epsanet.load_model('epsanet26_tiny.coins').class_names)\n"
        "from epsanet.network.shipped import shipped_weights\n"
        "print(shipped_weights()[-1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    logits, names, found = done.stdout.splitlines()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor([json.loads(logits)]), model(x), rtol=1e-5, atol=1e-5)
    assert names == "['heads', 'tails']"
    assert "name='epsanet26_tiny.coins', classes=2, input_size=32" in found
    assert "measured_on=None, top1=None" in found, "a card without a result gives none"


def test_the_wheel_holds_the_weights(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom scikit_build_core.build import build_wheel\n"
        "build_wheel(sys.argv[1], {'wheel.cmake': 'false', 'build-dir': sys.argv[1] + '/build'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name, folder in shipped_folders().items():
            for file in ("config.json", "model.safetensors", "README.md"):
                assert archive.read(f"epsanet/weights/{name}/{file}") == (folder / file).read_bytes()


def test_the_models_command_lists_the_shipped_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from epsanet.cli import main
    from epsanet.study.cost import cost

    few = [cost(name) for name in sorted({name.partition(".")[0] for name in NAMES} | {"epsanet18"})]
    monkeypatch.setattr("epsanet.study.cost.cost_table", lambda: few)
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row["weights"] for row in json.loads(capsys.readouterr().out)}
    assert sorted(found["name"] for weights in rows.values() for found in weights) == NAMES
    assert rows["epsanet18"] == []
    (digits,) = rows["epsanet14_tiny"]
    assert digits["measured_on"] == "digits, test"
    assert main(["models"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["epsanet14_tiny.digits"]]
    assert line.split() == ["epsanet14_tiny.digits", "16²", "10", "615", f"{digits['top1']:.2f}", "digits,", "test"]
