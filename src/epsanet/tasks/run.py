"""What must be right before the first step: data, network, device, augmentation, and where the run goes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm

from epsanet._processes import agree, first, rank, world_size
from epsanet.data.check import CheckReport, check_images
from epsanet.data.loaders import evaluation_transform, train_transform
from epsanet.data.sources import DataSplits, open_data
from epsanet.data.streams import Stream
from epsanet.network.weights import create_model
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import messages, track
from epsanet.tasks.launch import Processes

__all__ = ["Run", "prepare"]


@dataclass(kw_only=True)
class Run:
    """Everything that is ready before the first step."""

    config: TrainConfig
    """As it was asked for."""
    processes: Processes
    """Where they compute."""
    splits: DataSplits
    """Images that can be read."""
    reports: list[CheckReport]
    """What the check found."""
    model: Any
    """The network, with its first weights."""
    data_config: dict[str, Any]
    """timm's preprocessing."""
    folder: Path
    """The run folder."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"


def prepare(config: TrainConfig, processes: Processes, folder: Path | None) -> Run:
    """Everything that can fail for the user's reasons, before anything is written.

    Args:
        config: of the run.
        processes: that take part; each has to call this.
        folder: the run folder where it is known and this run's own; found or refused when left out.

    Raises:
        ValueError: for what cannot run, in all processes where it is so in one.
    """
    folder = folder or first(lambda: _run_folder(config))
    splits = _open_data(config)
    model, data_config = agree(lambda: _build(config, processes, splits))
    reports = agree(lambda: _check(splits, config))
    if rank():  # each process has its own noise, of dropout for example, but all have the same first weights
        lightning.seed_everything((config.seed + rank()) % 2**32, verbose=False)
    return Run(
        config=config,
        processes=processes,
        splits=splits,
        reports=reports,
        model=model,
        data_config=data_config,
        folder=folder,
    )


def _open_data(config: TrainConfig) -> DataSplits:
    """The first process of each node goes first: it may have to download or to unpack."""
    early = int(os.environ.get("LOCAL_RANK", 0)) == 0
    splits = agree(lambda: open_data(config.data) if early else None)
    return agree(lambda: splits or open_data(config.data))


def _build(config: TrainConfig, processes: Processes, splits: DataSplits) -> tuple[Any, dict[str, Any]]:
    """The network and its preprocessing; says what timm does not have."""
    if not isinstance(splits.train, Stream) and len(splits.train) < 2:
        raise ValueError(f"{config.data.source} has {len(splits.train)} image to train on; two are the least")
    lightning.seed_everything(config.seed, verbose=False)
    model = create_model(config.model, **{"num_classes": len(splits.class_names), **config.model_args})
    if getattr(model, "num_classes", None) != len(splits.class_names):
        raise ValueError(
            f"{config.model} was given num_classes={model.num_classes} for {len(splits.class_names)} classes"
        )
    data_config = _resolve_data_config(config, model)
    Classifier(model, splits.class_names, config).configure_optimizers()
    _build_transforms(config, data_config)
    if config.sync_batchnorm:
        if processes.device.type != "cuda":
            raise ValueError(f"sync_batchnorm=true is for GPUs; torch has none on {processes.device.type}")
        if world_size() > 1:
            model = convert_sync_batchnorm(model)
    return model, data_config


def _run_folder(config: TrainConfig) -> Path:
    if config.output is None:
        name = Path(config.data.source).name or "run"
        return (Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    folder = Path(config.output).resolve()
    if folder.exists() and (not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())):
        raise ValueError(
            f"{config.output} is there already; choose another --output, or go on with --resume {config.output}"
        )
    return folder


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
