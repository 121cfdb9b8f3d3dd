"""A run folder holds everything the run was and gave, in files that their own libraries read."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tasks_reading import same_state
from timm.data import resolve_data_config

from epsanet import kernels
from epsanet.data import loaders
from epsanet.data.check import check_images
from epsanet.data.config import DataConfig
from epsanet.data.loaders import train_loader
from epsanet.data.samples import FolderSamples
from epsanet.data.sources import open_data
from epsanet.network.weights import create_model, load_model
from epsanet.tasks import callbacks
from epsanet.tasks.card import data_name, optimisation
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import OptimizerConfig, ScheduleConfig, TrainConfig, load_recipe
from epsanet.tasks.module import DivergedError
from epsanet.tasks.report import data_advice
from epsanet.tasks.scores import Score
from epsanet.tasks.train import train

Small = Callable[..., TrainConfig]
COLUMNS = ["epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "data_wait", "seconds"]
NO_TIMES = {"data_wait": 0, "seconds": 0}


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def network(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's tensors of a checkpoint."""
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


# The run folder


def test_the_run_folder_has_every_file_and_no_half_written_one(trained: Any) -> None:
    files = {
        path.relative_to(trained.result.run).as_posix() for path in trained.result.run.rglob("*") if path.is_file()
    }
    assert {
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "confusion_matrix.png",
        "train_batch.png",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model/config.json",
        "model/model.safetensors",
        "model/README.md",
    } <= files
    assert any(name.startswith("tensorboard/events.out.tfevents.") for name in files)
    assert not [name for name in files if Path(name).name.startswith(".")]


def test_metrics_have_a_row_an_epoch_whose_numbers_belong_together(trained: Any) -> None:
    rows = metrics(trained.result.run)
    assert list(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [5, 10, 15], "44 readable images in batches of 8"
    assert all(row["val_top5"] == 100 for row in rows), "all guesses of three classes"
    for row in rows:
        assert (row["val_top1"] * 15 / 100) == pytest.approx(round(row["val_top1"] * 15 / 100), abs=1e-9)
    assert sorted(row["seconds"] for row in rows) == [row["seconds"] for row in rows]


def test_pictures_open_and_show_something(trained: Any) -> None:
    for name in ("curves", "confusion_matrix", "train_batch"):
        with Image.open(trained.result.run / f"{name}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 5, f"{name} is blank"


def test_the_config_reloads_to_an_equal_run(trained: Any) -> None:
    path = trained.result.run / "config.yaml"
    assert load_recipe(str(path)) == trained.config
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(plain) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_the_metrics_say(trained: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.result.run / "tensorboard"))
    events.Reload()
    rows = metrics(trained.result.run)
    for key in ("train_loss", "val_loss", "val_top1", "val_top5", "lr"):
        assert [event.value for event in events.Scalars(key)] == pytest.approx([row[key] for row in rows], rel=1e-6)


def test_timm_alone_reads_the_model_folder(trained: Any) -> None:
    model = timm.create_model(f"local-dir:{trained.result.model}", pretrained=True)
    same_state(model.state_dict(), network(checkpoint(trained.result.run, "best")["state_dict"]))
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cow"]
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 8, 8)
    own = timm.data.resolve_model_data_config(create_model("epsanet14_tiny"))
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert np.array_equal(data[key], own[key])


def test_preprocessing_that_was_asked_for_travels_with_the_weights(small: Small, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run", schedule__epochs=1, data__crop_pct=0.75, data__interpolation="bicubic", data__input_size=9
    )
    loaded = load_model(train(config).model)
    assert loaded.data_config["crop_pct"] == 0.75
    assert loaded.data_config["interpolation"] == "bicubic"
    assert loaded.data_config["input_size"] == (3, 9, 9)


def test_the_result_is_that_of_the_recorded_logits(trained: Any) -> None:
    """The last pass is the test split; its 12 images have one that is damaged."""
    result = trained.result
    assert result.split == "test"
    assert result.evaluation.images == 11
    assert result.evaluation.correct == int((trained.logits.argmax(1) == trained.labels).sum())
    assert torch.bincount(trained.labels).tolist() == [4, 3, 4]


def test_it_says_what_it_found_what_it_got_and_how_to_go_on(trained: Any) -> None:
    text, result = trained.printed, trained.result
    assert "epsanet14_tiny, " in text
    assert "input 8×8" in text
    assert re.search(r"device +cpu, \d+ threads?, precision 32-true", text)
    assert re.search(r"classes +3: ant, bee, cow", text)
    assert "44 images of 3 classes, 14 to 15 a class, 14×14 pixels; 1 damaged" in text
    assert text.count("train/cow/003.png: not an image") == 1
    assert text.count("test/bee/200.png: not an image") == 1
    assert len(re.findall(r"^epoch [123]/3 ", text, re.MULTILINE)) == 3
    assert str(result.evaluation) in text
    for command in (
        f"epsanet evaluate {result.model} --data {trained.config.data.source}",
        f"epsanet predict {result.model} IMAGES",
        f"epsanet train --resume {result.run}",
    ):
        assert command in text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hfds/uoft-cs/cifar10", "cifar10"),
        ("somewhere/flowers", "flowers"),
        ("cifar10/train-00000-of-00001.parquet", "cifar10"),
        ("cifar10/data/train-00000-of-00001.parquet", "cifar10"),
        ("flowers.parquet", "flowers"),
    ],
)
def test_a_card_calls_a_data_set_by_its_name(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers.parquet").touch()
    assert data_name(source) == name


def test_the_model_card_has_the_result_and_what_made_it(trained: Any) -> None:
    card = (trained.result.model / "README.md").read_text(encoding="utf-8")
    evaluation = trained.result.evaluation
    low, high = evaluation.interval
    assert f"| test | 11 | {evaluation.top1:.2f} | {low:.2f} to {high:.2f} | {evaluation.top5:.2f} |" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "timm"
    assert head["pipeline_tag"] == "image-classification"
    assert "ant, bee, cow" in card
    assert f"{sum(p.numel() for p in create_model('epsanet14_tiny', num_classes=3).parameters()):,} parameters" in card
    assert "learning rate 0.02 (cosine)" in card
    assert "batch 8" in card
    assert "it had no part in training" in card


def test_the_card_names_every_argument_of_the_optimiser_and_the_schedule() -> None:
    optimizer = OptimizerConfig(opt="adamw", lr=1e-3, weight_decay=0.05, opt_args={"betas": [0.9, 0.95], "eps": 1e-6})
    schedule = ScheduleConfig(sched_args={"cycle_limit": 2, "cycle_decay": 0.5})
    said = optimisation(TrainConfig(optimizer=optimizer, schedule=schedule))
    rate = "learning rate 0.001 (cosine, cycle_limit 2, cycle_decay 0.5)"
    assert said == f"adamw, {rate}, weight decay 0.05, betas [0.9, 0.95], eps 1e-06"


# Which weights, and that they are the same every time


def test_the_model_is_that_of_the_best_epoch_the_last_of_equals(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([40.0, 80.0, 80.0, 60.0, 0.0])
    result = Score.result
    monkeypatch.setattr(
        Score, "result", lambda self, names: dataclasses.replace(result(self, names), top1=next(scores))
    )
    run = train(small(tmp_path / "run", schedule__epochs=4))
    assert [row["val_top1"] for row in metrics(run.run)] == [40, 80, 80, 60]
    best = checkpoint(run.run, "best")
    assert (best["epoch"], best["global_step"]) == (2, 15)
    same_state(load_file(run.model / "model.safetensors"), network(best["state_dict"]))
    last = network(checkpoint(run.run)["state_dict"])
    assert not torch.equal(last["conv1.weight"], load_file(run.model / "model.safetensors")["conv1.weight"])
    assert "The weights are those of epoch 3 of 4" in (run.model / "README.md").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained: Any, small: Small, tmp_path: Path) -> None:
    torch.rand(7)  # whatever happened before in this process
    again = train(small(tmp_path / "again"))
    same_state(checkpoint(again.run)["state_dict"], checkpoint(trained.result.run)["state_dict"])
    for mine, theirs in zip(metrics(again.run), metrics(trained.result.run), strict=True):
        assert {**mine, **NO_TIMES} == {**theirs, **NO_TIMES}
    other = train(small(tmp_path / "other", seed=43, schedule__epochs=1))
    first = metrics(trained.result.run)[0]
    assert metrics(other.run)[0]["train_loss"] != first["train_loss"]


def test_the_number_of_loader_processes_does_not_change_the_run(trained: Any, small: Small, tmp_path: Path) -> None:
    helped = train(small(tmp_path / "helped", data__workers=2))
    same_state(checkpoint(helped.run)["state_dict"], checkpoint(trained.result.run)["state_dict"])


# The recipe's numbers reach the optimiser


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    logs = logits - logits.logsumexp(1, keepdim=True)
    right = logs[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * right + smoothing * logs.mean(1)).mean()


@pytest.mark.skipif(not kernels.available(), reason="built without the native kernels")
def test_the_digits_recipe_loses_the_same_with_native_and_with_reference_kernels() -> None:
    config = load_recipe("digits")
    splits = open_data(config.data)
    torch.manual_seed(config.seed)
    model = create_model(config.model, num_classes=10).to(memory_format=torch.channels_last)
    optimizer: Any = Classifier(model, splits.class_names, config).configure_optimizers()["optimizer"]
    optimizer.param_groups[0]["lr"] = config.optimizer.lr
    loader = train_loader(splits.train, config.data, resolve_data_config({"input_size": (3, 16, 16)}, model=model), 1)

    def losses(network: Any, step: Any, images: Any, labels: Any, choice: kernels.Choice) -> tuple[float, float]:
        """Of a batch, before a step and after it."""
        with kernels.use(choice):
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            step.zero_grad()
            loss.backward()
            step.step()
            return loss.item(), torch.nn.functional.cross_entropy(network(images), labels).item()

    # From the same weights at each step: a ReLU that flips on the last bit sends two trainings apart, whatever computes
    # them. By their third step, torch's own on one thread and on two are 2 % apart.
    for images, labels, _ in itertools.islice(loader, 12):
        other, other_optimizer = copy.deepcopy((model, optimizer))
        native = losses(other, other_optimizer, images, labels, "native")
        reference = losses(model, optimizer, images, labels, "reference")
        assert native[0] == pytest.approx(reference[0], rel=1e-5)
        assert native[1] == pytest.approx(reference[1], rel=1e-3)
        assert abs(reference[1] - reference[0]) > 1e-2 * reference[0]


@pytest.mark.parametrize(
    ("opt", "filtered", "opt_args"),
    [("sgd", False, None), ("momentum", False, None), ("sgd", True, None), ("momentum", True, {"maximize": True})],
    ids=["nesterov", "plain", "filtered", "ascent"],
)
def test_one_step_is_stochastic_gradient_descent_written_out(
    opt: str, filtered: bool, opt_args: dict[str, Any] | None, small: Small, tmp_path: Path
) -> None:
    config = small(
        tmp_path / "run",
        data__batch_size=44,
        schedule__epochs=1,
        label_smoothing=0.25,
        optimizer__opt=opt,
        optimizer__lr=0.3,
        optimizer__momentum=0.8,
        optimizer__weight_decay=0.01,
        optimizer__filter_bias_and_bn=filtered,
        optimizer__opt_args=opt_args,
    )
    found = network(checkpoint(train(config).run)["state_dict"])

    lightning.seed_everything(config.seed, verbose=False)
    model = create_model("epsanet14_tiny", num_classes=3).train()
    samples, _ = check_images(open_data(config.data).train, "train")  # type: ignore[arg-type]
    own = timm.data.resolve_data_config({"input_size": (3, 8, 8)}, model=model)
    ((images, labels, _),) = train_loader(samples, config.data, own, config.seed)
    loss = smoothed_cross_entropy(model(images), labels, 0.25)
    loss.backward()
    assert metrics(tmp_path / "run")[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        decay = 0.0 if filtered and parameter.ndim < 2 else 0.01
        gradient = (-parameter.grad if opt_args else parameter.grad) + decay * parameter.detach()
        push = gradient + 0.8 * gradient if opt == "sgd" else gradient
        change = found[name] - parameter.detach()
        assert (change + 0.3 * push).norm() <= 1e-3 * (0.3 * push).norm() + 1e-6, name


def cosine(step: int, steps: int) -> float:
    return 0.001 + (0.02 - 0.001) / 2 * (1 + math.cos(math.pi * step / steps))


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"schedule__min_lr": 0.001}, lambda t: cosine(t, 20)),
        (
            {"schedule__min_lr": 0.001, "schedule__warmup_epochs": 1, "schedule__warmup_lr": 0.004},
            lambda t: 0.004 + t * (0.02 - 0.004) / 5 if t < 5 else cosine(t, 20),
        ),
        (
            {"schedule__sched": "step", "schedule__decay_epochs": 2, "schedule__decay_rate": 0.3},
            lambda t: 0.02 * 0.3 ** (t // 10),
        ),
        (
            {"schedule__sched": "multistep", "schedule__decay_milestones": [1, 3], "schedule__decay_rate": 0.5},
            lambda t: 0.02 * 0.5 ** ((t >= 4) + (t >= 14)),  # timm's milestones are a step early, and say so
        ),
        ({"schedule__sched": "poly", "schedule__decay_rate": 2.0}, lambda t: 0.02 * (1 - t / 20) ** 2),
    ],
    ids=["cosine", "warm-up", "step", "multistep", "poly"],
)
def test_the_learning_rate_of_each_step_follows_the_formula(
    changes: dict[str, Any], rate: Callable[[int], float], small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = Classifier.training_step

    def listen(self: Classifier, batch: Any, number: int) -> torch.Tensor:
        used.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return step(self, batch, number)

    monkeypatch.setattr(Classifier, "training_step", listen)
    run = train(small(tmp_path / "run", schedule__epochs=4, **changes))
    assert used == pytest.approx([rate(t) for t in range(20)], rel=1e-9)
    assert [row["lr"] for row in metrics(run.run)] == pytest.approx(
        [rate(t) for t in (5, 10, 15, 20)], rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("decay_epochs", [0, -1])
def test_steps_of_no_length_are_refused(decay_epochs: int) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.decay_epochs={decay_epochs} is impossible; use 1 or more"):
        ScheduleConfig(sched="step", decay_epochs=decay_epochs)
    assert ScheduleConfig(decay_epochs=decay_epochs).sched == "cosine", "which does not look at it"


def test_arguments_of_the_network_and_of_psa_reach_it_and_its_model_folder(small: Small, tmp_path: Path) -> None:
    arguments = {"block_args": {"softmax": "channels", "spc": "split"}}
    result = train(small(tmp_path / "run", schedule__epochs=1, model_args=arguments))
    block = load_model(result.model).model.layer1[0]
    assert (block.conv2.softmax, block.conv2.spc.mode) == ("channels", "split")
    kept = json.loads((result.model / "config.json").read_text())["model_args"]
    assert kept["block_args"] == {"softmax": "channels", "spc": "split"}


def test_any_network_of_timm_can_be_trained(small: Small, tmp_path: Path) -> None:
    result = train(small(tmp_path / "run", model="resnet10t", schedule__epochs=1, data__input_size=32))
    assert timm.create_model(f"local-dir:{result.model}", pretrained=True).fc.out_features == 3
    norms = [
        tensor for name, tensor in load_file(result.model / "model.safetensors").items() if name[-10:] == "bn1.weight"
    ]
    assert len(norms) == 5
    assert all((norm != 1).any() for norm in norms), "it has learned"


# Data sets without a test split, shards, damage on the way


def test_without_a_test_split_validation_is_reported_and_the_card_says_so(
    small: Small, pictures: Path, tmp_path: Path
) -> None:
    result = train(small(tmp_path / "run", data__source=str(pictures / "train"), schedule__epochs=1))
    assert result.split == "val"
    assert result.evaluation.images == 5
    assert "it also chose the epoch" in (result.model / "README.md").read_text(encoding="utf-8")


def test_a_stream_can_be_trained_on(small: Small, tmp_path: Path) -> None:
    from making import parquet

    for split, count in {"train": 18, "validation": 5}.items():
        labels: list[object] = [n % 2 for n in range(count)]
        parquet(tmp_path / "data" / f"{split}.parquet", labels, names=["even", "odd"], row_group_size=4)
    options = {"source": str(tmp_path / "data"), "root": str(tmp_path / "cache"), "streaming": True, "batch_size": 4}
    changes = {f"data__{name}": value for name, value in options.items()}
    result = train(small(tmp_path / "run", **changes, schedule__epochs=2))
    assert [row["step"] for row in metrics(result.run)] == [4, 8]
    assert result.evaluation.images == 5
    assert result.evaluation.confusion.sum(axis=1).tolist() == [3, 2]


class Clock:
    """Time passes only when an image is read, 3 s, and in a step, 4 s."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        read, step = loaders.ImageDataset.__getitem__, Classifier.training_step

        def slow_read(dataset: Any, key: Any) -> Any:
            self.now += 3
            return read(dataset, key)

        def slow_step(*arguments: Any) -> Any:
            self.now += 4
            return step(*arguments)

        patch.setattr(loaders.ImageDataset, "__getitem__", slow_read)
        patch.setattr(Classifier, "training_step", slow_step)
        for module in (loaders, callbacks):
            times = SimpleNamespace(perf_counter=lambda: self.now, monotonic=time.monotonic)
            patch.setattr(module, "time", times)


def test_a_run_says_what_share_of_a_step_waits_for_images_and_what_to_do(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(callbacks, "_FIRST_STEPS", 10)
    result = train(small(tmp_path / "run", data__batch_size=4, schedule__epochs=2))
    # Four images of 3 s, then a step of 4 s.
    assert [row["data_wait"] for row in metrics(result.run)] == [0.75, 0.75]
    printed = capsys.readouterr().out
    advice = "75 % of the time of a step is spent waiting for images; more loader processes may help: --data.workers 6"
    assert printed.count(advice) == 1
    assert re.findall(r"data wait +(.*)", printed)[0] == "75 % of the time of the first 10 steps"
    assert printed.index("run folder") < printed.index("first 10 steps") < printed.index("epoch 1/2")
    assert printed.count("data wait 75 %  remaining") == 2
    assert re.search(r"training took \d+ s, 75 % of its steps' time waiting for images; the model is in", printed)
    assert "6 cores cannot load faster" in data_advice(0.5, DataConfig(workers=6))


def test_raise_stops_at_a_damaged_image_before_anything_is_written(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train/cow/003\.png: not an image.*--data\.on_bad_image=skip"):
        train(small(tmp_path / "run", data__on_bad_image="raise"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "epsanet14_tiney"}, "no network 'epsanet14_tiney'; near it: epsanet14_tiny"),
        ({"model_args": {"depth": 3}}, "epsanet14_tiny cannot be built with .*depth"),
        ({"model_args": {"num_classes": 7}}, "num_classes=7 for 3 classes"),
        ({"model_args": {"block_args": {"kernels": [3, 4, 5, 7]}}}, "kernel"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not here"),
        ({"device": "gpu"}, "device 'gpu' is unknown; use auto, cpu, cuda"),
        ({"sync_batchnorm": True}, "sync_batchnorm=true is for GPUs; torch has none on cpu"),
        ({"optimizer__opt": "sdg"}, r"optimizer\.opt='sdg'"),
        ({"optimizer__opt_args": {"beta": 1}}, r"opt='sgd' with opt_args=\{'beta': 1\} cannot .* unexpected .* 'beta'"),
        ({"optimizer__opt": "adahessian"}, r"optimizer\.opt='adahessian' needs second derivatives"),
        ({"schedule__sched": "cosinus"}, r"schedule\.sched='cosinus' cannot be had from timm: Unknown"),
        ({"schedule__sched": "plateau"}, r"schedule\.sched='plateau' cannot be had from timm: .* step per epoch"),
        ({"schedule__sched": "none"}, r"schedule\.sched='none' is no schedule; use constant"),
        ({"schedule__sched_args": {"cycles": 2}}, r"'cosine' with sched_args=\{'cycles': 2\} cannot .* 'cycles'"),
        ({"data__auto_augment": "rnd-m9"}, "auto_augment|rnd"),
        (
            {"data__mixup": 0.2, "data__batch_size": 64, "data__train_fraction": 1 / 3},
            r"pair the images of a batch, and one of \S+ has 15; use an even --data\.batch_size below that, or leave",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, small: Small, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        train(small(tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            ScheduleConfig(epochs=4, sched_args={"cycle_limit": 2, "cycle_decay": 0.5}),
            lambda step: 0.5 ** (step // 10) * 0.5 * (1 + math.cos(math.pi * (step % 10) / 10)),
        ),
        (
            ScheduleConfig(epochs=4, sched_args={"cycle_limit": 2, "cycle_mul": 3, "cycle_decay": 1}),
            lambda step: 0.5 * (1 + math.cos(math.pi * (step / 5 if step < 5 else (step - 5) / 15))),
        ),
        (
            ScheduleConfig(sched="wsd", epochs=4, min_lr=0.2, sched_args={"decay_epochs": 0.25, "decay_fn": "linear"}),
            lambda step: 1 - 0.8 * max(0, step - 15) / 5,
        ),
        (
            ScheduleConfig(sched="constant", epochs=4, warmup_epochs=1, warmup_lr=0.5),
            lambda step: min(1, 0.5 + 0.5 * step / 5),
        ),
        (ScheduleConfig(sched="step", epochs=4, decay_epochs=2, decay_rate=0.1), lambda step: 0.1 ** (step // 10)),
    ],
    ids=lambda value: value.sched if isinstance(value, ScheduleConfig) else "",
)
def test_schedules_are_had_by_name_with_all_that_timm_lets_one_set(
    schedule: ScheduleConfig, expected: Callable[[int], float]
) -> None:
    config = TrainConfig(optimizer=OptimizerConfig(lr=1.0), schedule=schedule)
    found: Any = Classifier(torch.nn.Linear(2, 3), ["a", "b", "c"], config, updates_per_epoch=5).configure_optimizers()
    for step in range(20):
        found["lr_scheduler"]["scheduler"].step_update(num_updates=step)
        assert found["optimizer"].param_groups[0]["lr"] == pytest.approx(expected(step), abs=1e-9), step


def test_images_that_do_not_suffice_are_refused_before_anything_is_written(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from making import parquet

    for split in ("train", "validation"):
        parquet(tmp_path / "data" / f"{split}.parquet", [0, 1] * 3, names=["even", "odd"])
    streamed = {"data__source": str(tmp_path / "data"), "data__streaming": True, "data__batch_size": 4}
    with pytest.raises(ValueError, match=r"data\.aug_repeats is for data sets that are not streamed"):
        train(small(tmp_path / "run", **streamed, data__aug_repeats=2))
    with monkeypatch.context() as patch:
        patch.setattr(loaders, "world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"has fewer images than one batch; lower --data\.batch_size"):
            train(small(tmp_path / "run", **streamed))
        patch.setattr(loaders, "world_size", lambda: 45)
        with pytest.raises(ValueError, match=r"has 44 images to train on for 45 processes"):
            train(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_there_already_is_not_overwritten(trained: Any, small: Small) -> None:
    before = (trained.result.run / "metrics.csv").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"is there already; choose another --output, or go on with --resume"):
        train(small(trained.result.run))
    assert (trained.result.run / "metrics.csv").stat().st_mtime_ns == before


def test_the_run_folder_is_named_after_data_and_time_when_it_is_not_said(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small("x", schedule__epochs=1)
    config.output = None
    run = train(config).run
    assert run.parent == tmp_path / "runs"
    assert re.fullmatch(rf"{Path(config.data.source).name}-\d{{8}}-\d{{6}}", run.name)


def test_a_damaged_image_met_in_training_does_not_end_the_run(
    small: Small, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sound when it was checked, by its header only; cut short all the same."""
    import shutil

    copy = tmp_path / "pictures"
    shutil.copytree(pictures, copy)
    victim = copy / "train" / "ant" / "000.png"
    victim.write_bytes(victim.read_bytes()[:-60])
    result = train(small(tmp_path / "run", data__source=str(copy), data__check="headers", schedule__epochs=2))
    assert [row["step"] for row in metrics(result.run)] == [5, 10]
    (said,) = [text for text in caplog.messages if "ant/000.png" in text]
    assert said.endswith("the next image takes its place")


def test_a_run_that_diverges_lists_names_that_are_not_utf8(small: Small, pictures: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pictures, tmp_path / "pictures")
    image = tmp_path / "pictures" / "train" / "ant" / "000.png"
    image.rename(os.fsdecode(bytes(image.with_name("caf")) + b"\xe9.png"))
    changes = {"data__source": str(tmp_path / "pictures"), "data__batch_size": 44, "optimizer__lr": 1e30}
    with pytest.raises(DivergedError, match=r"the 44 images of its batch are listed in"):
        train(small(tmp_path / "run", **changes))
    listed = (tmp_path / "run" / "diverged.txt").read_text(encoding="utf-8").splitlines()
    assert [name for name in listed if name.endswith(r"ant/caf\xe9.png")]


def test_source_of_the_fixture_is_what_the_tests_say(pictures: Path) -> None:
    """The counts above rest on it."""
    _, report = check_images(FolderSamples(pictures / "train"), "train")
    assert report.per_class == {"ant": 15, "bee": 15, "cow": 14}
    assert DataConfig(source=os.fspath(pictures)).source == str(pictures)
