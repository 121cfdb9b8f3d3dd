"""Where a run starts: at the beginning, or at the newest sound checkpoint of a run folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from epsanet.data.loaders import TrainLoader
from epsanet.tasks.checkpoints import newest_sound, read, tidy
from epsanet.tasks.config import TrainConfig, load_recipe
from epsanet.tasks.console import messages
from epsanet.tasks.launch import Processes
from epsanet.tasks.module import TaskModule, fixed_settings
from epsanet.tasks.report import shown

__all__ = ["as_begun", "check_continuation", "find_start", "run_config"]

_REMEDY = "go on with the same, or start anew with another --output"


def run_config(folder: Path) -> Path:
    """The configuration in a run folder.

    Raises:
        ValueError: when it is no run folder.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.yaml; --resume takes a folder made by training")
    return path


def find_start(config: TrainConfig, resume: str | Path | None, processes: Processes) -> tuple[Path | None, Path | None]:
    """The folder and the checkpoint to go on from; damaged checkpoints are named.

    Args:
        config: of the run.
        resume: a run folder, ``"auto"``, or nothing to start anew.
        processes: that will take part.

    Returns:
        The run folder, or nothing where a new one is to be made; and the checkpoint, or nothing to begin at the start.

    Raises:
        ValueError: when there is nothing sound to go on from, it was trained with another number of images a step, or
            another output or start is asked for.
    """
    if resume is None:
        if config.output is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
            raise ValueError("torchrun --max-restarts needs --output, so that restarted processes find their run")
        return None, None
    if resume == "auto" and config.output is None:
        raise ValueError("--resume auto needs --output, the folder of the run to go on with or to start")
    folder = Path(config.output if resume == "auto" else resume).resolve()  # type: ignore[arg-type]
    if resume == "auto" and not (folder / "config.yaml").is_file():
        return None, None
    begun = load_recipe(str(run_config(folder)))
    if resume != "auto":
        _check_place(config, begun, folder)
    try:
        path, checkpoint, notes = newest_sound(folder / "checkpoints")
    except FileNotFoundError as error:
        if resume == "auto":
            messages.print(f"{shown(folder)} has no checkpoint yet; the run starts at its beginning")
            return folder, None
        raise ValueError(
            f"{error}; begin in it with --resume auto --output {shown(folder)}, or remove the folder"
        ) from error
    tidy(folder / "checkpoints")
    for note in notes:
        messages.print(note, style="yellow")
    _check_images_per_step(config, processes, folder, checkpoint.get("images_per_step"))
    return folder, path


def _check_place(config: TrainConfig, begun: TrainConfig, folder: Path) -> None:
    if config.output not in (None, begun.output) and Path(config.output).resolve() != folder:
        raise ValueError(f"--resume goes on in {folder}; leave --output out, or copy the folder and resume the copy")
    if config.init_from != begun.init_from:
        raise ValueError(f"--init_from is for new runs, and {folder} has weights of its own; leave it out")


def as_begun(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration with the network and the preprocessing that the run began with, where it leaves them out.

    They may be those of ``init_from``, where a run that goes on does not look again.

    Args:
        config: of the run that goes on.
        folder: its run folder.

    Raises:
        ValueError: when the configuration in the folder cannot be read.
    """
    begun = load_recipe(str(run_config(folder)))
    if config.model == "auto":
        config = replace(config, model=begun.model, model_args={**begun.model_args, **config.model_args})
    names = ("input_size", "crop_pct", "interpolation", "mean", "std")
    left_out = {name: getattr(begun.data, name) for name in names if getattr(config.data, name) is None}
    return replace(config, data=replace(config.data, **left_out))


def check_continuation(checkpoint: Path, module: TaskModule, loader: TrainLoader) -> None:
    """Make sure that what is to go on is the run that a checkpoint is of.

    Args:
        checkpoint: to go on from; what it does not note is not compared.
        module: what would be trained.
        loader: of the images to train on.

    Raises:
        ValueError: when classes, the name or shape of a weight, or settings that a run keeps are others; when more
            epochs are done than asked for; when an epoch would go on with another number of images, or a stream's with
            other workers or processes.
    """
    found, folder = read(checkpoint), checkpoint.parent.parent
    assert module.config is not None
    _check_classes(folder, found.get("class_names", module.class_names), module.class_names)
    before, now = ({name: tuple(t.shape) for name, t in x.items()} for x in (found["state_dict"], module.state_dict()))
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if other:
        raise ValueError(
            f"{folder} was trained with another network or other classes: {len(other)} weights differ, first "
            f"{other[0]}; {_REMEDY}"
        )
    settings = found.get("settings", found.get("optimizer", {}))  # some checkpoints have the optimiser's only
    for name, value in fixed_settings(module.config).items():
        was = settings.get(name, value)
        if was != value:
            raise ValueError(f"{folder} was trained with {name}={was}, not {value}; {_REMEDY}")
    epochs, done = module.config.schedule.epochs, len(found["callbacks"]["History"]["rows"])
    if epochs < done:
        raise ValueError(
            f"{folder} has {done} epochs behind it, and schedule.epochs={epochs} is fewer; use {done} or more"
        )
    if not found["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"]:
        return
    images = len(loader.dataset.samples)  # type: ignore[attr-defined]
    was = found.get("train_images", images)
    if was != images:
        raise ValueError(
            f"{folder} was stopped within an epoch of {was:,} training images, and here are {images:,}: their order "
            f"would not go on; {_REMEDY}"
        )
    parts = found.get("stream_parts", loader.parts)
    if parts is not None and parts != loader.parts:
        processes, workers = parts
        raise ValueError(
            f"{folder} was stopped within an epoch of a stream that {processes} × {workers} workers read: use "
            f"--data.workers {workers} and as many processes, or images would be repeated and left out"
        )


def _check_classes(folder: Path, before: list[str], now: list[str]) -> None:
    if len(before) != len(now):
        raise ValueError(f"{folder} was trained with {len(before)} classes, not {len(now)}; {_REMEDY}")
    for place, (was, name) in enumerate(zip(before, now, strict=True)):
        if was != name:
            raise ValueError(f"{folder} was trained with {was!r} as class {place}, not {name!r}; {_REMEDY}")


def _check_images_per_step(config: TrainConfig, processes: Processes, folder: Path, before: int | None) -> None:
    count = processes.world_size
    if before == config.data.batch_size * count:
        return
    now = f"{config.data.batch_size * count} ({count} × --data.batch_size {config.data.batch_size})"
    remedy = f"use --data.batch_size {before // count}" if before and before % count == 0 else "start as many processes"
    raise ValueError(
        f"{folder} was trained with {before} images a step, and this would be {now}: the order of the images and the "
        f"learning rates would not go on; {remedy}"
    )
