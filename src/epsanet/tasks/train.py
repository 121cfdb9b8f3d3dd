"""The main job: from a configuration to a run folder with a tested model in it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table
from timm.data import resolve_data_config

from epsanet._files import atomic_file
from epsanet.data.check import CheckReport, check_images
from epsanet.data.config import DataConfig
from epsanet.data.loaders import (
    TrainLoader,
    evaluation_loader,
    evaluation_transform,
    train_loader,
    train_transform,
    worker_count,
)
from epsanet.data.sources import DataSplits, Stream, open_data
from epsanet.network.weights import create_model, load_model, save_model
from epsanet.tasks.callbacks import (
    AtomicCheckpointIO,
    GracefulStop,
    History,
    RandomStates,
    Reporter,
    TrainingInterrupted,
)
from epsanet.tasks.card import model_card
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.console import console, duration, messages, track
from epsanet.tasks.devices import processor_name, resolve_device
from epsanet.tasks.figures import save_batch, save_confusion_matrix, save_curves
from epsanet.tasks.scores import Evaluation

__all__ = ["TrainResult", "TrainingInterrupted", "quiet_lightning", "train"]


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


@dataclass(kw_only=True)
class _Run:
    """Everything that is ready before the first step."""

    config: TrainConfig
    device: torch.device
    splits: DataSplits
    reports: list[CheckReport]
    model: Any
    data_config: dict[str, Any]
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


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
    run = _prepare(config or load_recipe(), resume)
    _announce(run, resumed=checkpoint is not None)
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
    except Exception as error:  # torch raises what unpickling meets
        best = path.with_name("best.ckpt")
        hint = f"; {best.name} beside it may be sound: copy it over {path.name}" if best.is_file() else ""
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}{hint}") from error
    return checkpoint


def _prepare(config: TrainConfig, resume: Path | None) -> _Run:
    """Everything that can fail for the user's reasons, before anything is written."""
    folder = _run_folder(config, resume)
    device = resolve_device(config.device)
    _require_tensorboard()
    splits = open_data(config.data)
    if not isinstance(splits.train, Stream) and len(splits.train) < 2:
        raise ValueError(f"{config.data.source} has {len(splits.train)} image to train on; two are the least")
    lightning.seed_everything(config.seed, verbose=False)
    model = create_model(config.model, **{"num_classes": len(splits.class_names), **config.model_args})
    if getattr(model, "num_classes", None) != len(splits.class_names):
        raise ValueError(
            f"{config.model} was given num_classes={model.num_classes} for {len(splits.class_names)} classes"
        )
    data_config = _resolve_data_config(config, model)
    Classifier(model, splits.class_names, config).configure_optimizers()  # says what timm does not have
    _build_transforms(config, data_config)
    reports = _check(splits, config)
    return _Run(
        config=config,
        device=device,
        splits=splits,
        reports=reports,
        model=model,
        data_config=data_config,
        folder=folder,
    )


def _run_folder(config: TrainConfig, resume: Path | None) -> Path:
    if resume is not None:
        return resume.resolve()
    if config.output is None:
        name = Path(config.data.source).name or "run"
        return (Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    folder = Path(config.output).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{config.output} is there already; choose another --output, or go on with --resume {config.output}"
        )
    return folder


def _require_tensorboard() -> None:
    from epsanet.data.sources import require

    require("tensorboard", "tensorboard")


def _resolve_data_config(config: TrainConfig, model: Any) -> dict[str, Any]:
    data = config.data
    wanted: dict[str, Any] = {"crop_pct": data.crop_pct, "interpolation": data.interpolation}
    if data.input_size is not None:
        wanted["input_size"] = (3, data.input_size, data.input_size)
    return resolve_data_config({key: value for key, value in wanted.items() if value is not None}, model=model)


def _build_transforms(config: TrainConfig, data_config: dict[str, Any]) -> None:
    try:
        train_transform(config.data, data_config)
        evaluation_transform(data_config)
    except (AssertionError, KeyError, ValueError) as error:
        wanted = f"auto_augment={config.data.auto_augment!r}, interpolation={data_config['interpolation']!r}"
        raise ValueError(f"timm cannot build the augmentation of {wanted}: {error!r}") from error


def _check(splits: DataSplits, config: TrainConfig) -> list[CheckReport]:
    """Check every split in place; streams are read only when trained on."""
    reports = []
    for title in ("train", "val", "test"):
        split = getattr(splits, title)
        if split is None or isinstance(split, Stream):
            continue
        kept, report = check_images(
            split,
            title,
            on_bad_image=config.data.on_bad_image,
            depth=config.data.check,
            progress=lambda items, total, title=title: track(items, total, f"checking {title}"),  # type: ignore[misc]
        )
        setattr(splits, title, kept)
        reports.append(report)
        for name, reason in report.bad.items():
            messages.print(f"skipped {name}: {reason}", style="yellow")
    return reports


def _announce(run: _Run, *, resumed: bool) -> None:
    config, splits = run.config, run.splits
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    table = Table.grid(padding=(0, 2))
    height, width = run.data_config["input_size"][1:]
    table.add_row("network", f"{config.model}, {parameters:,} parameters, input {height}×{width}")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    table.add_row("device", f"{run.device}{threads}, precision {config.precision}")
    table.add_row("batch", f"{config.data.batch_size} images, {worker_count(config.data)} workers")
    schedule, optimizer = config.schedule, config.optimizer
    table.add_row("training", f"{schedule.epochs} epochs, {optimizer.opt}, lr {optimizer.lr:g} {schedule.sched}")
    names = splits.class_names
    table.add_row("classes", f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}")
    for report in run.reports:
        table.add_row(report.title, str(report))
    for title in ("train", "val", "test"):
        split = getattr(splits, title)
        if isinstance(split, Stream):
            table.add_row(title, f"{len(split):,} images in shards, read as they come")
    for note in splits.notes:
        table.add_row("note", note)
    table.add_row("run folder", _shown(run.folder) + (" (resumed)" if resumed else ""))
    console.print(table)


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _data_flags(data: DataConfig) -> str:
    """The flags that name the same data set again."""
    flags = [f"--data {shlex.quote(data.source)}"]
    for name in (
        "root",
        "train_split",
        "val_split",
        "test_split",
        "val_fraction",
        "image_key",
        "label_key",
        "class_names",
    ):
        value = getattr(data, name)
        if value != getattr(DataConfig, name):
            flags.append(f"--data.{name} {shlex.quote(str(value))}")
    return " ".join(flags)


def _write_start(run: _Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(run.config)
    with atomic_file(run.folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _fit(run: _Run, checkpoint: dict[str, Any] | None) -> History:
    config = run.config
    loader = train_loader(run.splits.train, config.data, run.data_config, config.seed)
    if len(loader) == 0:
        raise ValueError(f"{config.data.source} has fewer images than one batch; lower --data.batch_size")
    _save_first_batch(run)
    history = History(run.folder / "metrics.csv")
    if checkpoint is not None:
        # Lightning gives a loader its state only when it stopped within an epoch.
        loader.load_state_dict(checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0])
    module = Classifier(run.model, run.splits.class_names, config, len(loader))
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=run.device.type,
            devices=[run.device.index or 0] if run.device.type == "cuda" else 1,
            precision=config.precision,
            max_epochs=config.schedule.epochs,
            logger=TensorBoardLogger(run.folder, name="", version="tensorboard"),
            callbacks=[
                history,
                Reporter(history),
                RandomStates(),
                GracefulStop(run.checkpoints / "last.ckpt"),
                ModelCheckpoint(
                    run.checkpoints,
                    filename="best",
                    monitor="val_top1",
                    mode="max",
                    save_last=True,
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,
                ),
            ],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=min(50, len(loader)),
        )
        trainer.fit(
            module,
            loader,
            evaluation_loader(run.splits.val, config.data, run.data_config),
            ckpt_path=str(run.checkpoints / "last.ckpt") if checkpoint is not None else None,
        )
    return history


def _save_first_batch(run: _Run) -> None:
    preview: TrainLoader = train_loader(
        run.splits.train, dataclasses.replace(run.config.data, workers=0), run.data_config, run.config.seed
    )
    images, labels, _ = next(iter(preview))
    save_batch(
        run.folder / "train_batch.png",
        images,
        [run.splits.class_names[label] for label in labels.tolist()],
        run.data_config["mean"],
        run.data_config["std"],
        "training images as the network sees them",
    )


def _finish(run: _Run, history: History) -> TrainResult:
    """Test the best checkpoint and leave it as a model folder."""
    from epsanet.tasks.evaluate import evaluate_module

    best = AtomicCheckpointIO().load_checkpoint(run.checkpoints / "best.ckpt")
    module = Classifier(run.model, run.splits.class_names, run.config)
    module.load_state_dict(best["state_dict"])
    split = "val" if run.splits.test is None else "test"
    loader = evaluation_loader(getattr(run.splits, split), run.config.data, run.data_config)
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
        split=split,
        evaluation=evaluation,
        epoch=best["epoch"] + 1,
        seconds=history.seconds,
        hardware=hardware,
    )
    save_model(folder, run.model, run.splits.class_names, run.data_config, card)
    load_model(folder)  # what was written can be read
    console.print(f"\n{split} {evaluation} with the best checkpoint, of epoch {best['epoch'] + 1}", style="bold")
    console.print(f"training took {duration(history.seconds)}; the model is in {_shown(folder)}\n")
    model, flags = shlex.quote(_shown(folder)), _data_flags(run.config.data)
    console.print(f"evaluate  epsanet evaluate {model} {flags}{' --split val' if split == 'val' else ''}")
    console.print(f"predict   epsanet predict {model} IMAGES")
    console.print(f"resume    epsanet train --resume {shlex.quote(_shown(run.folder))}")
    return TrainResult(run=run.folder, model=folder, split=split, evaluation=evaluation)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's advice, hidden where it is about choices made on purpose."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
            yield
    finally:
        logger.setLevel(level)
