"""What must be right before the first step: data, network, device, augmentation, and where the run goes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import get_model_args
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from epsanet._processes import agree, first, rank, world_size
from epsanet.data.check import CheckReport, check_images
from epsanet.data.loaders import TrainLoader, evaluation_loader, evaluation_transform, train_loader, train_transform
from epsanet.data.sources import DataSplits, open_data
from epsanet.data.streams import Stream
from epsanet.network.bundle import RuntimeNetwork
from epsanet.network.inherit import Start, start_from
from epsanet.network.weights import LoadedModel, create_model, load_model, save_model
from epsanet.tasks.card import model_card
from epsanet.tasks.checkpoints import LAST
from epsanet.tasks.classification import Classifier
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import messages, track
from epsanet.tasks.figures import save_batch, save_confusion_matrix, save_curves
from epsanet.tasks.inference import inference_network
from epsanet.tasks.launch import Processes
from epsanet.tasks.module import TaskModule

__all__ = ["Run", "prepare", "run_folder"]


@dataclass(kw_only=True)
class Run:
    """Everything that is ready before the first step."""

    config: TrainConfig
    """As it was asked for; with ``init_from``, network and preprocessing are filled in."""
    processes: Processes
    """Where they compute."""
    splits: Any
    """Images that can be read, ``DataSplits``; those of a detector are ``DetectionSplits``."""
    reports: Sequence[Any]
    """What the check found, a split each: its ``title``, and the rest as text."""
    model: Any
    """The network, with its first weights."""
    data_config: dict[str, Any]
    """timm's preprocessing."""
    folder: Path
    """The run folder."""
    start: Start | str | None = None
    """What came from ``init_from``; nothing in a run that is resumed, whose weights are in its checkpoint."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def title(self) -> str:
        """What is trained."""
        return self.config.model

    def train_loader(self, workers: int | None = None) -> TrainLoader:
        """Augmented batches; with the configured number of workers when left out."""
        data = self.config.data if workers is None else replace(self.config.data, workers=workers)
        return train_loader(
            self.splits.train, data, self.data_config, self.config.seed, pin_memory=self.processes.pins_memory
        )

    def evaluation_loader(self, split: str) -> DataLoader[Any]:
        """Batches of val or test, each image once."""
        return evaluation_loader(
            getattr(self.splits, split), self.config.data, self.data_config, pin_memory=self.processes.pins_memory
        )

    def module(self, updates_per_epoch: int = 1) -> TaskModule:
        """The network as Lightning trains it."""
        return Classifier(self.model, self.splits.class_names, self.config, updates_per_epoch)

    def inference_module(self) -> TaskModule:
        """The network as it is evaluated."""
        network = inference_network(
            self.model, self.data_config["input_size"], self.processes.device, self.config.precision
        )
        return Classifier(network, self.splits.class_names)

    def draw_first_batch(self) -> None:
        """What the network will see, into the run folder."""
        images, labels, _ = next(iter(self.train_loader(workers=0)))
        names = self.splits.class_names
        mixer = Classifier(self.model, names, self.config).mixer
        targets = F.one_hot(labels, len(names))
        if mixer is not None:
            images, targets = mixer(images, labels, epoch=0, batch=0)
        save_batch(
            self.folder / "train_batch.png",
            images,
            [_target_title(target, names) for target in targets],
            self.data_config["mean"],
            self.data_config["std"],
            "training images as the network sees them",
        )

    def draw_results(self, evaluation: Any, split: str, rows: list[dict[str, float]]) -> None:
        """Curves and confusion matrix, into the run folder."""
        save_curves(self.folder / "curves.png", rows)
        save_confusion_matrix(self.folder / "confusion_matrix.png", evaluation, f"{split} split of {self.splits.name}")

    def save_model(
        self, folder: Path, *, split: str, evaluation: Any, epoch: int, seconds: float, hardware: str
    ) -> None:
        """Write the model folder with its card, and read it back.

        Args:
            folder: where to.
            split: that was evaluated.
            evaluation: the result on it.
            epoch: whose weights these are.
            seconds: that training took.
            hardware: name of the processor or GPU.
        """
        self.model.to(device="cpu", memory_format=torch.contiguous_format)
        card = model_card(
            config=self.config,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            class_names=self.splits.class_names,
            input_size=self.data_config["input_size"],
            licence=self.model.pretrained_cfg.get("license"),
            split=split,
            evaluation=evaluation,
            epoch=epoch,
            seconds=seconds,
            processes=self.processes.world_size,
            hardware=hardware,
        )
        save_model(folder, self.model, self.splits.class_names, self.data_config, card)
        load_model(folder)


def _target_title(target: Tensor, names: list[str]) -> str:
    """The class of an image, or ``37 % cat, 63 % dog`` of one that was mixed of two."""
    shares, places = target.float().topk(min(2, len(names)))
    if len(places) < 2 or shares[1] < 0.05:  # the rest is label smoothing
        return names[int(places[0])]
    return ", ".join(
        f"{share:.0%} {names[place]}" for share, place in zip(shares.tolist(), places.tolist(), strict=True)
    )


def prepare(config: TrainConfig, processes: Processes, folder: Path | None, *, resumed: bool) -> Run:
    """Everything that can fail for the user's reasons, before anything is written.

    Args:
        config: of the run.
        processes: that take part; each has to call this.
        folder: the run folder where it is known and this run's own; found or refused when left out.
        resumed: whether weights come from a checkpoint, and not from ``init_from``.

    Raises:
        ValueError: for what cannot run, in all processes where it is so in one.
    """
    folder = folder or first(lambda: run_folder(config))
    if config.data.scale_jitter is not None:
        raise ValueError("data.scale_jitter is for detectors; --data.scale is the share of a classifier's crops")
    splits = _open_data(config)
    config, model, data_config, start = agree(lambda: _build(config, processes, splits, resumed=resumed))
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
        start=start,
    )


def _open_data(config: TrainConfig) -> DataSplits:
    """The first process of each node goes first: it may have to download or to unpack."""
    early = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) == 0
    splits = agree(lambda: open_data(config.data) if early else None)
    return agree(lambda: splits or open_data(config.data))


def _build(
    config: TrainConfig, processes: Processes, splits: DataSplits, *, resumed: bool
) -> tuple[TrainConfig, Any, dict[str, Any], Start | None]:
    """The network, its preprocessing and what it starts from; says what timm does not have."""
    if not isinstance(splits.train, Stream) and len(splits.train) < 2:
        raise ValueError(f"{config.data.source} has {len(splits.train)} image to train on; two are the least")
    source = load_model(config.init_from) if config.init_from is not None and not resumed else None
    if source is not None and isinstance(source.model, RuntimeNetwork):
        raise ValueError(
            f"{config.init_from} is an exported bundle, without weights to start from; give its model folder"
        )
    config = _filled_in(config, source)
    lightning.seed_everything(config.seed, verbose=False)
    model = create_model(config.model, **{"num_classes": len(splits.class_names), **config.model_args})
    if getattr(model, "num_classes", None) != len(splits.class_names):
        raise ValueError(
            f"{config.model} was given num_classes={model.num_classes} for {len(splits.class_names)} classes"
        )
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise ValueError(
            f"{config.model} takes {channels}-channel images, and images are read as RGB; use a network with in_chans=3"
        )
    start = start_from(model, splits.class_names, source) if source is not None else None
    if start is not None and start.inherited and config.freeze_epochs:
        raise ValueError(
            f"freeze_epochs={config.freeze_epochs} would freeze PSA modules that have only just inherited and must "
            "learn; use --freeze_epochs 0 when the network comes from a ResNet"
        )
    data_config = _resolve_data_config(config, model)
    Classifier(model, splits.class_names, config, 1000).configure_optimizers()  # the true number is not known yet
    _build_transforms(config, data_config)
    if config.sync_batchnorm:
        if processes.device.type != "cuda":
            raise ValueError(f"sync_batchnorm=true is for GPUs; torch has none on {processes.device.type}")
        if world_size() > 1:
            model = convert_sync_batchnorm(model)
    return config, model, data_config, start


def _filled_in(config: TrainConfig, source: LoadedModel | None) -> TrainConfig:
    """The configuration with what ``init_from`` decides where the user left it out, so that a resumed run needs only
    its own folder."""
    if source is None:
        return replace(config, model="epsanet50_small") if config.model == "auto" else config
    if config.model == "auto":
        args = {key: value for key, value in get_model_args(source.model).items() if key != "num_classes"}
        name = source.model.pretrained_cfg["architecture"]
        config = replace(config, model=name, model_args={**args, **config.model_args})
    height, width = source.data_config["input_size"][1:]
    found = {
        "input_size": height if height == width else None,
        "crop_pct": source.data_config["crop_pct"] if config.data.crop_padding is None else None,
        **{key: source.data_config[key] for key in ("interpolation", "mean", "std")},
    }
    data = config.data
    return replace(
        config, data=replace(data, **{key: value for key, value in found.items() if getattr(data, key) is None})
    )


def run_folder(config: TrainConfig) -> Path:
    """Where a new run goes.

    Raises:
        ValueError: when something else is there.
    """
    if config.output is None:
        name = Path(config.data.source).name or "run"
        return (Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    folder = Path(config.output).resolve()
    if folder.exists() and (not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())):
        begun = (folder / "config.yaml").is_file() and not (folder / "checkpoints" / LAST).is_file()
        go_on = "begin in it again with --resume auto" if begun else f"go on with --resume {config.output}"
        raise ValueError(f"{config.output} is there already; choose another --output, or {go_on}")
    return folder


def _resolve_data_config(config: TrainConfig, model: Any) -> dict[str, Any]:
    data = config.data
    wanted: dict[str, Any] = {key: getattr(data, key) for key in ("crop_pct", "interpolation", "mean", "std")}
    if data.crop_padding is not None and data.crop_pct is None:
        wanted["crop_pct"] = 1.0  # training resizes to the input size, and so must evaluation
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
