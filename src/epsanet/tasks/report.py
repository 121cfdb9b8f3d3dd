"""What a run says of itself before the first step and after the last."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import torch
from rich.table import Table

from epsanet._processes import cores
from epsanet.data.config import DataConfig
from epsanet.data.loaders import worker_count
from epsanet.data.streams import Stream
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import console, counted
from epsanet.tasks.run import Run

__all__ = ["announce", "data_advice", "has_tensorboard", "next_commands", "shown"]

MUCH_WAITING = 0.2
"""From this share of a step on, waiting for images is worth a line."""


def announce(run: Run, *, resumed: bool) -> None:
    """Print the banner: network, device, batch, classes, and what the data check found."""
    config, splits = run.config, run.splits
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    table = Table.grid(padding=(0, 2))
    height, width = run.data_config["input_size"][1:]
    table.add_row("network", f"{run.title}, {parameters:,} parameters, input {height}×{width}")
    if run.start is not None:
        table.add_row("starts from", f"{config.init_from}: {run.start}")
    device, count, batch = run.processes.device, run.processes.world_size, config.data.batch_size
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    table.add_row("device", f"{device}{threads}, precision {config.precision}")
    if count > 1:
        table.add_row("processes", f"{count:,} on {counted(run.processes.nodes, 'node')}; of each:")
    several = f", {config.accumulate_grad_batches} batches a step" if config.accumulate_grad_batches > 1 else ""
    together = f" ({batch * count:,} together)" if count > 1 else ""
    table.add_row(
        "batch", f"{counted(batch, 'image')}{together}{several}, {counted(worker_count(config.data), 'worker')}"
    )
    schedule, optimizer = config.schedule, config.optimizer
    frozen = f", the first {config.freeze_epochs} for the classifier only" if config.freeze_epochs else ""
    table.add_row(
        "training",
        f"{counted(schedule.epochs, 'epoch')}{frozen}, {optimizer.opt}, lr {optimizer.lr:g} {schedule.sched}",
    )
    names = splits.class_names
    table.add_row("classes", f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}")
    for report in run.reports:
        table.add_row(report.title, str(report))
    for title in ("train", "val", "test"):
        split = getattr(splits, title)
        if isinstance(split, Stream):
            table.add_row(title, f"{len(split):,} images, read as they come")
    for note in splits.notes:
        table.add_row("note", note)
    if not has_tensorboard():
        table.add_row("note", "no TensorBoard events without: pip install 'epsanet[tensorboard]'")
    table.add_row("run folder", shown(run.folder) + (" (resumed)" if resumed else ""))
    console.print(table)


def data_advice(share: float, data: DataConfig) -> str:
    """What to do about steps that wait for images.

    Args:
        share: of the time of a step that is spent waiting, 0 to 1.
        data: how images are loaded.
    """
    workers, available = worker_count(data), len(cores())
    if workers < available:
        advice = f"more loader processes may help: --data.workers {available}"
    else:
        advice = f"{counted(available, 'core')} cannot load faster; images stored at about the input size decode faster"
    return f"{100 * share:.0f} % of the time of a step is spent waiting for images; {advice}"


def has_tensorboard() -> bool:
    """Whether the optional library that writes TensorBoard events is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def shown(path: Path) -> str:
    """A path as it is typed: relative where it lies in the working directory."""
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
        "train_fraction",
        "streaming",
        "image_key",
        "label_key",
        "class_names",
    ):
        value = getattr(data, name)
        if value != getattr(DataConfig, name):
            flags.append(f"--data.{name} {shlex.quote(str(value))}")
    return " ".join(flags)


def next_commands(run: Run, model: Path, split: str) -> str:
    """The command lines that evaluate, use and resume a run.

    Args:
        run: the run.
        model: its model folder.
        split: that was evaluated, test or val.
    """
    folder, flags = shlex.quote(shown(model)), _data_flags(run.config.data)
    flags += " --split val" if split == "val" else ""
    for name in ("device", "precision"):  # with others, the numbers are not quite those of the run
        value = getattr(run.config, name)
        if value != getattr(TrainConfig, name):
            flags += f" --{name} {value}"
    return (
        f"evaluate  epsanet evaluate {folder} {flags}\n"
        f"predict   epsanet predict {folder} IMAGES\n"
        f"resume    epsanet train --resume {shlex.quote(shown(run.folder))}"
    )
