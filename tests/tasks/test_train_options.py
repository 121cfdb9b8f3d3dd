"""Mixing, losses, averages, accumulation, clipping and compiling, against their formulas; all resume exactly."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tasks_reading import same_state
from test_resume import same_run, stop_after
from test_train import checkpoint, metrics, network
from torch import nn

from epsanet.data.config import DataConfig
from epsanet.data.mixing import Mixer
from epsanet.tasks.callbacks import LastCheckpoint
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import OptimizerConfig, TrainConfig, load_recipe
from epsanet.tasks.launch import Processes
from epsanet.tasks.module import DivergedError
from epsanet.tasks.run import prepare
from epsanet.tasks.train import TrainingInterrupted, train

Small = Callable[..., TrainConfig]
ALL = {
    "data__mixup": 0.4,
    "data__cutmix": 1.0,
    "ema_decay": 0.8,
    "accumulate_grad_batches": 2,
    "optimizer__clip_grad": 1.0,
}


def test_a_run_with_everything_that_is_stopped_goes_on_as_if_it_had_not_been(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five batches an epoch, two a step: three steps an epoch, the last of one batch."""
    whole = train(small(tmp_path / "whole", **ALL)).run
    assert [row["step"] for row in metrics(whole)] == [3, 6, 9]
    lr = [0.01 * (1 + math.cos(math.pi * step / 9)) for step in (3, 6, 9)]
    assert [row["lr"] for row in metrics(whole)] == pytest.approx(lr)
    run = tmp_path / "run"
    for step, saved in ((0, 1), (3, 4), (4, 5)):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(TrainingInterrupted):
                train(small(run, **ALL) if step == 0 else None, resume=None if step == 0 else run)
        assert checkpoint(run)["global_step"] == saved, "a stop waits for the step that sums up several batches"
    train(resume=run)
    same_run(run, whole)
    same_state(checkpoint(run)["current_model_state"], checkpoint(whole)["current_model_state"])


def test_the_average_is_validated_and_kept(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    after = LastCheckpoint.on_train_batch_end

    def on_train_batch_end(self: LastCheckpoint, trainer: Any, module: Any, *rest: Any) -> None:
        weights.append({name: value.detach().clone() for name, value in module.model.named_parameters()})
        after(self, trainer, module, *rest)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", on_train_batch_end)
    run = train(small(tmp_path / "run", ema_decay=0.8, schedule__epochs=1)).run
    average = weights[0]
    for step in weights[1:]:
        average = {name: 0.8 * average[name] + 0.2 * value for name, value in step.items()}
    saved = load_file(run / "model" / "model.safetensors")
    kept = network(checkpoint(run)["state_dict"])
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(weights[-1][name], saved[name]) or value.abs().max() == 0


def test_a_long_gradient_is_scaled_to_the_norm(small: Small, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run", data__batch_size=44, schedule__epochs=1, optimizer__opt="momentum", optimizer__clip_grad=0.01
    )
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.0))
    before = {
        name: value.detach().clone()
        for name, value in prepare(
            config, Processes(device=torch.device("cpu")), None, resumed=False
        ).model.named_parameters()
    }
    after = network(checkpoint(train(config).run)["state_dict"])
    moved = math.sqrt(sum(float((after[name] - before[name]).double().square().sum()) for name in before))
    assert moved == pytest.approx(0.02 * 0.01, rel=1e-2)


def test_compiling_changes_no_name_of_a_weight(
    trained: Any, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile(self: nn.Module) -> None:
        calls.append(type(self).__name__)
        self._compiled_call_impl = self._call_impl  # the compiler knows nothing of names

    monkeypatch.setattr(nn.Module, "compile", compile)
    run = train(small(tmp_path / "run", compile=True, schedule__epochs=1, ema_decay=0.5)).run
    assert calls == ["EPSANet"]
    assert (
        load_file(run / "model" / "model.safetensors").keys()
        == load_file(trained.result.model / "model.safetensors").keys()
    )
    assert checkpoint(run)["state_dict"].keys() == checkpoint(trained.result.run)["state_dict"].keys()


# Mixing


def mixer(seed: int = 3, smoothing: float = 0.0, **options: Any) -> Mixer:
    return Mixer(DataConfig(**options), 5, smoothing, seed)


def test_mixup_blends_images_and_labels_by_the_same_share() -> None:
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, 0])
    before = images.clone()
    mixed, targets = mixer(mixup=1.0, smoothing=0.1)(images, labels, epoch=2, batch=7)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    smooth = nn.functional.one_hot(labels, 5) * 0.9 + 0.1 / 5
    share = float((targets[0, 0] - smooth[5, 0]) / 0.9) if labels[0] != labels[5] else None
    assert share is None, "the first and the last are one class, so take the second"
    share = float((targets[1, 1] - 0.02) / 0.9)
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.flip(0))


def test_cutmix_pastes_a_piece_and_its_share_of_the_label() -> None:
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    mixed, targets = mixer(cutmix=1.0)(images, labels, epoch=0, batch=1)
    pasted = (mixed == images.flip(0)).all(1)
    kept = (mixed == images).all(1)
    assert (pasted ^ kept).all()
    torch.testing.assert_close(targets[0, 3], pasted[0].float().mean())
    torch.testing.assert_close(targets[0, 0], kept[0].float().mean())


def test_what_is_mixed_depends_on_seed_epoch_batch_and_process_and_disturbs_no_generator() -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    images, labels = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    before = states()
    shares = {
        key: float(mixer(seed=key[0], mixup=1.0)(images, labels, epoch=key[1], batch=key[2], process=key[3])[1][0, 0])
        for key in ((3, 0, 0, 0), (4, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1))
    }
    assert states() == before
    np.random.rand(5)
    again = float(mixer(mixup=1.0)(images, labels, epoch=0, batch=0)[1][0, 0])
    assert again == shares[3, 0, 0, 0]
    assert len(set(shares.values())) == 5


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match=r"pair the images of a batch, and it has 3; use an even --data\.batch_size"):
        mixer(mixup=1.0)(torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2]), epoch=0, batch=0)
    with pytest.raises(ValueError, match=r"data\.batch_size=7 is odd"):
        DataConfig(batch_size=7, cutmix=1.0)


# Losses


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_asks_of_each_class_by_itself(threshold: float | None, small: Small) -> None:
    config = small("x", loss="binary_cross_entropy", label_smoothing=0.1, bce_target_thresh=threshold)
    criterion = Classifier(nn.Identity(), ["a", "b", "c"], config).criterion
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
    wanted = []
    for row, label in zip(logits.tolist(), (0, 2), strict=True):
        for place, logit in enumerate(row):
            target = 0.9 * (place == label) + 0.1 / 3
            if threshold is not None:
                target = float(target > threshold)
            share = 1 / (1 + math.exp(-logit))
            wanted.append(-target * math.log(share) - (1 - target) * math.log(1 - share))
    assert float(criterion(logits, torch.tensor([0, 2]))) == pytest.approx(sum(wanted) / 6, rel=1e-6)


def test_labels_are_smoothed_once_when_images_are_mixed(small: Small) -> None:
    module = Classifier(nn.Identity(), ["a", "b", "c"], small("x", data__mixup=0.5, label_smoothing=0.3))
    logits, targets = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.8, 0.1, 0.1]])
    wanted = -sum(t * math.log(p) for t, p in zip([0.8, 0.1, 0.1], logits.softmax(1)[0].tolist(), strict=True))
    assert float(module.criterion(logits, targets)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {**ALL, "ema_decay": 0.5}])
def test_a_run_that_diverges_lists_all_images_of_its_batch(
    changes: dict[str, Any], small: Small, pictures: Path, tmp_path: Path
) -> None:
    changes = {**changes, "optimizer__clip_grad": None, "optimizer__lr": 1e30, "label_smoothing": 0.0}
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step \d+ \(learning rate \S+\)") as raised:
        train(small(tmp_path / "run", **changes))
    listed = tmp_path / "run" / "diverged.txt"
    assert str(listed) in str(raised.value)
    assert "\n" not in str(raised.value)
    names = listed.read_text(encoding="utf-8").splitlines()
    assert len(set(names)) == 8
    assert all((pictures / "train" / name).is_file() or Path(name).is_file() for name in names)
    assert not (tmp_path / "run" / "model").exists()


# Values and recipes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(clip_grad=0), r"optimizer\.clip_grad=0 is impossible; use a norm above 0"),
        (lambda: DataConfig(mixup=-1), r"data\.mixup=-1 is impossible"),
        (lambda: DataConfig(mixup_prob=2), r"data\.mixup_prob=2 is no probability"),
        (lambda: DataConfig(std=(0.1, 0.0, 0.1)), r"data\.std=\(0\.1, 0\.0, 0\.1\) is impossible"),
        (lambda: TrainConfig(ema_decay=1.0), r"ema_decay=1\.0 is impossible; .* for example 0\.9999"),
        (lambda: TrainConfig(accumulate_grad_batches=0), r"accumulate_grad_batches=0 is impossible; use 1 or more"),
        (
            lambda: TrainConfig(bce_target_thresh=0.2),
            r"bce_target_thresh .* --loss binary_cross_entropy",
        ),
        (
            lambda: TrainConfig(loss="binary_cross_entropy", bce_target_thresh=1.0),
            r"bce_target_thresh=1\.0 is impossible; use 0 up to below 1",
        ),
    ],
)
def test_an_impossible_option_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def built(name: str, overrides: list[str] | None = None) -> tuple[TrainConfig, Any, Any]:
    """A recipe's optimiser and schedule over a small network, ten updates an epoch."""
    config = load_recipe(name, overrides)
    chosen = Classifier(nn.Conv2d(3, 2, 1), ["a", "b"], config, 10).configure_optimizers()
    return config, chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]


def test_imagenet_is_trained_as_the_paper_says() -> None:
    config, optimizer, scheduler = built("imagenet")
    assert (config.model, config.model_args, config.loss) == ("epsanet50_small", {}, "cross_entropy")
    assert (config.schedule.epochs, config.data.batch_size, config.label_smoothing) == (120, 256, 0.1)
    assert type(optimizer) is torch.optim.SGD
    group = optimizer.param_groups[0]
    assert len(optimizer.param_groups) == 1
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    rates = {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 119: 0.0001}
    for epoch, rate in rates.items():
        for update in (0, 9):
            scheduler.step_update(10 * epoch + update)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate), (epoch, update)
    data = config.data
    assert (data.input_size, data.crop_pct, data.hflip, data.scale) == (224, 224 / 256, 0.5, (0.08, 1.0))
    assert (data.auto_augment, data.color_jitter, data.vflip, data.re_prob, data.mixes) == (None, 0, 0, 0, False)


def test_imagenet_modern_is_procedure_a2() -> None:
    config, optimizer, scheduler = built("imagenet-modern")
    assert type(optimizer).__name__.lower() == "lamb"
    assert config.data.batch_size * config.accumulate_grad_batches == 2048
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.02}, "biases go without"
    rates = {0: 1e-4, 25: 1e-4 + (5e-3 - 1e-4) / 2, 3000: 1e-6}
    rates |= {update: 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * update / 3000)) / 2 for update in (50, 1500)}
    for update, rate in rates.items():
        scheduler.step_update(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate), update
    data = config.data
    assert (data.mixup, data.cutmix, data.auto_augment, data.crop_pct) == (0.1, 1.0, "rand-m7-mstd0.5-inc1", 0.95)
    assert data.aug_repeats == 3
    assert (config.loss, config.label_smoothing, config.model_args) == (
        "binary_cross_entropy",
        0.0,
        {"drop_path_rate": 0.05},
    )


@pytest.mark.parametrize("name", ["imagenet", "imagenet-modern", "fashion-mnist"])
def test_a_recipe_builds_its_network_and_augmentation(name: str) -> None:
    from PIL import Image
    from timm.data import resolve_data_config

    from epsanet.data.loaders import evaluation_transform, train_transform
    from epsanet.network.weights import create_model

    config = load_recipe(name)
    with torch.device("meta"):
        model = create_model(config.model, num_classes=10, **config.model_args)
    data = config.data
    size = (3, data.input_size, data.input_size)
    data_config = resolve_data_config({"input_size": size, "mean": data.mean, "std": data.std}, model=model)
    image = Image.new("RGB", (40, 30), "white")
    for transform in (train_transform(data, data_config), evaluation_transform(data_config)):
        assert tuple(transform(image).shape) == size
    if name == "fashion-mnist":
        white = (1 - 0.286) / 0.353
        torch.testing.assert_close(evaluation_transform(data_config)(image), torch.full(size, white))
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates, default=0) == pytest.approx(0.05 if name == "imagenet-modern" else 0)


def test_the_finetune_recipe_wants_a_network_to_start_from(tmp_path: Path, pictures: Path) -> None:
    config = load_recipe("finetune", [f"--data.source={pictures}", f"--output={tmp_path / 'run'}"])
    assert (config.freeze_epochs, config.optimizer.layer_decay) == (2, 0.8)
    with pytest.raises(ValueError, match=r"there is no model 'MODEL': .* give a model folder"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_the_first_picture_names_both_classes_of_a_mixed_image() -> None:
    from epsanet.tasks.run import _target_title

    assert _target_title(torch.tensor([0.0, 1.0, 0.0]), ["ant", "bee", "cow"]) == "bee"
    assert _target_title(torch.tensor([0.02, 0.95, 0.03]), ["ant", "bee", "cow"]) == "bee"
    assert re.fullmatch("70% cow, 30% ant", _target_title(torch.tensor([0.3, 0.0, 0.7]), ["ant", "bee", "cow"]))
