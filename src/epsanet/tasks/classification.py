"""The classifier as Lightning trains and evaluates it (paper section 4.1)."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric

from epsanet._processes import agree, mean, world_size
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.scores import Evaluation, Score

__all__ = ["Classifier", "DivergedError"]


class DivergedError(ValueError):
    """The loss is no longer a finite number."""


class Classifier(lightning.LightningModule):
    """A network with its loss, optimiser, schedule and scores.

    Args:
        model: gives logits of shape ``N, classes`` for images of shape ``N, 3, H, W``.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
    """

    def __init__(
        self, model: Any, class_names: list[str], config: TrainConfig | None = None, updates_per_epoch: int = 1
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.class_names, self.config, self.updates_per_epoch = class_names, config, updates_per_epoch
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing if config else 0.0)
        self.score = Score(len(class_names))
        self.train_loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)  # of all processes as it is
        self.train_loss.persistent(True)  # so that a run resumed within an epoch reports the whole epoch
        self.evaluation: Evaluation | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches to evaluate than processes

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``N, classes``."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        loader.set_epoch(self.current_epoch)
        self.train_loss.reset()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        images, labels, positions = batch
        loss: Tensor = self.criterion(self(images), labels)
        overall = mean(loss.detach())
        if not torch.isfinite(overall):
            agree(lambda: self._check_loss(loss, positions))
            raise DivergedError("the losses of the processes add up to no finite number")
        self.train_loss.update(overall, len(labels))
        return loss

    def _check_loss(self, loss: Tensor, positions: Tensor) -> None:
        if not torch.isfinite(loss):
            raise DivergedError(self._where_it_diverged(loss.item(), positions.tolist()))

    def _where_it_diverged(self, loss: float, positions: list[int]) -> str:
        optimizer, loader = self.trainer.optimizers[0], self.trainer.train_dataloader
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        names = [samples.name(position) for position in positions[:3]] if samples else ["a stream"]
        return (
            f"the loss is {loss} at step {self.global_step} (learning rate {optimizer.param_groups[0]['lr']:.3g}, "
            f"images {', '.join(names)}, …); lower --optimizer.lr or add --schedule.warmup_epochs"
        )

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        images, labels, _positions = batch
        self.score.update(self(images), labels)

    def on_validation_epoch_end(self) -> None:
        self.evaluation = self.score.result(self.class_names)
        self.score.reset()
        self.log_dict(
            {"val_top1": self.evaluation.top1, "val_top5": self.evaluation.top5, "val_loss": self.evaluation.loss}
        )

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.train_loss.compute())
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    @property
    def images_per_step(self) -> int:
        """Images of a step in all processes; a run goes on only with as many."""
        assert self.config is not None
        return self.config.data.batch_size * world_size()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the order of the images and the schedule rest on."""
        checkpoint["images_per_step"] = self.images_per_step

    def configure_optimizers(self) -> Any:
        assert self.config is not None
        wanted, schedule = self.config.optimizer, self.config.schedule
        try:
            optimizer = create_optimizer_v2(
                self.model,
                opt=wanted.opt,
                lr=wanted.lr,
                momentum=wanted.momentum,
                weight_decay=wanted.weight_decay,
                filter_bias_and_bn=wanted.filter_bias_and_bn,
            )
        except (ValueError, AssertionError) as error:
            raise ValueError(f"optimizer.opt={wanted.opt!r} cannot be had from timm: {error}") from error
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.sched,
            num_epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            decay_epochs=schedule.decay_epochs,
            decay_milestones=schedule.decay_milestones,
            decay_rate=schedule.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, _: Any) -> None:
        """timm's schedules take the number of updates."""
        scheduler.step_update(num_updates=self.global_step)
