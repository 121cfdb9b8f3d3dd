"""The detector as Lightning trains and evaluates it (paper section 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from epsanet._processes import gather, mean
from epsanet.data.loaders import seeded
from epsanet.network.detectors import Detector, loss_names
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.detection.scores import DetectionEvaluation, DetectionScore
from epsanet.tasks.module import TaskModule, mean_of_an_epoch

__all__ = ["DetectorModule"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]], Tensor]


class DetectorModule(TaskModule):
    """A detector with its losses, optimiser, schedule and scores.

    Args:
        model: the detector.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
        masks: whether masks are compared, which the data must have then.
    """

    monitor = "val_box_ap"
    evaluation: DetectionEvaluation | None = None

    def __init__(
        self,
        model: Detector,
        class_names: list[str],
        config: TrainConfig | None = None,
        updates_per_epoch: int = 1,
        *,
        masks: bool,
    ) -> None:
        super().__init__(model, class_names, config, updates_per_epoch)
        self.score = DetectionScore(len(class_names), masks=masks)
        self.losses = nn.ModuleDict({name: mean_of_an_epoch() for name in loss_names(model.config.architecture)})
        self._val_losses: list[tuple[float, int]] = []
        self._val_loss = math.nan

    def forward(self, images: Any, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, else detections, as ``Detector`` has them."""
        return self.model(images, targets)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for metric in self.losses.values():
            metric.reset()  # type: ignore[operator]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, targets, positions = batch
        losses: dict[str, Tensor] = self(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        overall = mean(torch.stack([loss, *(losses[name] for name in self.losses)]).detach())
        self.note_loss(overall[0], loss, positions)
        for metric, value in zip((self.train_loss, *self.losses.values()), overall, strict=True):
            metric.update(value, len(images))  # type: ignore[operator]
        return self.as_part(loss, index)

    def validation_step(self, batch: Batch, _: int) -> None:
        images, targets, positions = batch
        self.score.update(self.model.detect(images), targets, positions)
        if self.config is not None:  # in training; the loss is of no use to who evaluates
            trained_on = [{key: value[target["iscrowd"] == 0] for key, value in target.items()} for target in targets]
            place, on_gpu = int(positions[0]), self.device.type == "cuda"
            devices = [self.device] if on_gpu else []
            # Which anchors and regions count is drawn, on the device.
            with seeded(self.config.seed, place), torch.random.fork_rng(devices, enabled=on_gpu):
                if on_gpu:
                    torch.cuda.manual_seed(self.config.seed + place)
                losses = self.model.losses(images, trained_on)
            self._val_losses.append((float(sum(losses.values())), len(images)))

    def on_validation_epoch_end(self) -> None:
        self.evaluation = self.score.result(self.class_names)
        self.score.reset()
        if self.config is not None:
            parts = [part for parts in gather(self._val_losses) for part in parts]
            images = sum(count for _, count in parts)
            # Rounded once, and so the same however many processes share the images.
            self._val_loss = math.fsum(loss * count for loss, count in parts) / max(images, 1)
            self._val_losses = []
        self.log_dict(self._validation())

    def _validation(self) -> dict[str, float]:
        assert self.evaluation is not None
        kinds = {"box": self.evaluation.box, "mask": self.evaluation.mask}
        averages = {
            f"val_{kind}_{name}": getattr(averages, name)
            for kind, averages in kinds.items()
            if averages is not None
            for name in ("ap", "ap50", "ap75")
        }
        return averages if self.config is None else {"val_loss": self._val_loss, **averages}

    def row(self) -> dict[str, float]:
        parts = {f"train_{name}": float(metric.compute()) for name, metric in self.losses.items()}  # type: ignore[operator]
        return {"train_loss": float(self.train_loss.compute()), **parts, **self._validation()}

    def headline(self, row: dict[str, float]) -> str:
        text = f"val box AP {row['val_box_ap']:.3f} AP50 {row['val_box_ap50']:.3f}"
        if "val_mask_ap" in row:
            text += f"  mask AP {row['val_mask_ap']:.3f} AP50 {row['val_mask_ap50']:.3f}"
        return text
