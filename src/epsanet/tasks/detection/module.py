"""The detector as Lightning trains and evaluates it (paper section 4.3)."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from epsanet._processes import agree, mean
from epsanet.network.detectors import Detector, loss_names
from epsanet.tasks.classification import Classifier, DivergedError
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.detection.scores import DetectionEvaluation, DetectionScore

__all__ = ["DetectorModule"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]], Tensor]


class DetectorModule(Classifier):
    """A detector with its losses, optimiser, schedule and scores; optimiser and schedule are those of classifiers.

    Args:
        model: the detector.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
        masks: whether masks are compared, which the data must have then.
    """

    monitor = "val_box_ap"

    def __init__(
        self,
        model: Detector,
        class_names: list[str],
        config: TrainConfig | None = None,
        updates_per_epoch: int = 1,
        *,
        masks: bool,
    ) -> None:
        lightning.LightningModule.__init__(self)
        self.model = model.to(memory_format=torch.channels_last)
        self.class_names, self.config, self.updates_per_epoch = class_names, config, updates_per_epoch
        self.score: Any = DetectionScore(len(class_names), masks=masks)
        self.losses = nn.ModuleDict(
            {
                name: MeanMetric(nan_strategy="disable", sync_on_compute=False)
                for name in loss_names(model.config.architecture)
            }
        )
        self.train_loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)
        self.mixer = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches to evaluate than processes
        for metric in (self.train_loss, *self.losses.values()):
            metric.persistent(True)  # type: ignore[operator]
        self.evaluation: DetectionEvaluation | None = None  # type: ignore[assignment]

    def forward(self, images: Any, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, else detections, as ``Detector`` has them."""
        return self.model(images, targets)

    def _freeze(self) -> None:
        """What a detector keeps frozen, it keeps so by itself."""
        self.model.train()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for metric in self.losses.values():
            metric.reset()  # type: ignore[operator]

    def training_step(self, batch: Batch, _: int) -> Tensor:  # type: ignore[override]
        images, targets, positions = batch
        losses: dict[str, Tensor] = self(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        overall = mean(torch.stack([loss, *(losses[name] for name in self.losses)]).detach())
        if not torch.isfinite(overall[0]):
            agree(lambda: self._check_loss(loss, positions))
            raise DivergedError("the losses of the processes add up to no finite number", [])
        for metric, value in zip((self.train_loss, *self.losses.values()), overall, strict=True):
            metric.update(value, len(images))  # type: ignore[operator]
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:  # type: ignore[override]
        images, targets, positions = batch
        self.score.update(self(images), targets, positions)

    def on_validation_epoch_end(self) -> None:
        found: Any = self.score.result(self.class_names)
        self.evaluation = found
        self.score.reset()
        self.log_dict(self._averages())

    def _averages(self) -> dict[str, float]:
        assert self.evaluation is not None
        kinds = {"box": self.evaluation.box, "mask": self.evaluation.mask}
        return {
            f"val_{kind}_{name}": getattr(averages, name)
            for kind, averages in kinds.items()
            if averages is not None
            for name in ("ap", "ap50", "ap75")
        }

    def row(self) -> dict[str, float]:
        parts = {f"train_{name}": float(metric.compute()) for name, metric in self.losses.items()}  # type: ignore[operator]
        return {"train_loss": float(self.train_loss.compute()), **parts, **self._averages()}

    def headline(self, row: dict[str, float]) -> str:
        text = f"val box AP {row['val_box_ap']:.3f} AP50 {row['val_box_ap50']:.3f}"
        if "val_mask_ap" in row:
            text += f"  mask AP {row['val_mask_ap']:.3f} AP50 {row['val_mask_ap50']:.3f}"
        return text
