"""Where a run starts: at the beginning, or at the newest sound checkpoint of a run folder."""

from __future__ import annotations

import os
from pathlib import Path

from epsanet.tasks.checkpoints import newest_sound, read, tidy
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import messages
from epsanet.tasks.launch import Processes
from epsanet.tasks.module import TaskModule, fixed_settings
from epsanet.tasks.report import shown

__all__ = ["check_continuation", "find_start", "run_config"]


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
        ValueError: when there is nothing sound to go on from, or it was trained with another number of images a step.
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
    run_config(folder)
    try:
        path, checkpoint, notes = newest_sound(folder / "checkpoints")
    except FileNotFoundError as error:
        if resume == "auto":
            messages.print(f"{shown(folder)} has no checkpoint yet; the run starts at its beginning")
            return folder, None
        raise ValueError(f"{error}; start anew without --resume") from error
    tidy(folder / "checkpoints")
    for note in notes:
        messages.print(note, style="yellow")
    _check_images_per_step(config, processes, folder, checkpoint.get("images_per_step"))
    return folder, path


def check_continuation(checkpoint: Path, module: TaskModule) -> None:
    """Make sure that a checkpoint is of the network and the optimiser that are to go on.

    Args:
        checkpoint: to go on from.
        module: what would be trained.

    Raises:
        ValueError: when a weight has another name or shape, or the optimiser other settings than its state has.
    """
    found, folder = read(checkpoint), checkpoint.parent.parent
    before, now = ({name: tuple(t.shape) for name, t in x.items()} for x in (found["state_dict"], module.state_dict()))
    other = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if other:
        raise ValueError(
            f"{folder} was trained with another network or other classes: {len(other)} weights differ, first "
            f"{other[0]}; go on with the same, or start anew with another --output"
        )
    assert module.config is not None
    for name, value in fixed_settings(module.config).items():
        was = found.get("optimizer", {}).get(name, value)
        if was != value:
            raise ValueError(
                f"{folder} was trained with {name}={was}, not {value}; go on with the same, or start anew with another "
                "--output"
            )


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
