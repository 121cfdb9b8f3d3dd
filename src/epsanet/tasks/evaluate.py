"""Evaluation of any model on any data set, each image once."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from epsanet._processes import agree, in_company
from epsanet.data.check import check_images
from epsanet.data.config import DataConfig
from epsanet.data.loaders import asked_for, evaluation_loader
from epsanet.data.sources import open_split
from epsanet.data.streams import Stream
from epsanet.network.weights import LoadedModel, load_model
from epsanet.tasks.classification import Classifier
from epsanet.tasks.console import messages, progress_bar, quiet_lightning, track
from epsanet.tasks.devices import resolve_device
from epsanet.tasks.inference import inference_network
from epsanet.tasks.launch import Processes, environment, launch
from epsanet.tasks.module import TaskModule
from epsanet.tasks.scores import Evaluation

__all__ = ["evaluate", "evaluate_module", "interruptible"]


@contextmanager
def interruptible() -> Iterator[None]:
    """Around Lightning, which ends an interrupted process by itself: with exit code 1, and 0 after SIGTERM.

    Raises:
        KeyboardInterrupt: instead.
    """
    try:
        yield
    except SystemExit as end:
        if isinstance(end, SIGTERMException) or isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        raise


class _Stop(Callback):
    """SIGTERM stops an evaluation as Ctrl-C does. Lightning's handler, which comes back at its end, would first wait
    for all other processes, which do not hear of it."""

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)


class _Bar(Callback):
    def __init__(self) -> None:
        self.bar = progress_bar()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.task = self.bar.add_task("evaluating", total=sum(map(float, trainer.num_val_batches)))
        self.bar.start()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.bar.advance(self.task)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()


def evaluate_module(
    module: TaskModule,
    loader: DataLoader[Any],
    processes: Processes,
    precision: Any,
    note: Callable[[str], None] = messages.print,
) -> Any:
    """Run a network over a loader by Lightning; with the weights of the first process in all.

    Args:
        module: the network.
        loader: batches as the module takes them.
        processes: that take part; each has to call this.
        precision: Lightning's name of the arithmetic.
        note: told how many images could not be read.

    Returns:
        The module's evaluation, the same in all processes.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    # In a SLURM job Lightning looks in its folder for checkpoints that nobody named.
    with tempfile.TemporaryDirectory() as empty, quiet_lightning(), in_company(), interruptible():
        trainer = lightning.Trainer(
            **processes.trainer_arguments(),
            precision=precision,
            plugins=environment(),
            default_root_dir=empty,
            logger=False,
            callbacks=[_Bar(), _Stop()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.validate(module, loader, verbose=False)
    assert module.evaluation is not None
    dataset: Any = loader.dataset
    images, lost = len(dataset.samples), len(dataset.samples) - module.evaluation.images
    if lost:
        note(f"{lost:,} of {images:,} images cannot be read and are left out")
    return module.evaluation


def evaluate(
    model: str | Path | LoadedModel,
    data: DataConfig,
    *,
    split: str | None = None,
    device: str = "auto",
    precision: str = "32-true",
    note: Callable[[str], None] = messages.print,
) -> Evaluation:
    """How good a model is on a split, each readable image counted once; under torchrun, the processes share them.

    Args:
        model: whatever ``load_model`` takes, or a loaded model.
        data: the data set; its classes are matched to the model's by name. Preprocessing is the model's own unless
            ``input_size``, ``crop_pct``, ``interpolation``, ``mean`` or ``std`` say otherwise.
        split: train, val or test; test where there is one, else val, when left out.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: Lightning's name of the arithmetic.
        note: told what the user should know: skipped images, classes that are lacking.

    Raises:
        ValueError: for a model, data set or device that is not there, or classes that do not fit.
        KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    processes = launch(resolve_device(device))
    loaded = agree(lambda: model if isinstance(model, LoadedModel) else load_model(model))
    samples, name, notes = agree(lambda: open_split(data, split, loaded.class_names))
    for text in notes:
        note(text)
    if not isinstance(samples, Stream):
        samples, report = agree(
            lambda: check_images(
                samples,
                name,
                on_bad_image=data.on_bad_image,
                depth=data.check,
                progress=lambda items, total: track(items, total, f"checking {name}"),
            )
        )
        for bad, reason in report.bad.items():
            note(f"skipped {bad}: {reason}")
    data_config = asked_for(loaded.data_config, data)
    loader = evaluation_loader(samples, data, data_config, pin_memory=processes.pins_memory)
    network = agree(
        lambda: inference_network(loaded.model, data_config["input_size"], processes.device, precision, note)
    )
    return evaluate_module(Classifier(network, loaded.class_names), loader, processes, precision, note)
