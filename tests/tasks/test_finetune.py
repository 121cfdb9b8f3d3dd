"""Training a trained network further: where it starts, what is frozen, how fast each layer learns."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tasks_reading import CLASSES, same_state
from test_resume import same_run, stop_after
from test_train import metrics
from timm.models.resnet import Bottleneck

from epsanet.data.loaders import evaluation_transform
from epsanet.network.epsanet import EPSANet
from epsanet.network.weights import LoadedModel, load_model, save_model
from epsanet.tasks import run as run_module
from epsanet.tasks.callbacks import History
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import OptimizerConfig, ScheduleConfig, TrainConfig
from epsanet.tasks.launch import Processes
from epsanet.tasks.resume import as_begun
from epsanet.tasks.run import prepare
from epsanet.tasks.train import TrainingInterrupted, train

Small = Callable[..., TrainConfig]
NAMES = ["ant", "bee", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of other classes with a preprocessing and an argument of its own."""
    torch.manual_seed(1)
    model = timm.create_model("epsanet14_tiny", num_classes=3, block_args={"softmax": "channels"})
    path = tmp_path_factory.mktemp("models") / "model"
    data_config = {"input_size": (3, 12, 12), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.75}
    save_model(path, model, NAMES, data_config | {"interpolation": "bicubic", "crop_mode": "center"})
    return path


def test_network_and_preprocessing_are_those_it_starts_from(folder: Path, small: Small, tmp_path: Path) -> None:
    config = small(tmp_path / "run", model="auto", init_from=str(folder), data__input_size=None)
    run = prepare(config, Processes(device=torch.device("cpu")), None, resumed=False)
    found = run.model.state_dict()
    wanted = load_file(folder / "model.safetensors")
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert set(different) == {"fc.weight", "fc.bias"}, "cow is new, so the classifier is"
    assert run.config.model == "epsanet14_tiny"
    assert run.config.model_args["block_args"] == {"softmax": "channels"}
    assert run.data_config["input_size"] == (3, 12, 12)
    assert (run.data_config["mean"], run.data_config["std"]) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (run.data_config["crop_pct"], run.data_config["interpolation"]) == (0.75, "bicubic")
    asked = prepare(
        dataclasses.replace(config, data=dataclasses.replace(config.data, crop_pct=1.0)),
        Processes(device=torch.device("cpu")),
        None,
        resumed=False,
    )
    assert asked.data_config["crop_pct"] == 1.0, "what was asked for goes before"


def test_evaluation_sees_the_whole_image_where_training_only_pads(folder: Path, small: Small, tmp_path: Path) -> None:
    """With ``crop_padding`` images are resized to the input size, so a centre crop would look at larger ones."""
    framed = np.zeros((12, 12, 3), np.uint8)
    framed[[0, -1]] = framed[:, [0, -1]] = 255
    for source in ({"init_from": str(folder), "model": "auto"}, {"model": "epsanet18"}):
        config = small(tmp_path / "run", **source, data__input_size=12, data__crop_padding=1)
        run = prepare(config, Processes(device=torch.device("cpu")), None, resumed=False)
        mean, std = (torch.tensor(run.data_config[key])[:, None, None] for key in ("mean", "std"))
        seen = evaluation_transform(run.data_config)(Image.fromarray(framed)) * std + mean
        torch.testing.assert_close(seen, torch.from_numpy(framed).permute(2, 0, 1) / 255, atol=1e-6, rtol=0)
        asked = dataclasses.replace(config, data=dataclasses.replace(config.data, crop_pct=0.5))
        run = prepare(asked, Processes(device=torch.device("cpu")), None, resumed=False)
        assert run.data_config["crop_pct"] == 0.5, "what was asked for goes before"


def test_a_finetuned_run_freezes_unfreezes_and_resumes_without_its_source(
    folder: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    seen: list[dict[str, torch.Tensor]] = []
    end = History.on_train_epoch_end

    def on_train_epoch_end(self: History, trainer: Any, module: Any) -> None:
        seen.append({name: tensor.clone() for name, tensor in module.model.state_dict().items()})
        end(self, trainer, module)

    changes: dict[str, Any] = {
        "init_from": str(source),
        "freeze_epochs": 2,
        "optimizer__layer_decay": 0.5,
        "model": "auto",
        "data__input_size": None,
    }
    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_epoch_end", on_train_epoch_end)
        whole = train(small(tmp_path / "whole", **changes)).run
    assert "starts from" in capsys.readouterr().out
    before = load_file(folder / "model.safetensors")
    head = {"fc.weight", "fc.bias"}
    for state in seen[:2]:
        assert {name for name in before if not torch.equal(state[name], before[name])} == head
    changed = {name for name in before if not torch.equal(seen[2][name], seen[1][name])}
    assert changed == set(before), "all weights and statistics move when nothing is frozen"
    assert "trained from the weights of" in (whole / "model" / "README.md").read_text()
    assert str(tmp_path) not in (whole / "model" / "README.md").read_text()

    run = tmp_path / "run"
    for step in (7, 11):  # frozen, and after
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(TrainingInterrupted):
                train(small(run, **changes), resume="auto")
        shutil.rmtree(source, ignore_errors=True)
    begun = (run / "config.yaml").read_text()
    train(resume=run)
    same_run(run, whole)
    assert begun.replace(str(run), str(whole)) == (whole / "config.yaml").read_text()


def test_what_a_run_that_goes_on_leaves_out_is_as_it_began(small: Small, tmp_path: Path) -> None:
    def asked(**changes: Any) -> TrainConfig:
        return small(tmp_path, init_from="nowhere", **changes)

    begun = asked(model_args={"drop_path_rate": 0.1}, data__input_size=12, data__mean=(0.1, 0.2, 0.3), data__crop_pct=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(begun)))
    left_out: dict[str, Any] = {"data__input_size": None, "schedule__epochs": 9}
    assert as_begun(asked(model="auto", **left_out), tmp_path) == dataclasses.replace(
        begun, schedule=ScheduleConfig(epochs=9)
    )
    named = as_begun(asked(data__crop_pct=0.5, **left_out), tmp_path)
    assert (named.model_args, named.data.crop_pct) == ({}, 0.5), "what was asked for goes before"
    assert (named.data.input_size, named.data.mean) == (12, (0.1, 0.2, 0.3))


def test_each_layer_learns_at_the_rate_of_its_depth(small: Small, tmp_path: Path) -> None:
    config = small(tmp_path / "run", optimizer__layer_decay=0.5, optimizer__lr=0.8)
    run = prepare(config, Processes(device=torch.device("cpu")), None, resumed=False)
    chosen = Classifier(run.model, CLASSES, run.config).configure_optimizers()
    optimizer = chosen["optimizer"]
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    # The stem, four blocks of one stage each, and the classifier.
    wanted = {"conv1": 0.8 / 32, "layer1": 0.8 / 16, "layer2": 0.8 / 8, "layer3": 0.8 / 4, "layer4": 0.8 / 2, "fc": 0.8}
    wanted["bn1"] = wanted["conv1"]
    for name, parameter in run.model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(wanted[name.split(".")[0]]), name
    chosen["lr_scheduler"]["scheduler"].step_update(1)  # half way of the cosine over 3 epochs of 1 update: 0.75
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in run.model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.75 * wanted[name.split(".")[0]]), name


def test_the_rate_that_is_reported_is_the_classifiers(small: Small, tmp_path: Path) -> None:
    run = train(small(tmp_path / "run", optimizer__layer_decay=0.5, schedule__epochs=2)).run
    assert [row["lr"] for row in metrics(run)] == pytest.approx([0.01, 0.0])


def test_an_epsanet_starts_from_a_resnet_but_not_frozen(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # timm registers no ResNet so small, hence none that a folder could name.
    torch.manual_seed(2)
    resnet: Any = EPSANet(Bottleneck, (1, 1, 1, 1), small_images=True, channels=(16, 32, 32, 64))  # type: ignore[arg-type]
    resnet.pretrained_cfg = {"architecture": "a ResNet"}
    state = resnet.state_dict()
    data_config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    source = LoadedModel(model=resnet, class_names=NAMES, data_config=data_config | {"interpolation": "bilinear"})
    monkeypatch.setattr(run_module, "load_model", lambda name: source if name == "resnet" else load_model(name))
    run = prepare(
        small(tmp_path / "run", init_from="resnet"), Processes(device=torch.device("cpu")), None, resumed=False
    )
    assert run.start is not None
    assert run.start.inherited == 4
    found = run.model.state_dict()
    torch.testing.assert_close(found["layer2.0.conv2.spc.branches.0.weight"], state["layer2.0.conv2.weight"][:8])
    torch.testing.assert_close(found["layer4.0.conv3.weight"], state["layer4.0.conv3.weight"])
    with pytest.raises(ValueError, match=r"freeze_epochs=1 would freeze PSA modules .* use --freeze_epochs 0"):
        prepare(
            small(tmp_path / "run", init_from="resnet", freeze_epochs=1),
            Processes(device=torch.device("cpu")),
            None,
            resumed=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "nowhere"}, r"there is no model 'nowhere'"),
        ({"init_from": "{folder}", "model": "epsanet26_tiny"}, r"epsanet14_tiny does not fit: it has no layer1\.1\."),
    ],
)
def test_a_start_that_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, folder: Path, small: Small, tmp_path: Path
) -> None:
    changes = {key: value.format(folder=folder) for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_freezing_random_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze_epochs would freeze random weights; .* --init_from"):
        TrainConfig(freeze_epochs=1)
    with pytest.raises(ValueError, match=r"freeze_epochs=4 does not fit into schedule\.epochs=3"):
        TrainConfig(freeze_epochs=4, init_from="x", schedule=ScheduleConfig(epochs=3))
    with pytest.raises(ValueError, match=r"optimizer\.layer_decay=0"):
        OptimizerConfig(layer_decay=0)


def test_local_dir_names_a_folder_as_timm_does(folder: Path) -> None:
    same_state(load_model(f"local-dir:{folder}").model.state_dict(), load_file(folder / "model.safetensors"))
