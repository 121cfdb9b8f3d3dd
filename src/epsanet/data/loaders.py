"""Batches out: transforms, the order of an epoch, and loaders that can go on from the middle of one.

The order of the images is a function of (seed, epoch), the augmentation of an image one of (seed, epoch, position):
neither depends on the number of workers, nor on where a run was interrupted.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import transforms

from epsanet.data.config import DataConfig
from epsanet.data.images import ImageError, read_image
from epsanet.data.samples import Samples, Stream

__all__ = [
    "ImageDataset",
    "TrainLoader",
    "evaluation_loader",
    "evaluation_transform",
    "train_loader",
    "train_transform",
]

_logger = logging.getLogger("epsanet")

_SUBSTITUTES = 100
"""So many damaged images in a row end a run that skips them."""


def train_transform(config: DataConfig, data_config: dict[str, Any]) -> Any:
    """timm's training transform: a random crop, flips and what else the configuration asks for."""
    transform = create_transform(
        data_config["input_size"],
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        re_prob=config.re_prob,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
    )
    if config.crop_padding is not None:
        size = data_config["input_size"][-2:]
        mode = transforms.InterpolationMode(data_config["interpolation"])
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize(size, interpolation=mode),
                transforms.RandomCrop(size, padding=config.crop_padding, padding_mode="reflect"),
            ]
        )
    return transform


def evaluation_transform(data_config: dict[str, Any]) -> Any:
    """timm's evaluation transform: resize, centre crop, normalise."""
    return create_transform(
        data_config["input_size"],
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
    )


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """All random generators that augmentations draw from, started from a key; put back afterwards."""
    number = zlib.crc32(np.array(key, dtype=np.int64).tobytes())
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Samples through a transform: image of shape ``3, H, W``, label, position.

    A plain position reads that image; a pair (epoch, position) also fixes the augmentation.

    Args:
        samples: where the images come from.
        transform: Pillow image to tensor.
        seed: of the augmentation.
        on_bad_image: what to do when an image that passed the check cannot be read after all: name it and take the
            next (``"skip"``, in training), or raise.
    """

    def __init__(
        self, samples: Samples, transform: Any, seed: int = 0, on_bad_image: Literal["skip", "raise"] = "raise"
    ) -> None:
        self.samples, self.transform, self.seed, self.on_bad_image = samples, transform, seed, on_bad_image
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, position = key if isinstance(key, tuple) else (None, key)
        image, position = self._read(position)
        if epoch is None:
            return self.transform(image), int(self.samples.labels[position]), position
        with _seeded(self.seed, epoch, position):
            return self.transform(image), int(self.samples.labels[position]), position

    def _read(self, position: int) -> tuple[Any, int]:
        for _ in range(_SUBSTITUTES):
            try:
                return read_image(self.samples.open(position)), position
            except (ImageError, OSError) as error:
                message = f"{self.samples.name(position)}: {error}"
                if self.on_bad_image == "raise":
                    raise ValueError(message) from error
                if position not in self._named:
                    self._named.add(position)
                    _logger.warning("%s; the next image takes its place", message)
                position = (position + 1) % len(self.samples)
        raise ValueError(f"{_SUBSTITUTES} images in a row cannot be read, the last {message}")


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, position) pairs in an order drawn from (seed, epoch).

    The last batch is dropped when it is not full, unless it is the only one.

    Args:
        length: number of images.
        batch_size: images a batch.
        seed: of the order.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, min(batch_size, length), seed
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Draw the next order for this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start, self.start = self.start, 0
        generator = torch.Generator().manual_seed(zlib.crc32(np.array([self.seed, self.epoch]).tobytes()))
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(start, len(self)):
            yield [
                (self.epoch, position) for position in order[batch * self.batch_size : (batch + 1) * self.batch_size]
            ]


class TrainLoader(DataLoader[Any]):
    """A loader that knows where it stands, for checkpoints (Lightning saves ``state_dict`` of such loaders)."""

    _epoch, _start, _given = 0, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Say, before its first batch, which epoch the next iteration is."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it that were given out; a finished epoch counts as the start of the next."""
        if self._given >= len(self):
            return {"epoch": self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin where the state says."""
        self._epoch, self._start, self._given = state["epoch"], state["batches"], state["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self._start = self._start, 0
        order: Any = self.batch_sampler if isinstance(self.batch_sampler, EpochOrder) else self.dataset
        order.set_epoch(self._epoch)
        if isinstance(order, EpochOrder):
            order.start = start
            batches: Iterator[Any] = super().__iter__()
        else:  # a stream has no positions: read past what was seen
            batches = itertools.islice(super().__iter__(), start, None)
        self._given = start
        for batch in batches:
            self._given += 1
            yield batch


def worker_count(config: DataConfig) -> int:
    """Loader processes: the configured number, else one a core up to 8, none for the digits, which lie in memory."""
    if config.workers is not None:
        return config.workers
    return 0 if config.source == "digits" else min(os.cpu_count() or 1, 8)


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; a worker that died of them would take the last step along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _StreamDataset(IterableDataset[tuple[Tensor, int, int]]):
    """timm's iterable data set with positions, so that its batches look like the others."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        for position, (image, label) in enumerate(self.dataset):
            yield image, label, position

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


class _TrainStreamDataset(_StreamDataset):
    """An epoch of known length: timm fills the last batch of each loader process from the front. An evaluation has
    none, because how many batches there are depends on how shards fall to processes."""

    def __len__(self) -> int:
        return len(self.dataset)


def train_loader(samples: Samples | Stream, config: DataConfig, data_config: dict[str, Any], seed: int) -> TrainLoader:
    """Augmented batches ``images, labels, positions`` in an order drawn anew each epoch.

    Args:
        samples: the training split.
        config: batch size, workers and augmentation.
        data_config: preprocessing as timm resolves it.
        seed: of order and augmentation.
    """
    transform = train_transform(config, data_config)
    workers = worker_count(config)
    common: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_signals_to_the_main_process,
        "generator": torch.Generator().manual_seed(seed),  # else each epoch would draw from torch's own
    }
    if isinstance(samples, Stream):
        dataset = samples.dataset(is_training=True, batch_size=config.batch_size, seed=seed, transform=transform)
        dataset.set_loader_cfg(num_workers=workers)
        return TrainLoader(_TrainStreamDataset(dataset), batch_size=config.batch_size, drop_last=True, **common)
    order = EpochOrder(len(samples), config.batch_size, seed)
    return TrainLoader(ImageDataset(samples, transform, seed, config.on_bad_image), batch_sampler=order, **common)


def evaluation_loader(samples: Samples | Stream, config: DataConfig, data_config: dict[str, Any]) -> DataLoader[Any]:
    """Batches ``images, labels, positions``, each image once, in order.

    Args:
        samples: a split.
        config: batch size and workers.
        data_config: preprocessing as timm resolves it.
    """
    transform = evaluation_transform(data_config)
    workers = worker_count(config)
    dataset: Any
    if isinstance(samples, Stream):
        stream = samples.dataset(is_training=False, batch_size=config.batch_size, seed=0, transform=transform)
        stream.set_loader_cfg(num_workers=workers)
        dataset = _StreamDataset(stream)
    else:
        dataset = ImageDataset(samples, transform)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )
