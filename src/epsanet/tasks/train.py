"""The main job: from a configuration to a run folder with a tested model in it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from epsanet._files import atomic_file
from epsanet._processes import agree, first, gather, in_company, rank
from epsanet.data.loaders import TrainLoader, evaluation_loader, train_loader
from epsanet.network.weights import load_model, save_model
from epsanet.tasks.callbacks import (
    History,
    LastCheckpoint,
    RandomStates,
    Reporter,
    TrainingInterrupted,
)
from epsanet.tasks.card import model_card
from epsanet.tasks.checkpoints import BEST, LAST, AtomicCheckpointIO, BestCheckpoint, read
from epsanet.tasks.classification import Classifier, DivergedError
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.console import console, duration, quiet_lightning
from epsanet.tasks.devices import processor_name, resolve_device
from epsanet.tasks.evaluate import evaluate_module
from epsanet.tasks.figures import save_batch, save_confusion_matrix, save_curves
from epsanet.tasks.inference import inference_network
from epsanet.tasks.launch import launch
from epsanet.tasks.report import announce, has_tensorboard, next_commands, shown
from epsanet.tasks.resume import find_start, run_config
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
    ``train_batch.png``, ``checkpoints/`` with ``last.ckpt``, ``previous.ckpt`` and ``best.ckpt``, and the model folder
    ``model/``. With several processes, each calls this, and the first writes.

    Args:
        config: the run; the recipe ``digits``, or the one that is resumed, when left out.
        resume: a run folder to go on from; its newest sound checkpoint restores weights, optimiser, schedule, random
            states and the best score, also within an epoch. ``"auto"``: go on in ``config.output`` if a run is there,
            else start it; this is what a worker does that torchrun has restarted.

    Raises:
        ValueError: for a configuration that cannot run, before anything is written.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving.
    """
    if config is None:
        config = load_recipe() if resume in (None, "auto") else load_recipe(str(run_config(Path(str(resume)))))
    processes = launch(resolve_device(config.device), config.devices, config.nodes)
    with in_company():
        if resume is None and any(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)):
            resume = "auto"
        folder, checkpoint = first(lambda: find_start(config, resume, processes))
        run = prepare(config, processes, folder, resumed=checkpoint is not None)
        announce(run, resumed=checkpoint is not None)
        agree(lambda: _write_start(run) if rank() == 0 else None)
        history = _fit(run, checkpoint)
        return _finish(run, history)


def _write_start(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(run.config)
    with atomic_file(run.folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _training_batches(run: Run) -> TrainLoader:
    """The loader, after the first process has drawn a first batch."""
    loader = train_loader(run.splits.train, run.config.data, run.data_config, run.config.seed)
    if len(loader) == 0:
        raise ValueError(f"{run.config.data.source} has fewer images than one batch; lower --data.batch_size")
    if rank() == 0:
        _save_first_batch(run)
    return loader


def _fit(run: Run, checkpoint: Path | None) -> History:
    config = run.config
    loader = agree(lambda: _training_batches(run))
    history = History(run.folder / "metrics.csv")
    updates = math.ceil(len(loader) / config.accumulate_grad_batches)
    module = Classifier(run.model, run.splits.class_names, config, updates)
    if config.compile:
        run.model.compile()  # in place, so that names of weights stay as they are
    with quiet_lightning():
        trainer = lightning.Trainer(
            **run.processes.trainer_arguments(frozen=config.freeze_epochs > 0),
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
                BestCheckpoint(run.checkpoints),
                LastCheckpoint(run.checkpoints / LAST, config.train_time_interval),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=min(50, len(loader)),
        )
        try:
            trainer.fit(
                module,
                loader,
                evaluation_loader(run.splits.val, config.data, run.data_config),
                ckpt_path=None if checkpoint is None else str(checkpoint),
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
    epoch, weights = first(lambda: _best(run))
    Classifier(run.model, run.splits.class_names, run.config).load_state_dict(weights)
    split = "val" if run.splits.test is None else "test"
    loader = evaluation_loader(getattr(run.splits, split), run.config.data, run.data_config)
    network = inference_network(run.model, run.data_config["input_size"], run.processes.device, run.config.precision)
    module = Classifier(network, run.splits.class_names)
    evaluation = evaluate_module(module, loader, run.processes, run.config.precision)
    result = TrainResult(run=run.folder, model=run.folder / "model", split=split, evaluation=evaluation)
    if rank() == 0:
        _write_result(run, result, history, epoch)
    return result


def _best(run: Run) -> tuple[int, dict[str, Tensor]]:
    """Number and weights of the best epoch."""
    best = read(run.checkpoints / BEST)
    return best["epoch"] + 1, best["state_dict"]


def _write_result(run: Run, result: TrainResult, history: History, epoch: int) -> None:
    """Pictures, the model folder, and what to do with it."""
    title = f"{result.split} split of {run.splits.name}"
    save_curves(run.folder / "curves.png", history.rows)
    save_confusion_matrix(run.folder / "confusion_matrix.png", result.evaluation, title)
    run.model.to(device="cpu", memory_format=torch.contiguous_format)
    device = run.processes.device
    card = model_card(
        config=run.config,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        class_names=run.splits.class_names,
        input_size=run.data_config["input_size"],
        licence=run.model.pretrained_cfg.get("license"),
        split=result.split,
        evaluation=result.evaluation,
        epoch=epoch,
        seconds=history.seconds,
        processes=run.processes.world_size,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
    )
    save_model(result.model, run.model, run.splits.class_names, run.data_config, card)
    load_model(result.model)  # what was written can be read
    console.print(f"\n{result.split} {result.evaluation} with the best checkpoint, of epoch {epoch}", style="bold")
    waited = f"{100 * history.data_wait:.0f} % of its steps' time waiting for images"
    console.print(f"training took {duration(history.seconds)}, {waited}; the model is in {shown(result.model)}\n")
    console.print(next_commands(run, result.model, result.split))
