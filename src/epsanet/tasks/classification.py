"""The classifier as Lightning trains and evaluates it (paper section 4.1)."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric

from epsanet._processes import agree, mean, world_size
from epsanet.data.mixing import Mixer
from epsanet.network.inherit import classifier_names
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.scores import Evaluation, Score

__all__ = ["Classifier", "DivergedError"]


class DivergedError(ValueError):
    """The loss is no longer a finite number.

    Args:
        message: step and learning rate.
        images: names of the images of the batch.
    """

    def __init__(self, message: str, images: list[str]) -> None:
        super().__init__(message)
        self.images = images


class Classifier(lightning.LightningModule):
    """A network with its loss, optimiser, schedule and scores.

    Args:
        model: gives logits of shape ``N, classes`` for images of shape ``N, 3, H, W``.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
    """

    monitor = "val_top1"
    """The column of ``metrics.csv`` that chooses the best epoch; higher is better."""

    def __init__(
        self, model: Any, class_names: list[str], config: TrainConfig | None = None, updates_per_epoch: int = 1
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.class_names, self.config, self.updates_per_epoch = class_names, config, updates_per_epoch
        self.mixer, self.criterion = _mixer_and_loss(config, len(class_names))
        self.score = Score(len(class_names))
        self.train_loss = MeanMetric(nan_strategy="disable", sync_on_compute=False)  # of all processes as it is
        self.train_loss.persistent(True)  # so that a run resumed within an epoch reports the whole epoch
        self.evaluation: Evaluation | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches to evaluate than processes

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape ``N, classes``."""
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def on_train_start(self) -> None:
        self._freeze()  # Lightning does not call on_train_epoch_start when it goes on within an epoch

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        loader.set_epoch(self.current_epoch)
        self.train_loss.reset()
        self._freeze()

    def _freeze(self) -> None:
        """All but the classifier in the first ``freeze_epochs``, norms in evaluation; nothing afterwards."""
        assert self.config is not None
        frozen = self.current_epoch < self.config.freeze_epochs
        self.model.train(not frozen).requires_grad_(not frozen)
        for name in classifier_names(self.model) if frozen else ():
            self.model.get_submodule(name).train().requires_grad_()

    @property
    def learning_rate(self) -> float:
        """That of the classifier, which is the highest."""
        return max(float(group["lr"]) for group in self.trainer.optimizers[0].param_groups)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, labels, positions = batch
        if self.mixer is not None:
            images, labels = self.mixer(images, labels, epoch=self.current_epoch, batch=index, process=self.global_rank)
        loss: Tensor = self.criterion(self(images), labels)
        overall = mean(loss.detach())
        if not torch.isfinite(overall):
            agree(lambda: self._check_loss(loss, positions))
            raise DivergedError("the losses of the processes add up to no finite number", [])
        self.train_loss.update(overall, len(labels))
        return loss

    def _check_loss(self, loss: Tensor, positions: Tensor) -> None:
        if not torch.isfinite(loss):
            raise self._diverged(loss.item(), positions.tolist())

    def _diverged(self, loss: float, positions: list[int]) -> DivergedError:
        samples = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "samples", None)
        return DivergedError(
            f"the loss is {loss} at step {self.global_step} (learning rate {self.learning_rate:.3g}); lower "
            "--optimizer.lr, add --schedule.warmup_epochs, or limit --optimizer.clip_grad",
            [samples.name(position) for position in positions] if samples else [],
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

    def row(self) -> dict[str, float]:
        """The module's columns of an epoch in ``metrics.csv``."""
        assert self.evaluation is not None
        found = self.evaluation
        return {
            "train_loss": float(self.train_loss.compute()),
            "val_loss": found.loss,
            "val_top1": found.top1,
            "val_top5": found.top5,
        }

    def headline(self, row: dict[str, float]) -> str:
        """The score of an epoch in a few words."""
        return f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:6.2f} %"

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.train_loss.compute())
        self.log("lr", self.learning_rate)

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
                layer_decay=wanted.layer_decay,
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


def _mixer_and_loss(config: TrainConfig | None, num_classes: int) -> tuple[Mixer | None, nn.Module]:
    """Labels are smoothed once: where images are mixed, in the targets, else in the loss."""
    if config is None:
        return None, nn.CrossEntropyLoss()
    mixer = Mixer(config.data, num_classes, config.label_smoothing, config.seed) if config.data.mixes else None
    smoothing = 0.0 if mixer else config.label_smoothing
    if config.loss == "binary_cross_entropy":
        return mixer, BinaryCrossEntropy(smoothing, target_threshold=config.bce_target_thresh)
    return mixer, nn.CrossEntropyLoss(label_smoothing=smoothing)
