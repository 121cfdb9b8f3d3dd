"""Batches out: transforms, the order of an epoch, and loaders that can go on from the middle of one.

The order of the images is a function of (seed, epoch), the augmentation of an image one of (seed, epoch, position):
neither depends on the number of workers, nor on where a run was interrupted. Several processes take the batches of one:
``n`` with batches of ``b`` images train on what one with batches of ``n * b`` would, and evaluate each image once.
"""

from __future__ import annotations

import logging
import random
import re
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torchvision import transforms

from epsanet._processes import cores, rank, world_size
from epsanet.data.config import DataConfig
from epsanet.data.images import ImageError, read_image
from epsanet.data.samples import Samples
from epsanet.data.streams import Part, Stream, cut

__all__ = [
    "EvaluationLoader",
    "ImageDataset",
    "Loader",
    "SkippingDataset",
    "StreamDataset",
    "TrainLoader",
    "asked_for",
    "check_enough",
    "evaluation_loader",
    "evaluation_transform",
    "seeded",
    "train_loader",
    "train_transform",
]

_logger = logging.getLogger("epsanet")

_SUBSTITUTES = 100
"""So many damaged images in a row end a run that skips them: then it is not the images."""


def train_transform(config: DataConfig, data_config: dict[str, Any]) -> Any:
    """timm's training transform: a random crop, flips and what else the configuration asks for."""
    transform = create_transform(
        data_config["input_size"],
        is_training=True,
        scale=config.scale,
        ratio=config.ratio,
        hflip=config.hflip,
        vflip=config.vflip,
        color_jitter=config.color_jitter or None,  # of nothing, it would still draw numbers
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


def asked_for(data_config: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """A network's preprocessing with what the configuration wants otherwise in its place.

    Args:
        data_config: as timm resolves it.
        config: ``input_size``, ``crop_pct``, ``interpolation``, ``mean`` and ``std`` are looked at.
    """
    wanted = {key: getattr(config, key) for key in ("crop_pct", "interpolation", "mean", "std")}
    if config.input_size is not None:
        wanted["input_size"] = (data_config["input_size"][0], config.input_size, config.input_size)
    return {**data_config, **{key: value for key, value in wanted.items() if value is not None}}


def evaluation_transform(data_config: dict[str, Any]) -> Any:
    """timm's evaluation transform: resize, centre crop, normalise.

    Raises:
        ValueError: for a network of other than three channels.
    """
    channels = data_config["input_size"][0]
    if channels != 3:
        raise ValueError(
            f"the network takes {channels}-channel images, and images are read as RGB; use one with in_chans=3"
        )
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
def seeded(*key: int) -> Iterator[None]:
    """All random generators that augmentations draw from, started from a key; put back afterwards.

    A loader process draws from them for nothing else, so that they stay as they are there: NumPy's state takes as long
    to read and write as a small image to decode.
    """
    number = zlib.crc32(np.array(key, dtype=np.int64).tobytes())
    before = None
    if get_worker_info() is None:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


class SkippingDataset(Dataset[Any]):
    """Samples of which some may turn out damaged after all were checked.

    Args:
        samples: with a name each.
        on_bad_image: what to do with one that cannot be read: skip it or raise. What is skipped is named; in training
            the next one takes its place, in evaluation name and reason stand in its place.
    """

    def __init__(self, samples: Any, on_bad_image: Literal["skip", "raise"] = "raise") -> None:
        self.samples, self.on_bad_image = samples, on_bad_image
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def _read(self, position: int, read: Callable[[int], Any]) -> Any:
        """What is at a position; or its name and why it cannot be read."""
        try:
            return read(position)
        except (ImageError, OSError) as error:
            message = f"{self.samples.name(position)}: {error}"
            if self.on_bad_image == "raise":
                raise ValueError(f"{message}; mend or remove it, or use --data.on_bad_image=skip") from error
            return message

    def _read_or_next(self, position: int, read: Callable[[int], Any]) -> tuple[Any, int]:
        for _ in range(_SUBSTITUTES):
            found = self._read(position, read)
            if not isinstance(found, str):
                return found, position
            if position not in self._named:
                self._named.add(position)
                _logger.warning("%s; the next image takes its place", found)
            position = (position + 1) % len(self.samples)
        raise ValueError(f"{_SUBSTITUTES} images in a row cannot be read, the last {found}")


class ImageDataset(SkippingDataset):
    """Samples through a transform: image of shape ``3, H, W``, label, position.

    A plain position reads that image; a tuple (epoch, position), or (epoch, position, copy) of repeated augmentation,
    also fixes the augmentation.

    Args:
        samples: where the images come from.
        transform: Pillow image to tensor.
        seed: of the augmentation.
        on_bad_image: what to do when an image that passed the check cannot be read after all.
    """

    def __init__(
        self, samples: Samples, transform: Any, seed: int = 0, on_bad_image: Literal["skip", "raise"] = "raise"
    ) -> None:
        super().__init__(samples, on_bad_image)
        self.transform, self.seed = transform, seed

    def __getitem__(self, key: int | tuple[int, ...]) -> tuple[Tensor | str, int, int]:
        if not isinstance(key, tuple):
            image = self._read(key, self._image)
            shown = image if isinstance(image, str) else self.transform(image)
            return shown, int(self.samples.labels[key]), key
        epoch, position, *copy = key
        image, position = self._read_or_next(position, self._image)
        with seeded(self.seed, epoch, position, *copy):
            return self.transform(image), int(self.samples.labels[position]), position

    def _image(self, position: int) -> Image.Image:
        return read_image(self.samples.open(position))


class EpochOrder(Sampler[list[tuple[int, ...]]]):
    """Batches of (epoch, position) in an order drawn from (seed, epoch); each process has its slice of a step.

    The last step is dropped when it is not full, unless it is the only one.

    Args:
        length: number of images, at least one for each process.
        batch_size: images a batch in each process.
        seed: of the order.
        repeats: so many augmentations of each image follow each other, as (epoch, position, copy); an epoch is as
            long as without, and has the fewer images (repeated augmentation, Berman et al. 2019, arXiv:1902.05509).
    """

    def __init__(self, length: int, batch_size: int, seed: int, repeats: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, min(batch_size, length // world_size()), seed
        self.repeats = repeats
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * world_size())

    def set_epoch(self, epoch: int) -> None:
        """Draw the next order for this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        start, self.start = self.start, 0
        generator = torch.Generator().manual_seed(zlib.crc32(np.array([self.seed, self.epoch]).tobytes()))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step in range(start, len(self)):
            first = (step * world_size() + rank()) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.repeats == 1:
                yield [(self.epoch, order[place]) for place in places]
            else:
                yield [(self.epoch, order[place // self.repeats], place % self.repeats) for place in places]


def _fitting(length: int, batch_size: int) -> int:
    """The batch size of an evaluation: smaller ones where some process would be left without any batch."""
    return max(1, length // world_size()) if length <= batch_size * (world_size() - 1) else batch_size


class EvaluationOrder(Sampler[list[int]]):
    """Every so many batches of those that one process would see, so that several give its numbers to the last bit.

    Args:
        length: number of images.
        batch_size: images a batch.
    """

    def __init__(self, length: int, batch_size: int) -> None:
        self.length, self.batch_size = length, _fitting(length, batch_size)

    def _starts(self) -> range:
        return range(rank() * self.batch_size, self.length, world_size() * self.batch_size)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts():
            yield list(range(start, min(start + self.batch_size, self.length)))


_TOLD = re.compile(r"Caught (\w+) in DataLoader worker process .*^(?:[\w.]+\.)?\1(?:: (.+))?", re.DOTALL | re.MULTILINE)
"""What torch makes of the error of a loader process; its last part is the error's own text."""


class Loader(DataLoader[Any]):
    """A loader whose processes fail with the text of their error; torch makes it that of a whole traceback.

    Raises:
        ValueError: or OSError, of the same type, when one was raised where batches are made.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except Exception as error:
            told = _TOLD.match(str(error))
            if told is None:
                raise
            # Torch's variables keep each other alive by the traceback, and with them the processes. At its end, Python
            # would wait for these without end: they leave SIGTERM alone.
            error.__traceback__ = None
            self._iterator = None
            if isinstance(error, ValueError | OSError):
                raise type(error)((told[2] or told[1]).strip()) from error
            raise error from None


class TrainLoader(Loader):
    """A loader that knows where it stands, for checkpoints (Lightning saves ``state_dict`` of such loaders)."""

    _epoch, _start, _given = 0, 0, 0
    waited = 0.0
    """Seconds that this epoch's batches were waited for."""

    def set_epoch(self, epoch: int) -> None:
        """Say, before its first batch, which epoch the next iteration is."""
        self._epoch = epoch

    @property
    def parts(self) -> list[int] | None:
        """Processes, and workers of each, that read a range of a stream; else the order does not depend on them."""
        return [world_size(), self.num_workers] if isinstance(self.dataset, StreamDataset) else None

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
        order.start = start
        self._given, self.waited = start, 0.0
        asked = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - asked
            self._given += 1
            yield batch
            asked = time.perf_counter()


class EvaluationLoader(Loader):
    """Batches of the images that can be read; the others are named, each once, and left out.

    Args:
        dataset: gives name and reason in the place of an image that cannot be read.
        order: of its positions.
        collate: makes a batch of the others.
        **options: of torch's loader.

    Raises:
        ValueError: when none of this process's images can be read, or none of many in a row.
    """

    def __init__(
        self,
        dataset: SkippingDataset,
        order: EvaluationOrder,
        collate: Callable[[list[Any]], Any] = default_collate,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=order, collate_fn=partial(_collate, collate), **options)
        self._named: set[str] = set()  # here, because loader processes last for one pass only

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        given, in_a_row = 0, 0
        for batch, bad in super().__iter__():
            for name in bad:
                if name not in self._named:
                    self._named.add(name)
                    _logger.warning("skipped %s", name)
            if batch is not None:
                given, in_a_row = given + 1, 0
                yield batch
                continue
            in_a_row += len(bad)
            if in_a_row >= _SUBSTITUTES:
                raise ValueError(f"{in_a_row} images in a row cannot be read, the last {bad[-1]}")
        if in_a_row and not given:
            raise ValueError(f"none of {in_a_row} images can be read, the last {bad[-1]}")


def _collate(collate: Callable[[list[Any]], Any], items: list[Any]) -> tuple[Any, list[str]]:
    """A batch of the images that can be read, if there are any, and names and reasons of the others."""
    good = [item for item in items if not isinstance(item[0], str)]
    return collate(good) if good else None, [item[0] for item in items if isinstance(item[0], str)]


def worker_count(config: DataConfig) -> int:
    """Loader processes: the configured number, else one a core up to 8, none for the digits, which lie in memory."""
    if config.workers is not None:
        return config.workers
    return 0 if config.source in ("digits", "digits-detection") else min(len(cores()), 8)


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C and SIGTERM reach a whole process group; a worker that died of them would take the last step along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StreamDataset(IterableDataset[tuple[Tensor, int, int]]):
    """A stream through a transform: image of shape ``3, H, W``, label, position in the stream.

    Each process and worker reads a range of its own. In training the ranges are whole batches, as many for each
    process; so fewer samples than one batch of all processes are left out, others each epoch.

    Args:
        samples: the stream.
        transform: Pillow image to tensor.
        batch_size: of the loader that reads this.
        seed: of order and augmentation in training; evaluation when left out.
        on_bad_image: name and skip what cannot be read, or raise. In training, the next readable image is taken
            once more instead, because every process must make as many steps.
    """

    def __init__(
        self,
        samples: Stream,
        transform: Any,
        batch_size: int,
        seed: int | None = None,
        on_bad_image: Literal["skip", "raise"] = "raise",
    ) -> None:
        self.samples, self.transform, self.seed, self.on_bad_image = samples, transform, seed, on_bad_image
        self.process, self.processes = rank(), world_size()
        self.batch_size = min(batch_size, len(samples)) if self.processes == 1 else batch_size
        if seed is None:
            self.batch_size = _fitting(len(samples), batch_size)
        self._named: set[int] = set()
        # Shared, because workers that live on from epoch to epoch have a copy of this data set.
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def start(self) -> int:
        """Batches of the epoch that were given out before."""
        return int(self._place[1])

    @start.setter
    def start(self, batches: int) -> None:
        self._place[1] = batches

    def set_epoch(self, epoch: int) -> None:
        """Draw the next order for this epoch."""
        self._place[0] = epoch

    @property
    def _batches(self) -> int:
        """Of all processes."""
        if self.seed is None:
            return -(-len(self.samples) // self.batch_size)
        return len(self.samples) // (self.batch_size * self.processes) * self.processes

    def _part(self, worker: int, workers: int, start: int) -> Part:
        place = {"process": self.process, "processes": self.processes, "worker": worker, "workers": workers}
        return cut(self._batches, self.batch_size, len(self.samples), start=start, **place)

    def __len__(self) -> int:
        whole = self._part(0, 1, 0)
        return whole.last - whole.first

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        epoch, start = self._place.tolist()
        part = self._part(worker.id if worker else 0, worker.num_workers if worker else 1, start)
        if self.seed is None:
            yield from (
                (self.transform(image), label, position) for image, label, position in self._read(part) if image
            )
            return
        last, owed = None, 0
        for image, label, position in self._read(part, (self.seed, epoch)):
            owed += 1
            if image is not None:
                last = image, label, position
                yield from self._augmented(*last, epoch, owed)
                owed = 0
            elif owed == _SUBSTITUTES:
                raise ValueError(f"{owed} images in a row cannot be read, the last {self.samples.name(position)}")
        if last is not None:
            yield from self._augmented(*last, epoch, owed)
        elif owed:
            raise ValueError(f"none of {owed} images can be read, the last {self.samples.name(position)}")

    def _read(self, part: Part, shuffle: tuple[int, int] | None = None) -> Iterator[tuple[Any, int, int]]:
        """Image, label and position of a part; no image where it cannot be read."""
        for source, label, position in self.samples.read(part, shuffle):
            image = None
            try:
                image = read_image(source)
            except (ImageError, OSError) as error:
                message = f"{self.samples.name(position)}: {error}"
                if self.on_bad_image == "raise":
                    raise ValueError(f"{message}; mend or remove it, or use --data.on_bad_image=skip") from error
                if position not in self._named:
                    self._named.add(position)
                    _logger.warning("skipped %s", message)
            yield image, label, position

    def _augmented(
        self, image: Any, label: int, position: int, epoch: int, times: int
    ) -> Iterator[tuple[Tensor, int, int]]:
        assert self.seed is not None
        for copy in reversed(range(times)):  # the last is 0, as if it came alone: a run that goes on has only that
            with seeded(self.seed, epoch, position, copy):
                augmented = self.transform(image)
            yield augmented, label, position


def train_loader(
    samples: Samples | Stream, config: DataConfig, data_config: dict[str, Any], seed: int, *, pin_memory: bool = False
) -> TrainLoader:
    """Augmented batches ``images, labels, positions`` in an order drawn anew each epoch.

    Args:
        samples: the training split.
        config: batch size, workers and augmentation.
        data_config: preprocessing as timm resolves it.
        seed: of order and augmentation.
        pin_memory: whether batches lie where a GPU can fetch them while it computes.

    Raises:
        ValueError: when there are more processes than images, or a stream is to repeat augmentation.
    """
    transform = train_transform(config, data_config)
    workers = worker_count(config)
    common: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": _leave_signals_to_the_main_process,
        "generator": torch.Generator().manual_seed(seed),  # else each epoch would draw from torch's own
        "pin_memory": pin_memory,
    }
    if isinstance(samples, Stream):
        if config.aug_repeats > 1:
            raise ValueError("data.aug_repeats is for data sets that are not streamed; leave it or data.streaming out")
        stream = StreamDataset(samples, transform, config.batch_size, seed, config.on_bad_image)
        return TrainLoader(stream, batch_size=stream.batch_size, drop_last=True, **common)
    if len(samples) < world_size():
        raise ValueError(f"{config.source} has {len(samples)} images to train on for {world_size()} processes")
    order = EpochOrder(len(samples), config.batch_size, seed, config.aug_repeats)
    return TrainLoader(ImageDataset(samples, transform, seed, config.on_bad_image), batch_sampler=order, **common)


def check_enough(samples: Sized, config: DataConfig) -> None:
    """Raise a ``ValueError`` when a process would have no image to look at."""
    if len(samples) < world_size() > 1:
        raise ValueError(
            f"{config.source} has {len(samples)} images to look at for {world_size()} processes; start fewer"
        )


def evaluation_loader(
    samples: Samples | Stream, config: DataConfig, data_config: dict[str, Any], *, pin_memory: bool = False
) -> Loader:
    """Batches ``images, labels, positions``, each image that can be read once in one of the processes, in order.

    Args:
        samples: a split.
        config: batch size, workers, and what to do with images that cannot be read.
        data_config: preprocessing as timm resolves it.
        pin_memory: whether batches lie where a GPU can fetch them while it computes.

    Raises:
        ValueError: when there are more processes than images.
    """
    check_enough(samples, config)
    transform = evaluation_transform(data_config)
    workers = worker_count(config)
    common: dict[str, Any] = {
        "num_workers": workers,
        "worker_init_fn": _leave_signals_to_the_main_process,
        "generator": torch.Generator(),
        "pin_memory": pin_memory,
    }
    if isinstance(samples, Stream):
        stream = StreamDataset(samples, transform, config.batch_size, on_bad_image=config.on_bad_image)
        return Loader(stream, batch_size=stream.batch_size, **common)
    order = EvaluationOrder(len(samples), config.batch_size)
    return EvaluationLoader(ImageDataset(samples, transform, on_bad_image=config.on_bad_image), order, **common)
