"""A detection run: what must be right before the first step, and what it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from timm.models import get_model_args
from torch.utils.data import DataLoader

from epsanet._processes import agree, first, rank
from epsanet.data.coco import open_coco, read_rle
from epsanet.data.detection import (
    DetectionSplits,
    detection_evaluation_loader,
    detection_train_loader,
    train_augmentation,
)
from epsanet.data.digits_scenes import DIGITS_DETECTION, open_digits_scenes
from epsanet.data.loaders import TrainLoader
from epsanet.data.sources import require
from epsanet.network.detector_start import start_detector_from
from epsanet.network.detectors import Detector, LoadedDetector, create_detector, load_detector, save_detector
from epsanet.network.model_folder import is_detector
from epsanet.network.weights import LoadedModel, load_model
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.console import messages, track
from epsanet.tasks.detection.card import detector_card, detector_title
from epsanet.tasks.detection.figures import (
    save_detection_confusion,
    save_detection_curves,
    save_pairs,
    save_precision_recall,
    save_scenes,
)
from epsanet.tasks.detection.inference import inference_detector
from epsanet.tasks.detection.module import DetectorModule
from epsanet.tasks.detection.scores import DetectionEvaluation, ImageResult
from epsanet.tasks.launch import Processes
from epsanet.tasks.run import Run, run_folder

__all__ = ["DetectionRun", "prepare_detection", "say_problems", "tracked"]

_WORST = 8


@dataclass(kw_only=True)
class DetectionRun(Run):
    """A run whose model is a ``Detector`` and whose splits are ``DetectionSplits``."""

    model: Detector
    splits: DetectionSplits

    @property
    def masks(self) -> bool:
        """Whether masks are learnt."""
        return self.model.config.has_masks

    @property
    def title(self) -> str:
        return detector_title(self.config)

    def train_loader(self, workers: int | None = None) -> TrainLoader:
        data = self.config.data if workers is None else dataclasses.replace(self.config.data, workers=workers)
        augmentation = train_augmentation(data, self.model.config.min_size, self.model.config.max_size)
        pin_memory = self.processes.pins_memory
        return detection_train_loader(
            self.splits.train, data, augmentation, self.config.seed, masks=self.masks, pin_memory=pin_memory
        )

    def evaluation_loader(self, split: str) -> DataLoader[Any]:
        return detection_evaluation_loader(getattr(self.splits, split), self.config.data, masks=self.masks)

    def module(self, updates_per_epoch: int = 1) -> DetectorModule:
        return DetectorModule(self.model, self.splits.class_names, self.config, updates_per_epoch, masks=self.masks)

    def inference_module(self) -> DetectorModule:
        network = inference_detector(self.model, self.processes.device, self.config.precision)
        return DetectorModule(network, self.splits.class_names, masks=self.masks)

    def draw_first_batch(self) -> None:
        images, targets, _ = next(iter(self.train_loader(workers=0)))
        title = "training images as they are augmented, with their objects"
        save_scenes(self.folder / "train_batch.png", images, targets, self.splits.class_names, title)

    def draw_results(self, evaluation: DetectionEvaluation, split: str, rows: list[dict[str, float]]) -> None:
        title = f"{split} split of {self.splits.name}"
        names = self.splits.class_names
        save_detection_curves(self.folder / "curves.png", rows)
        save_precision_recall(self.folder / "precision_recall.png", evaluation, title)
        save_detection_confusion(self.folder / "confusion_matrix.png", evaluation, title)
        worst = sorted(evaluation.results, key=lambda result: -result.errors)[:_WORST]
        for file, results, text in (
            ("val_batch.png", evaluation.results[:_WORST], f"first images of the {title}"),
            ("worst.png", worst, f"most mistaken images of the {title}"),
        ):
            save_pairs(self.folder / file, [self._pair(result, split) for result in results], names, text)

    def _pair(self, result: ImageResult, split: str) -> tuple[torch.Tensor, Any, Any, str]:
        samples = getattr(self.splits, split)
        pixels, objects = samples.read(result.position, masks=self.masks)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255
        found = {"boxes": result.boxes, "labels": result.labels, "scores": result.scores}
        if result.masks is not None:
            height, width = image.shape[-2:]
            masks = [torch.from_numpy(read_rle(mask, height, width)) for mask in result.masks]
            found["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width)
        text = f"{Path(samples.name(result.position)).name}, {result.missed} missed, {result.invented} invented"
        return image, objects.as_target(), found, f"{text}, {result.confused} confused"

    def save_model(
        self, folder: Path, *, split: str, evaluation: Any, epoch: int, seconds: float, hardware: str
    ) -> None:
        self.model.to("cpu")
        card = detector_card(
            config=self.config,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            split=split,
            evaluation=evaluation,
            epoch=epoch,
            seconds=seconds,
            hardware=hardware,
        )
        save_detector(folder, self.model, self.splits.class_names, card)
        load_detector(folder)


def prepare_detection(config: TrainConfig, processes: Processes, folder: Path | None, *, resumed: bool) -> DetectionRun:
    """Everything that can fail for the user's reasons, before anything is written.

    Args:
        config: of the run; its ``detector`` says which.
        processes: that take part; each has to call this.
        folder: the run folder where it is known and this run's own; found or refused when left out.
        resumed: whether weights come from a checkpoint, and not from ``init_from``.

    Raises:
        ValueError: for what cannot run, in all processes where it is so in one.
    """
    folder = folder or first(lambda: run_folder(config))
    config = agree(lambda: _refused(config))
    splits = first(lambda: _open(config))
    config, model, start = agree(lambda: _build(config, splits, resumed=resumed))
    if rank():  # as for classifiers: each process has its own noise, but all have the same first weights
        lightning.seed_everything((config.seed + rank()) % 2**32, verbose=False)
    return DetectionRun(
        config=config,
        processes=processes,
        splits=splits,
        reports=splits.reports,
        model=model,
        data_config={"input_size": (3, model.config.min_size, model.config.max_size)},
        folder=folder,
        start=start,
    )


_OF_CLASSIFIERS = (
    "crop_pct",
    "interpolation",
    "ratio",
    "crop_padding",
    "auto_augment",
    "re_prob",
    "train_fraction",
    "streaming",
)


def _refused(config: TrainConfig) -> TrainConfig:
    """The configuration, when there is nothing in it that only classifiers have."""
    if config.freeze_epochs:
        raise ValueError("freeze_epochs is for classifiers; --detector.frozen_stages keeps a part of the backbone")
    if config.optimizer.layer_decay is not None:
        raise ValueError(
            "optimizer.layer_decay is for classifiers; --detector.frozen_stages keeps a part of the backbone"
        )
    if config.data.mixes:
        raise ValueError("mixup and cutmix are for classifiers; leave them out")
    if config.data.aug_repeats > 1:
        raise ValueError("aug_repeats is for classifiers; leave it out")
    if config.sync_batchnorm:
        raise ValueError("sync_batchnorm is for classifiers; a detector's norms keep to their own process")
    if config.data.input_size is not None:
        raise ValueError("data.input_size is for classifiers; a detector has --detector.min_size and max_size")
    for part, names in ((config.data, _OF_CLASSIFIERS), (config, ("loss", "label_smoothing", "bce_target_thresh"))):
        for name in names:
            if getattr(part, name) != getattr(type(part), name):
                place = "data." if part is config.data else ""
                raise ValueError(f"{place}{name} is for classifiers; leave it out")
    return config


def _open(config: TrainConfig) -> DetectionSplits:
    """The data set, checked: by one process, which tells the others."""
    require("faster_coco_eval", "detection")
    assert config.detector is not None
    if config.data.source == DIGITS_DETECTION:
        splits = open_digits_scenes(config.data)
    else:
        splits = open_coco(config.data, masks=config.detector.has_masks, progress=tracked)
    for report in splits.reports:
        say_problems(report)
    if len(splits.train) < 2:
        raise ValueError(f"{config.data.source} has {len(splits.train)} image to train on; two are the least")
    return splits


def _try_backbone(model: Detector) -> None:
    """Some networks take images of one size only, which shows when one goes through."""
    model.eval()
    try:
        with torch.no_grad():
            for height, width in ((64, 96), (96, 64)):
                model.network.backbone(torch.zeros(1, 3, height, width))
    except (AssertionError, RuntimeError) as error:
        hint = "; Swin and its kind take others with --model_args '{strict_img_size: false}'"
        raise ValueError(
            f"{model.backbone_name} cannot be the backbone of a detector, which has images of many sizes: "
            f"{' '.join(str(error).split())[:200]}{hint if 'size' in str(error) else ''}"
        ) from error
    finally:
        model.train()


def _build(config: TrainConfig, splits: DetectionSplits, *, resumed: bool) -> tuple[TrainConfig, Detector, str | None]:
    """The detector and what it starts from; says what timm and torchvision do not have."""
    source = None
    if config.init_from is not None and not resumed:
        source = load_detector(config.init_from) if is_detector(config.init_from) else load_model(config.init_from)
    config, detector = _filled_in(config, source), config.detector
    assert detector is not None
    given = source is not None or resumed or bool({"pretrained", "checkpoint_path"} & config.model_args.keys())
    if not given and (detector.frozen_stages >= 0 or detector.norm_eval):
        raise ValueError(
            "the detector would keep random weights; name trained ones with --init_from, or train all with "
            "--detector.frozen_stages=-1 --detector.norm_eval=false"
        )
    lightning.seed_everything(config.seed, verbose=False)
    model = create_detector(config.model, len(splits.class_names), detector, backbone_args=config.model_args)
    _try_backbone(model)
    start = start_detector_from(model, splits.class_names, source) if source is not None else None
    transform = model.network.transform
    transform.image_mean = list(config.data.mean or transform.image_mean)
    transform.image_std = list(config.data.std or transform.image_std)
    config = dataclasses.replace(  # a run that is resumed does not look at init_from again
        config,
        data=dataclasses.replace(config.data, mean=tuple(transform.image_mean), std=tuple(transform.image_std)),
    )
    # The true number of steps is not known yet.
    DetectorModule(model, splits.class_names, config, 1000, masks=detector.has_masks).configure_optimizers()
    return config, model, start


def _filled_in(config: TrainConfig, source: LoadedModel | LoadedDetector | None) -> TrainConfig:
    """The configuration with its backbone named."""
    if config.model != "auto":
        return config
    if source is None:
        return dataclasses.replace(config, model="epsanet50_small")
    if isinstance(source, LoadedDetector):
        name, args = source.model.backbone_name, source.model.backbone_args
    else:
        args = {key: value for key, value in get_model_args(source.model).items() if key != "num_classes"}
        name = source.architecture
    return dataclasses.replace(config, model=name, model_args={**args, **config.model_args})


def tracked(title: str) -> Any:
    """What wraps the check of a split in a bar."""

    def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
        return track(items, total, f"checking {title}")

    return progress


def say_problems(report: Any) -> None:
    """Name what was left out of a split, or mended, up to five of a kind."""
    for kind, names in getattr(report, "problems", {}).items():
        more = f", … and {len(names) - 5:,} more" if len(names) > 5 else ""
        messages.print(f"{report.title}: {len(names):,} {kind}: {', '.join(names[:5])}{more}", style="yellow")
