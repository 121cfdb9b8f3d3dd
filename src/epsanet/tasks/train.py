"""The main job: from a configuration to a run folder with a tested model in it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from epsanet._files import atomic_file
from epsanet.data.loaders import TrainLoader, evaluation_loader, train_loader
from epsanet.network.foreign import reason_without_advice
from epsanet.network.weights import load_model, save_model
from epsanet.tasks.callbacks import (
    AtomicCheckpointIO,
    Checkpoint,
    GracefulStop,
    History,
    RandomStates,
    Reporter,
    TrainingInterrupted,
)
from epsanet.tasks.card import model_card
from epsanet.tasks.classification import Classifier, DivergedError
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.console import console, duration, quiet_lightning
from epsanet.tasks.devices import processor_name
from epsanet.tasks.evaluate import evaluate_module
from epsanet.tasks.figures import save_batch, save_confusion_matrix, save_curves
from epsanet.tasks.inference import inference_network
from epsanet.tasks.report import announce, has_tensorboard, next_commands, shown
from epsanet.tasks.run import Run, prepare
from epsanet.tasks.scores import Evaluation

__all__ = ["TrainResult", "TrainingInterrupted", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run leaves."""

    run: Path
    """The run folder."""
    model: Path
    """The model folder in it."""
    split: str
    """The split that was evaluated: test, or val where there is no test split."""
    evaluation: Evaluation
    """Of the best checkpoint on that split."""


def train(config: TrainConfig | None = None, *, resume: str | Path | None = None) -> TrainResult:
    """Train a classifier, test its best checkpoint, and write a run folder.

    The folder holds ``config.yaml``, ``metrics.csv``, TensorBoard events, ``curves.png``, ``confusion_matrix.png``,
    ``train_batch.png``, ``checkpoints/last.ckpt`` and ``best.ckpt``, and the model folder ``model/``.

    Args:
        config: the run; the recipe ``digits``, or the one that is resumed, when left out.
        resume: a run folder to go on from; its last checkpoint restores weights, optimiser, schedule, random states
            and the best score, also within an epoch.

    Raises:
        ValueError: for a configuration that cannot run, before anything is written.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving.
    """
    checkpoint = None
    if resume is not None:
        resume = Path(resume)
        checkpoint = _read_checkpoint(resume)
        config = load_recipe(str(resume / "config.yaml")) if config is None else config
    run = prepare(config or load_recipe(), resume)
    announce(run, resumed=checkpoint is not None)
    _write_start(run)
    history = _fit(run, checkpoint)
    return _finish(run, history)


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoints" / "last.ckpt"
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml; --resume takes a folder made by training")
    if not path.is_file():
        raise ValueError(f"{path} is not there, so there is nothing to resume; start anew without --resume")
    try:
        checkpoint: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(path)
        if not {"state_dict", "optimizer_states", "loops", "callbacks"} <= checkpoint.keys():
            raise ValueError("it is no training checkpoint")
        if any("hyper_parameters" in key for key in checkpoint):  # Lightning can be made to call what they name
            raise ValueError("it holds hyper-parameters, which no training of epsanet writes")
    except Exception as error:  # torch raises what unpickling meets
        best = path.with_name("best.ckpt")
        reason = reason_without_advice(error)
        hint = f"; {best.name} beside it may be sound: copy it over {path.name}" if best.is_file() else ""
        raise ValueError(f"{path} is damaged: {reason}{hint}") from error
    return checkpoint


def _write_start(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(run.config)
    with atomic_file(run.folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _fit(run: Run, checkpoint: dict[str, Any] | None) -> History:
    config = run.config
    loader = train_loader(run.splits.train, config.data, run.data_config, config.seed)
    if len(loader) == 0:
        raise ValueError(f"{config.data.source} has fewer images than one batch; lower --data.batch_size")
    _save_first_batch(run)
    history = History(run.folder / "metrics.csv")
    updates = math.ceil(len(loader) / config.accumulate_grad_batches)
    module = Classifier(run.model, run.splits.class_names, config, updates)
    if config.compile:
        run.model.compile()  # in place, so that names of weights stay as they are
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=run.device.type,
            devices=[run.device.index or 0] if run.device.type == "cuda" else 1,
            precision=config.precision,
            max_epochs=config.schedule.epochs,
            accumulate_grad_batches=config.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.clip_grad,
            logger=TensorBoardLogger(run.folder, name="", version="tensorboard") if has_tensorboard() else False,
            callbacks=[
                # First, so that what is saved after a step has the average of that step.
                *([EMAWeightAveraging(decay=config.ema_decay)] if config.ema_decay is not None else []),
                history,
                Reporter(history),
                RandomStates(),
                GracefulStop(run.checkpoints / "last.ckpt"),
                Checkpoint(
                    run.checkpoints,
                    filename="best",
                    monitor="val_top1",
                    mode="max",
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,
                ),
                # Of its own and after it: save_last=True writes last.ckpt only when there is a new best.
                Checkpoint(
                    run.checkpoints, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
                ),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=min(50, len(loader)),
        )
        try:
            trainer.fit(
                module,
                loader,
                evaluation_loader(run.splits.val, config.data, run.data_config),
                ckpt_path=str(run.checkpoints / "last.ckpt") if checkpoint is not None else None,
            )
        except DivergedError as error:
            raise DivergedError(f"{error}; {_list_images(run, error.images)}", error.images) from error
    return history


def _list_images(run: Run, images: list[str]) -> str:
    """Write down the images of the batch that diverged, and say where."""
    if not images:
        return "its images came from a stream"
    with atomic_file(run.folder / "diverged.txt") as temporary:
        temporary.write_text("\n".join(images) + "\n", encoding="utf-8")
    return f"the {len(images)} images of its batch are listed in {shown(run.folder / 'diverged.txt')}"


def _save_first_batch(run: Run) -> None:
    preview: TrainLoader = train_loader(
        run.splits.train, dataclasses.replace(run.config.data, workers=0), run.data_config, run.config.seed
    )
    images, labels, _ = next(iter(preview))
    names = run.splits.class_names
    mixer = Classifier(run.model, names, run.config).mixer
    targets = F.one_hot(labels, len(names))
    if mixer is not None:
        images, targets = mixer(images, labels, epoch=0, batch=0)
    save_batch(
        run.folder / "train_batch.png",
        images,
        [_target_title(target, names) for target in targets],
        run.data_config["mean"],
        run.data_config["std"],
        "training images as the network sees them",
    )


def _target_title(target: Tensor, names: list[str]) -> str:
    """The class of an image, or ``37 % cat, 63 % dog`` of one that was mixed of two."""
    shares, places = target.float().topk(min(2, len(names)))
    if len(places) < 2 or shares[1] < 0.05:  # the rest is label smoothing
        return names[int(places[0])]
    return ", ".join(
        f"{share:.0%} {names[place]}" for share, place in zip(shares.tolist(), places.tolist(), strict=True)
    )


def _finish(run: Run, history: History) -> TrainResult:
    """Test the best checkpoint and leave it as a model folder."""
    best = AtomicCheckpointIO().load_checkpoint(run.checkpoints / "best.ckpt")
    Classifier(run.model, run.splits.class_names, run.config).load_state_dict(best["state_dict"])
    split = "val" if run.splits.test is None else "test"
    loader = evaluation_loader(getattr(run.splits, split), run.config.data, run.data_config)
    network = inference_network(run.model, run.data_config["input_size"], run.device, run.config.precision)
    module = Classifier(network, run.splits.class_names)
    evaluation = evaluate_module(module, loader, run.device, run.config.precision)
    save_curves(run.folder / "curves.png", history.rows)
    save_confusion_matrix(run.folder / "confusion_matrix.png", evaluation, f"{split} split of {run.splits.name}")
    folder = run.folder / "model"
    run.model.to(device="cpu", memory_format=torch.contiguous_format)
    hardware = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else processor_name()
    card = model_card(
        config=run.config,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        class_names=run.splits.class_names,
        input_size=run.data_config["input_size"],
        licence=run.model.pretrained_cfg.get("license"),
        split=split,
        evaluation=evaluation,
        epoch=best["epoch"] + 1,
        seconds=history.seconds,
        hardware=hardware,
    )
    save_model(folder, run.model, run.splits.class_names, run.data_config, card)
    load_model(folder)  # what was written can be read
    console.print(f"\n{split} {evaluation} with the best checkpoint, of epoch {best['epoch'] + 1}", style="bold")
    waited = f"{100 * history.data_wait:.0f} % of its steps' time waiting for images"
    console.print(f"training took {duration(history.seconds)}, {waited}; the model is in {shown(folder)}\n")
    console.print(next_commands(run, folder, split))
    return TrainResult(run=run.folder, model=folder, split=split, evaluation=evaluation)
