"""The classifier as Lightning trains and evaluates it (paper section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from epsanet._processes import mean
from epsanet.data.mixing import Mixer
from epsanet.network.inherit import classifier_names
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.module import TaskModule
from epsanet.tasks.scores import Evaluation, Score

__all__ = ["Classifier"]


class Classifier(TaskModule):
    """A network with its loss, optimiser, schedule and scores.

    Args:
        model: gives logits of shape ``N, classes`` for images of shape ``N, 3, H, W``.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
    """

    monitor = "val_top1"
    evaluation: Evaluation | None = None

    def __init__(
        self, model: Any, class_names: list[str], config: TrainConfig | None = None, updates_per_epoch: int = 1
    ) -> None:
        super().__init__(model, class_names, config, updates_per_epoch)
        self.mixer, self.criterion = _mixer_and_loss(config, len(class_names))
        self.score = Score(len(class_names))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``N, classes``."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def set_train_mode(self) -> None:
        """All but the classifier frozen in the first ``freeze_epochs``, norms in evaluation; nothing afterwards."""
        assert self.config is not None
        frozen = self.current_epoch < self.config.freeze_epochs
        self.model.train(not frozen).requires_grad_(not frozen)
        for name in classifier_names(self.model) if frozen else ():
            self.model.get_submodule(name).train().requires_grad_()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, labels, positions = batch
        if self.mixer is not None:
            images, labels = self.mixer(images, labels, epoch=self.current_epoch, batch=index, process=self.global_rank)
        loss: Tensor = self.criterion(self(images), labels)
        overall = mean(loss.detach())
        self.note_loss(overall, loss, positions)
        self.train_loss.update(overall, len(labels))
        return self.as_part(loss, index)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        images, labels, _positions = batch
        self.score.update(self(images), labels)

    def on_validation_epoch_end(self) -> None:
        self.evaluation = self.score.result(self.class_names)
        self.score.reset()
        self.log_dict(
            {"val_top1": self.evaluation.top1, "val_top5": self.evaluation.top5, "val_loss": self.evaluation.loss}
        )

    def row(self) -> dict[str, float]:
        assert self.evaluation is not None
        found = self.evaluation
        return {
            "train_loss": float(self.train_loss.compute()),
            "val_loss": found.loss,
            "val_top1": found.top1,
            "val_top5": found.top5,
        }

    def headline(self, row: dict[str, float]) -> str:
        return f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:6.2f} %"


def _mixer_and_loss(config: TrainConfig | None, num_classes: int) -> tuple[Mixer | None, nn.Module]:
    """Labels are smoothed once: where images are mixed, in the targets, else in the loss."""
    if config is None:
        return None, nn.CrossEntropyLoss()
    mixer = Mixer(config.data, num_classes, config.label_smoothing, config.seed) if config.data.mixes else None
    smoothing = 0.0 if mixer else config.label_smoothing
    if config.loss == "binary_cross_entropy":
        return mixer, BinaryCrossEntropy(smoothing, target_threshold=config.bce_target_thresh)
    return mixer, nn.CrossEntropyLoss(label_smoothing=smoothing)
