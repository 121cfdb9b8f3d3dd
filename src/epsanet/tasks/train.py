"""The main job: from a configuration to a run folder with a tested model in it."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from epsanet._files import atomic_file
from epsanet._processes import agree, first, gather, in_company, rank
from epsanet.data.images import printable
from epsanet.data.loaders import TrainLoader
from epsanet.tasks.callbacks import (
    History,
    LastCheckpoint,
    RandomStates,
    Reporter,
    TrainingInterrupted,
)
from epsanet.tasks.checkpoints import BEST, LAST, AtomicCheckpointIO, BestCheckpoint, DamagedCheckpointError, read
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.console import console, duration, messages, quiet_lightning
from epsanet.tasks.devices import processor_name, resolve_device
from epsanet.tasks.evaluate import evaluate_module, interruptible
from epsanet.tasks.launch import Processes, environment, launch
from epsanet.tasks.module import DivergedError
from epsanet.tasks.report import announce, has_tensorboard, next_commands, shown
from epsanet.tasks.resume import as_begun, check_continuation, find_start, run_config
from epsanet.tasks.run import Run, prepare
from epsanet.tasks.scores import Evaluation

if TYPE_CHECKING:
    from epsanet.tasks.detection.scores import DetectionEvaluation

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
    evaluation: Evaluation | DetectionEvaluation
    """Of the best checkpoint on that split."""


def train(config: TrainConfig | None = None, *, resume: str | Path | None = None) -> TrainResult:
    """Train a classifier, or a detector where ``config.detector`` says which; test its best checkpoint.

    The run folder holds ``config.yaml``, ``metrics.csv``, TensorBoard events, ``curves.png``, ``confusion_matrix.png``,
    ``train_batch.png``, ``checkpoints/`` with ``last.ckpt``, ``previous.ckpt`` and ``best.ckpt``, and the model folder
    ``model/``; that of a detector ``val_batch.png``, ``precision_recall.png`` and ``worst.png`` too. With several
    processes, each calls this, and the first writes.

    Args:
        config: the run; the recipe ``digits``, or the one that is resumed, when left out.
        resume: a run folder to go on from; its newest sound checkpoint restores weights, optimiser, schedule, random
            states and the best score, also within an epoch. ``"auto"``: go on in ``config.output`` if a run is there,
            else start it; this is what a worker does that torchrun has restarted.

    Raises:
        ValueError: for a configuration that cannot run, before anything is written.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after saving.
        KeyboardInterrupt: on a second Ctrl-C.
    """
    if config is None:
        config = load_recipe() if resume in (None, "auto") else load_recipe(str(run_config(Path(str(resume)))))
    processes = launch(resolve_device(config.device), config.devices, config.nodes)
    with in_company():
        if resume is None and any(gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)):
            resume = "auto"
        folder, checkpoint = first(lambda: find_start(config, resume, processes))
        run = _prepare(config, processes, folder, resumed=checkpoint is not None)
        loader = agree(lambda: _train_loader(run))
        if checkpoint is not None:
            first(lambda: check_continuation(checkpoint, run.module(), loader))
        announce(run, resumed=checkpoint is not None)
        agree(lambda: _write_start(run) if rank() == 0 else None)
        history = _fit(run, loader, checkpoint)
        try:
            return _finish(run, history)
        except KeyboardInterrupt as stop:
            again = f"epsanet train --resume {shlex.quote(shown(run.folder))}"
            raise TrainingInterrupted(f"stopped after the last epoch, which is saved; go on with: {again}") from stop


def _prepare(config: TrainConfig, processes: Processes, folder: Path | None, *, resumed: bool) -> Run:
    if resumed:
        assert folder is not None
        config = first(lambda: as_begun(config, folder))
    if config.detector is None:
        return prepare(config, processes, folder, resumed=resumed)
    from epsanet.tasks.detection.run import prepare_detection  # its libraries take a second to import

    return prepare_detection(config, processes, folder, resumed=resumed)


def _train_loader(run: Run) -> TrainLoader:
    """The loader, when it gives batches that can be trained on."""
    loader, config = run.train_loader(), run.config.data
    if len(loader) == 0:
        raise ValueError(f"{config.source} has fewer images than one batch; lower --data.batch_size")
    size: int = loader.batch_sampler.batch_size  # type: ignore[union-attr]
    if config.mixes and size % 2:
        raise ValueError(
            f"mixup and cutmix pair the images of a batch, and one of {config.source} has {size}; use an even "
            "--data.batch_size below that, or leave them out"
        )
    return loader


def _write_start(run: Run) -> None:
    """The configuration, and what the network will see."""
    run.folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(run.config)
    with atomic_file(run.folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    run.draw_first_batch()


def _fit(run: Run, loader: TrainLoader, checkpoint: Path | None) -> History:
    config = run.config
    history = History(run.folder / "metrics.csv")
    module = run.module(math.ceil(len(loader) / config.accumulate_grad_batches))
    if config.compile:
        run.model.compile()  # in place, so that names of weights stay as they are
    with quiet_lightning(), interruptible():
        trainer = lightning.Trainer(
            # A detector's head that has nothing to learn from a batch has no gradient either.
            **run.processes.trainer_arguments(frozen=config.freeze_epochs > 0 or config.detector is not None),
            precision=config.precision,
            max_epochs=config.schedule.epochs,
            accumulate_grad_batches=config.accumulate_grad_batches,
            gradient_clip_val=config.optimizer.clip_grad,
            default_root_dir=run.folder,  # in a SLURM job Lightning looks there for checkpoints that nobody named
            logger=TensorBoardLogger(run.folder, name="", version="tensorboard") if has_tensorboard() else False,
            callbacks=[
                # First, so that what is saved after a step has the average of that step.
                *([_moving_average(config.ema_decay)] if config.ema_decay is not None else []),
                history,
                Reporter(history),
                RandomStates(),
                BestCheckpoint(run.checkpoints, module.monitor),
                LastCheckpoint(run.checkpoints / LAST, config.train_time_interval),
            ],
            plugins=[*environment(), AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=min(50, len(loader)),
        )
        try:
            trainer.fit(
                module,
                loader,
                run.evaluation_loader("val"),
                ckpt_path=None if checkpoint is None else str(checkpoint),
            )
        except DivergedError as error:
            raise DivergedError(f"{error}; {_list_images(run, error.images)}", error.images) from error
    return history


def _moving_average(decay: float) -> WeightAveraging:
    """Lightning's, over all tensors at once: one at a time, they take as long as the optimiser or longer."""
    return WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(decay))


def _list_images(run: Run, images: list[str]) -> str:
    """Write down the images of the batch that diverged, and say where."""
    if not images:
        return "its images came from a stream"
    with atomic_file(run.folder / "diverged.txt") as temporary:
        temporary.write_text("\n".join(map(printable, images)) + "\n", encoding="utf-8")
    return f"the {len(images)} images of its batch are listed in {shown(run.folder / 'diverged.txt')}"


def _finish(run: Run, history: History) -> TrainResult:
    """Test the best checkpoint and leave it as a model folder."""
    epoch, weights = first(lambda: _best(run))
    run.module().load_state_dict(weights)
    split = "val" if run.splits.test is None else "test"
    loader = run.evaluation_loader(split)
    evaluation = evaluate_module(run.inference_module(), loader, run.processes, run.config.precision)
    result = TrainResult(run=run.folder, model=run.folder / "model", split=split, evaluation=evaluation)
    if rank() == 0:
        _write_result(run, result, history, epoch)
    return result


def _best(run: Run) -> tuple[int, dict[str, Tensor]]:
    """Number and weights of the best epoch, or of the last where its checkpoint is gone."""
    try:
        best = read(run.checkpoints / BEST)
    except (OSError, DamagedCheckpointError) as error:  # only last.ckpt was copied, say, and no later epoch was better
        messages.print(f"{error}; the last epoch is taken for the best")
        best = read(run.checkpoints / LAST)
    return best["epoch"] + 1, best["state_dict"]


def _write_result(run: Run, result: TrainResult, history: History, epoch: int) -> None:
    """Pictures, the model folder, and what to do with it."""
    run.draw_results(result.evaluation, result.split, history.rows)
    device = run.processes.device
    run.save_model(
        result.model,
        split=result.split,
        evaluation=result.evaluation,
        epoch=epoch,
        seconds=history.seconds,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
    )
    console.print(f"\n{result.split} {result.evaluation} with the best checkpoint, of epoch {epoch}", style="bold")
    waited = f"{100 * history.data_wait:.0f} % of its steps' time waiting for images"
    console.print(f"training took {duration(history.seconds)}, {waited}; the model is in {shown(result.model)}\n")
    console.print(next_commands(run, result.model, result.split))
