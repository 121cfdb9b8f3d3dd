"""What training needs whatever the task is: optimiser, schedule, the mean loss of an epoch, a loss that diverges."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torchmetrics import MeanMetric

from epsanet._processes import agree, world_size
from epsanet.tasks.config import TrainConfig
from epsanet.tasks.muon import muon_in_float32

__all__ = ["DivergedError", "TaskModule", "mean_of_an_epoch"]


class DivergedError(ValueError):
    """The loss is no longer a finite number.

    Args:
        message: step and learning rate.
        images: names of the images of the batch.
    """

    def __init__(self, message: str, images: list[str]) -> None:
        super().__init__(message)
        self.images = images


def mean_of_an_epoch() -> MeanMetric:
    """A mean over steps that is the same in all processes, and in the checkpoint, so that a run resumed within an epoch
    reports the whole epoch."""
    metric = MeanMetric(nan_strategy="disable", sync_on_compute=False)
    metric.persistent(True)
    return metric


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """What the optimiser's state, the average of the weights, the order of the images and the count of the steps rest
    on; a run that goes on must have the same."""
    names = ("opt", "momentum", "weight_decay", "filter_bias_and_bn", "layer_decay", "opt_args")
    return {
        **{f"optimizer.{name}": getattr(config.optimizer, name) for name in names},
        **{name: getattr(config, name) for name in ("accumulate_grad_batches", "ema_decay", "seed")},
        "data.aug_repeats": config.data.aug_repeats,
    }


class TaskModule(lightning.LightningModule):
    """A network with its optimiser and schedule, as Lightning trains it; losses and scores are the task's.

    Args:
        model: the network.
        class_names: one a class.
        config: how it is trained; not needed to evaluate.
        updates_per_epoch: optimiser steps in an epoch, for the schedule.
    """

    monitor: str
    """The column of ``metrics.csv`` that chooses the best epoch; higher is better."""
    evaluation: Any = None
    """Of the last pass over a split."""

    def __init__(
        self, model: Any, class_names: list[str], config: TrainConfig | None = None, updates_per_epoch: int = 1
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.class_names, self.config, self.updates_per_epoch = class_names, config, updates_per_epoch
        self.train_loss = mean_of_an_epoch()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer batches to evaluate than processes

    @abstractmethod
    def row(self) -> dict[str, float]:
        """The module's columns of an epoch in ``metrics.csv``."""

    @abstractmethod
    def headline(self, row: dict[str, float]) -> str:
        """The score of an epoch in a few words."""

    def set_train_mode(self) -> None:
        """Before an epoch, or what is left of one: choose what learns."""
        self.model.train()

    def on_train_start(self) -> None:
        self.set_train_mode()  # Lightning does not call on_train_epoch_start when it goes on within an epoch
        if self.global_step:  # the rates that came with the optimiser are those of the schedule that was
            for configured in self.trainer.lr_scheduler_configs:
                scheduler: Any = configured.scheduler
                scheduler.step_update(num_updates=self.global_step)

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        loader.set_epoch(self.current_epoch)
        self.train_loss.reset()
        self.set_train_mode()

    @property
    def learning_rate(self) -> float:
        """That of the classifier, which is the highest."""
        return max(float(group["lr"]) for group in self.trainer.optimizers[0].param_groups)

    def as_part(self, loss: Tensor, index: int) -> Tensor:
        """The loss as Lightning is to have it, which divides each by ``accumulate_grad_batches``.

        The last step of an epoch may be of fewer batches; its gradient is their mean, too.

        Args:
            loss: of a batch.
            index: of the batch in its epoch.
        """
        assert self.config is not None
        batches = int(self.trainer.num_training_batches)
        together = self.config.accumulate_grad_batches
        rest = batches % together
        return loss * (together / rest) if rest and index >= batches - rest else loss

    def note_loss(self, overall: Tensor, loss: Tensor, positions: Tensor) -> None:
        """Stop where the loss is no number, before the weights change; each process has to say.

        It is looked at after the backward pass: to look earlier would have a GPU wait for it between the two.

        Args:
            overall: mean loss of all processes.
            loss: of this process.
            positions: of the images of its batch.

        """
        self._noted = overall, loss.detach(), positions

    def on_after_backward(self) -> None:
        """Look at the loss.

        Raises:
            DivergedError: with the names of the images in the process whose loss is no number.
        """
        overall, loss, positions = self._noted
        if torch.isfinite(overall):
            return
        agree(lambda: self._check_own_loss(loss, positions))
        raise DivergedError("the losses of the processes add up to no finite number", [])

    def _check_own_loss(self, loss: Tensor, positions: Tensor) -> None:
        if torch.isfinite(loss):
            return
        samples = getattr(getattr(self.trainer.train_dataloader, "dataset", None), "samples", None)
        raise DivergedError(
            f"the loss is {loss.item()} at step {self.global_step} (learning rate {self.learning_rate:.3g}); lower "
            "--optimizer.lr, add --schedule.warmup_epochs, or limit --optimizer.clip_grad",
            [samples.name(position) for position in positions.tolist()] if samples else [],
        )

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", self.train_loss.compute())
        self.log("lr", self.learning_rate)

    @property
    def images_per_step(self) -> int:
        """Images of a step in all processes; a run goes on only with as many."""
        assert self.config is not None
        return self.config.data.batch_size * world_size()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what must be the same when the run goes on."""
        assert self.config is not None
        loader: Any = self.trainer.train_dataloader
        checkpoint["images_per_step"] = self.images_per_step
        checkpoint["train_images"] = len(loader.dataset.samples)
        checkpoint["stream_parts"] = loader.parts
        checkpoint["class_names"] = list(self.class_names)
        checkpoint["settings"] = fixed_settings(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the schedule be what the flags say now: a run may go on with more epochs or fewer.

        A schedule of timm is a function of the step; all that it saves is what it was made with.
        """
        checkpoint["lr_schedulers"] = [{} for _ in checkpoint["lr_schedulers"]]

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
                **(wanted.opt_args or {}),
            )
        except (ValueError, AssertionError, TypeError, ImportError) as error:
            given = f" with opt_args={wanted.opt_args}" if wanted.opt_args else ""
            raise ValueError(f"optimizer.opt={wanted.opt!r}{given} cannot be had from timm: {error}") from error
        if getattr(optimizer, "is_second_order", False):
            raise ValueError(
                f"optimizer.opt={wanted.opt!r} needs second derivatives, which are not computed; use another"
            )
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=schedule.sched,
                num_epochs=schedule.first_cycle,
                warmup_epochs=schedule.warmup_epochs,
                warmup_lr=schedule.warmup_lr,
                min_lr=schedule.min_lr,
                decay_milestones=schedule.decay_milestones,
                decay_rate=schedule.decay_rate,
                step_on_epochs=False,
                updates_per_epoch=self.updates_per_epoch,
                **({"decay_epochs": schedule.decay_epochs} if schedule.sched == "step" else {}),
                **(schedule.sched_args or {}),
            )
        except (ValueError, AssertionError, TypeError) as error:
            given = f" with sched_args={schedule.sched_args}" if schedule.sched_args else ""
            raise ValueError(f"schedule.sched={schedule.sched!r}{given} cannot be had from timm: {error}") from error
        if scheduler is None:
            raise ValueError(f"schedule.sched={schedule.sched!r} is no schedule; use constant")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with muon_in_float32() if self.device.type == "cpu" else nullcontext():
            super().optimizer_step(*args, **kwargs)

    def lr_scheduler_step(self, scheduler: Any, _: Any) -> None:
        """timm's schedules take the number of updates."""
        scheduler.step_update(num_updates=self.global_step)
