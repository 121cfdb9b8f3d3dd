"""What Lightning calls along the way: progress, history, random states, when to save, interruption."""

from __future__ import annotations

import csv
import random
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback

from epsanet._files import atomic_file
from epsanet._processes import gather, largest, rank
from epsanet.tasks.console import console, duration, progress_bar
from epsanet.tasks.module import TaskModule
from epsanet.tasks.report import MUCH_WAITING, data_advice, shown

__all__ = [
    "History",
    "LastCheckpoint",
    "RandomStates",
    "Reporter",
    "TrainingInterrupted",
]


_FIRST_STEPS = 20
"""So many steps of a run tell, right after the banner, what share of them waits for images."""
_SECONDS_OF_STARTING = 10
"""Waiting for less than this says nothing: loader processes have to be started."""


class TrainingInterrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """Training stopped on request, after saving."""


class RandomStates(Callback):
    """The states of Python's, NumPy's and torch's generators in every process go into the checkpoint and come back.

    Of the generators on GPUs, that of the process's own: others are other processes', or not there when it goes on.
    """

    _states: list[dict[str, Any]] | None = None
    _device: torch.device

    def state_dict(self) -> dict[str, Any]:
        version, keys, gauss = random.getstate()
        kind, words, place, has_gauss, cached = np.random.get_state(legacy=True)
        own = {
            "python": [version, list(keys), gauss],
            "numpy": [kind, [int(word) for word in words], int(place), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "mps": torch.mps.get_rng_state() if self._device.type == "mps" else None,
        }
        return {"processes": gather(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._states = state_dict["processes"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._device = trainer.strategy.root_device
        if self._states is None or rank() >= len(self._states):
            return
        states = self._states[rank()]
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
        kind, words, place, has_gauss, cached = states["numpy"]
        np.random.set_state((kind, np.array(words, dtype=np.uint32), place, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        cuda, number = states["cuda"], self._device.index or 0
        if isinstance(cuda, list):  # there are checkpoints with the states of all GPUs, by their numbers
            cuda = cuda[number] if number < len(cuda) else None
        if cuda is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self._device)
        if states.get("mps") is not None and self._device.type == "mps":
            torch.mps.set_rng_state(states["mps"])


class History(Callback):
    """One row an epoch, in ``metrics.csv`` and in the checkpoint.

    Args:
        path: of the CSV file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._before = 0.0
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self._before + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._started = time.monotonic()
        self._epoch_started = self._stepped = time.perf_counter()  # a resumed epoch has no start of its own

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._epoch_started = self._stepped = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._stepped = time.perf_counter()

    @property
    def data_wait(self) -> float:
        """Share of the time of all steps that was spent waiting for images, over the whole run."""
        return float(np.mean([row["data_wait"] for row in self.rows]))

    @property
    def seconds(self) -> float:
        """Time spent in training, over all its pieces."""
        return self._before + time.monotonic() - self._started

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        loader: Any = trainer.train_dataloader
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "step": trainer.global_step,
                "lr": pl_module.learning_rate,
                **pl_module.row(),
                "data_wait": round(loader.waited / max(self._stepped - self._epoch_started, 1e-9), 4),
                "seconds": round(self.seconds, 3),
            }
        )
        if rank():
            return
        with atomic_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


class Reporter(Callback):
    """A bar with the remaining time of the whole run, and a line an epoch.

    Args:
        history: where the numbers of an epoch come from; must be called before this.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self.bar = progress_bar()
        self._advised = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        assert trainer.max_epochs is not None
        self._total = int(trainer.estimated_stepping_batches)
        self._first, self._start = trainer.global_step, time.monotonic()
        self._epoch, self._batches, self._mark = trainer.current_epoch, 0, (0.0, 0.0)
        self.task = self.bar.add_task("training", total=self._total, completed=trainer.global_step)
        self.bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, TaskModule)
        text = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        text += f"  {pl_module.headline(self.history.rows[-1])}" if self.history.rows else ""
        self.bar.update(self.task, completed=trainer.global_step, description=text)
        self._batches += 1
        if self._batches <= 1 + _FIRST_STEPS and trainer.current_epoch == self._epoch:
            self._measure(trainer.train_dataloader)

    def _measure(self, loader: Any) -> None:
        """Without the first batch, for which loader processes are started."""
        if self._batches == 1:
            self._mark = time.perf_counter(), loader.waited
        elif self._batches == 1 + _FIRST_STEPS:
            started, before = self._mark
            share = (loader.waited - before) / (time.perf_counter() - started)
            console.print(f"data wait   {100 * share:.0f} % of the time of the first {_FIRST_STEPS} steps")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, TaskModule)
        row = self.history.rows[-1]
        done = trainer.global_step - self._first
        left = (time.monotonic() - self._start) / max(done, 1) * (self._total - trainer.global_step)
        console.print(
            f"epoch {row['epoch']:{len(str(trainer.max_epochs))}}/{trainer.max_epochs}  lr {row['lr']:.2e}  "
            f"train loss {row['train_loss']:.4f}  {pl_module.headline(row)}  "
            f"data wait {100 * row['data_wait']:.0f} %  remaining {duration(left)}"
        )
        loader: Any = trainer.train_dataloader
        if row["data_wait"] > MUCH_WAITING and loader.waited > _SECONDS_OF_STARTING and not self._advised:
            self._advised = True
            assert pl_module.config is not None
            console.print(data_advice(row["data_wait"], pl_module.config.data))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()


class LastCheckpoint(CheckpointCallback):
    """Saves where training stands: at the end of each epoch, every so often within one, and before a stop.

    Ctrl-C and SIGTERM, to whichever process, end the run after the current step, saved; a second Ctrl-C ends it at
    once. Lightning calls it after all other callbacks, because it is one for checkpoints: what they keep is complete.

    Args:
        path: where to save.
        minutes: between two savings within an epoch.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self.seconds = path, 60 * minutes
        self.asked = False
        self._before: dict[int, Any] = {}
        self._step = -1
        self._saved = time.monotonic()

    def _ask(self, number: int, _: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        console.print("stopping after this step; Ctrl-C again stops at once, without saving it")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._saved, self._step = time.monotonic(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        # After the last batch of an epoch comes its validation; all waits for it and for the epoch's checkpoint.
        # Between two optimiser steps there are gradients, which no checkpoint holds.
        before, self._step = self._step, trainer.global_step
        if self._step == before or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        due = time.monotonic() - self._saved >= self.seconds
        stop, save = largest([int(self.asked), int(due)], trainer.strategy.root_device)
        if stop or save:
            self._save(trainer)
        if stop:
            self._stop(f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        (stop,) = largest([int(self.asked)], trainer.strategy.root_device)
        if stop:
            self._stop(f"the end of epoch {trainer.current_epoch}")

    def _stop(self, place: str) -> NoReturn:
        run = shlex.quote(shown(self.path.parents[1]))
        raise TrainingInterrupted(f"stopped at {place} and saved; go on with: epsanet train --resume {run}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._restore()
        (stop,) = largest([int(self.asked)], trainer.strategy.root_device)
        if stop:
            self._stop("the end of the last epoch")

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
