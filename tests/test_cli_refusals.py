"""What a command cannot do is refused in one line that names the remedy, and nothing is written."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detecting import coco_folder, detector
from making import class_folders, pixels, png
from torch import nn

from epsanet.cli import main
from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.samples import Samples
from epsanet.data.sources import open_data
from epsanet.network.detectors import save_detector
from epsanet.network.weights import load_model, save_model, to_released
from epsanet.tasks.evaluate import evaluate

Refused = Callable[[str], str]
PREPROCESSING = {"input_size": (3, 8, 8), "mean": (0.2,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, and a model of each kind: of colours, of grey, a detector, a bundle."""
    root = tmp_path_factory.mktemp("place")
    class_folders(root / "pictures" / "val", {"ant": 6, "bee": 6})
    coco_folder(root / "scenes", images=2)
    for name, channels in (("colour", 3), ("grey", 1)):
        torch.manual_seed(1)
        model = timm.create_model("epsanet14_tiny", num_classes=2, in_chans=channels)
        own = {"input_size": (channels, 8, 8), "mean": (0.2,) * channels, "std": (0.5,) * channels, "crop_pct": 1.0}
        save_model(root / name, model, ["ant", "bee"], own, card="---\nlibrary_name: timm\n---\n")
    save_detector(root / "detector", detector(), ["a", "b", "c"], card="")
    _write_bundle(root / "bundle")
    return root


def _write_bundle(folder: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            return x_NCHW.mean((2, 3))

    folder.mkdir()
    torch.export.save(torch.export.export(Mean(), (torch.zeros(1, 3, 8, 8),)), folder / "network.pt2")
    description = {
        "format": "pt2",
        "architecture": "mean",
        "int8": False,
        "dynamic_size": False,
        "label_names": ["r", "g", "b"],
        "data_config": {**PREPROCESSING, "interpolation": "bilinear", "crop_mode": "center"},
    }
    (folder / "bundle.json").write_text(json.dumps(description))


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """What a command that is refused says, once it is sure that it left no file and no folder."""
    monkeypatch.chdir(place)

    def call(command: str) -> str:
        before = sorted(place.rglob("*"))
        capsys.readouterr()
        assert main(command.split()) == 2
        output, errors = capsys.readouterr()
        assert output == ""
        assert sorted(place.rglob("*")) == before
        return errors.splitlines()[-1]

    return call


# Channels


@pytest.mark.parametrize(
    "command",
    [
        "predict grey pictures --output x.csv",
        "predict grey pictures --output x.parquet",
        "evaluate grey --data pictures",
        "evaluate grey --data pictures --data.input_size 16",
        "explain grey pictures -o drawn",
        "export grey --format pt2 --output exported",
        "train digits --model_args.in_chans 1 --model epsanet14_tiny --output run",
        "train finetune --init_from grey --data digits --output run",
        "train digits-detection --model_args.in_chans 1 --output run",
    ],
)
def test_a_network_of_grey_images_is_refused_where_images_are_read_as_rgb(command: str, refused: Refused) -> None:
    said = refused(command)
    assert "takes 1-channel images" in said
    assert "RGB" in said
    assert "in_chans" in said


def test_a_checkpoint_of_a_network_of_grey_images_is_refused_too(tmp_path: Path, refused: Refused) -> None:
    with torch.device("meta"):
        shapes = timm.create_model("epsanet50_small", num_classes=2, in_chans=1).state_dict()
    zeros = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in shapes.items()}
    torch.save({"state_dict": to_released(zeros)}, tmp_path / "grey.pth")
    assert "takes 1-channel images" in refused(f"predict {tmp_path / 'grey.pth'} pictures --output x.parquet")


def test_a_network_of_grey_images_can_be_published_and_converted(place: Path, tmp_path: Path) -> None:
    assert main(["publish", str(place / "grey"), "user/name", "--dry-run"]) == 0
    assert main(["convert", str(place / "grey"), str(tmp_path / "again")]) == 0
    before, after = (load_model(folder).model.state_dict() for folder in (place / "grey", tmp_path / "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


# Another kind of model


@pytest.mark.parametrize(
    "command", ["publish detector user/name --dry-run", "explain detector pictures", "convert detector new"]
)
def test_a_command_for_classifiers_says_which_are_for_detectors(command: str, refused: Refused) -> None:
    assert "holds a detector" in refused(command)
    assert refused(command).endswith("and so do predict, evaluate, export and serve")


def test_a_bundle_is_not_converted(refused: Refused) -> None:
    for goal in ("new", "new.pth"):
        assert "exported bundle already; give the model folder" in refused(f"convert bundle {goal}")


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("predict colour pictures --score_thresh 7", "--score_thresh is for detectors, and colour holds none"),
        ("predict colour pictures --score_thresh 0.5", "--score_thresh is for detectors"),
        ("predict colour pictures --pictures drawn", "--pictures is for detectors"),
        ("predict detector pictures --topk 5", "--topk is for classifiers, and detector holds a detector"),
        ("evaluate detector --data scenes --data.mean [0,0,0]", "--data.mean is for classifiers"),
        ("evaluate detector --data scenes --data.input_size 64", "--data.input_size is for classifiers"),
    ],
)
def test_a_flag_of_the_other_task_is_refused(command: str, flag: str, refused: Refused) -> None:
    said = refused(command)
    assert flag in said
    assert "leave it out" in said


# Names of files


@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.safetensors", "w.bin", "w.tar"])
def test_no_model_folder_is_named_like_a_file(name: str, refused: Refused) -> None:
    said = refused(f"convert colour {name}")
    assert f"{name} is named like a file; end it in .pth or .pth.tar, or name a folder" in said


def test_a_model_folder_may_have_a_dot_in_its_name(place: Path, tmp_path: Path) -> None:
    assert main(["convert", str(place / "colour"), str(tmp_path / "mine.v2")]) == 0
    assert (tmp_path / "mine.v2" / "config.json").is_file()


def test_names_of_tensors_are_for_checkpoints(refused: Refused) -> None:
    assert "data_parallel is for checkpoints, and new is to be a model folder" in refused(
        "convert colour new --data_parallel"
    )


def test_a_file_of_a_run_or_model_folder_leads_to_the_folder(place: Path, tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("model: epsanet14_tiny\n")
    for name in ("best.ckpt", "last.pth"):
        torch.save({"state_dict": {"fc.weight": torch.zeros(2, 3)}}, run / "checkpoints" / name)
    for command in ("predict {} pictures", "convert {} new", "evaluate {} --data pictures"):
        assert refused(command.format(run / "checkpoints" / "best.ckpt")).endswith(f"give the run folder, {run}")
        for model in ("colour", "detector"):
            for name in ("model.safetensors", "config.json"):
                assert refused(command.format(f"{model}/{name}")).endswith(f"give the folder, {model}")
    assert "holds another network" in refused(f"predict {run / 'checkpoints' / 'last.pth'} pictures")
    (tmp_path / "model.safetensors").write_bytes((place / "colour" / "model.safetensors").read_bytes())
    assert "no file of torch.save" in refused(f"predict {tmp_path / 'model.safetensors'} pictures")


# Flags that are heard


def test_mean_and_std_of_an_evaluation_take_the_place_of_the_models_own(place: Path, tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    model = load_model(place / "colour").model
    save_model(tmp_path / "other", model, ["ant", "bee"], {**PREPROCESSING, "mean": mean, "std": std})
    data = {"source": str(place / "pictures"), "workers": 0, "batch_size": 12}
    loss = {
        (folder, changed): evaluate(
            folder, DataConfig(**data, **({"mean": mean, "std": std} if changed else {})), device="cpu"
        ).loss
        for folder, changed in ((place / "colour", False), (place / "colour", True), (tmp_path / "other", False))
    }
    plain, changed, other = loss.values()
    assert changed == pytest.approx(other, abs=1e-6)
    assert abs(changed - plain) > 1e-3


def test_shards_are_packed_of_a_data_set_that_needs_to_be_told_where_its_labels_are(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with tarfile.open(tmp_path / "there" / "train-0000.tar", "w") as tar:
        for number in range(4):
            described = json.dumps({"label": "wrong", "kind": number % 2}).encode()
            for suffix, content in (("png", png(pixels(number % 2, number))), ("json", described)):
                entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    flags = ["--data.label_key", "kind", "--data.class-names", str(tmp_path / "names.txt")]
    assert main(["shard", f"wds/{tmp_path / 'there'}", str(tmp_path / "packed"), *flags]) == 0
    packed = open_data(DataConfig(source=f"wds/{tmp_path / 'packed'}", val_fraction=0.5))
    found = {}
    for samples in (packed.train, packed.val):
        assert isinstance(samples, Samples)
        for position, label in enumerate(samples.labels.tolist()):
            found[np.asarray(read_image(samples.open(position))).tobytes()] = samples.class_names[label]
    assert found == {pixels(number % 2, number).tobytes(): ("ant", "bee")[number % 2] for number in range(4)}


def test_the_flags_that_packing_names_are_its_own(refused: Refused, tmp_path: Path) -> None:
    assert "with --data.root FOLDER" in refused("shard torch/mnist packed")
    said = refused(f"shard torch/mnist packed --data.root {tmp_path}")
    assert f"is not in {tmp_path}" in said
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert "unrecognized arguments: --data.source" in refused("shard pictures packed --data pictures")
