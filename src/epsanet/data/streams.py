"""Parquet files read from front to back, here or on the Hub, by many processes without loss or repetition.

A Parquet file's footer says how many rows each of its row groups has. So the place of every row is known before any is
read, and an epoch can be cut into equal ranges: one a process, and in it one a loader worker.
"""

from __future__ import annotations

import copy
import io
import random
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from epsanet.data.config import DataConfig
from epsanet.data.samples import match_classes

__all__ = ["Part", "Stream", "cut"]

SHUFFLE_BUFFER = 1000
"""Undecoded images among which each worker draws the next one when training."""
_READ_ROWS = 64
"""Rows that are taken from a file at a time."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which samples of an epoch one loader worker reads, as a range of the epoch's order."""

    first: int
    """Place of the first."""
    last: int
    """Place after the last."""
    skip: int = 0
    """So many of them were seen before an interruption: they are read, and not decoded."""


def cut(
    batches: int, batch_size: int, total: int, *, process: int, processes: int, worker: int, workers: int, start: int
) -> Part:
    """The range of one worker: every range begins with a whole batch, and no two overlap.

    A loader takes the batches of its workers in turns. A worker's share is therefore every ``workers``-th batch of its
    process, read in one piece; after ``start`` batches the turn is another worker's.

    Args:
        batches: of the whole epoch, by all processes.
        batch_size: samples a batch.
        total: samples there are; the last batch ends there.
        process: rank of the process.
        processes: number of processes.
        worker: number of the worker in its process.
        workers: number of workers in each process.
        start: batches that this process has given out before.
    """
    below, above = process * batches // processes, (process + 1) * batches // processes
    turn = (worker + start) % workers

    def taken(turn: int, given: int) -> int:
        return max(0, -((turn - given) // workers))

    first = below + sum(taken(other, above - below) for other in range(turn))
    last = first + taken(turn, above - below)
    return Part(
        first=first * batch_size,
        last=max(first * batch_size, min(last * batch_size, total)),
        skip=taken(turn, start) * batch_size,
    )


class Stream:
    """A split that is read as it comes and not kept: Parquet files with an image and a label column.

    Args:
        name: of the split, for messages.
        files: paths or URLs that fsspec opens, for example ``hf://datasets/…``.
        config: names the columns.
        class_names: in the order of the labels; those of the files' metadata when left out.

    Raises:
        ValueError: when a file is no Parquet file, lacks a column, or nothing names the classes.
    """

    def __init__(self, name: str, files: Sequence[str], config: DataConfig, class_names: list[str] | None) -> None:
        import datasets
        import pyarrow

        self._name, self._files = name, list(files)
        self._image_key, self._label_key = config.image_key, config.label_key
        groups: list[tuple[int, int]] = []
        rows: list[int] = []
        for number, file in enumerate(self._files):
            try:
                with _parquet(file) as opened:
                    schema, metadata = opened.schema_arrow, opened.metadata
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise ValueError(f"{file} cannot be streamed: {str(error).splitlines()[0]}") from error
            for key in (config.image_key, config.label_key):
                if key not in schema.names:
                    raise ValueError(
                        f"{file} has no column {key!r} but {', '.join(schema.names)}; "
                        "name them with --data.image_key and --data.label_key"
                    )
            groups += [(number, group) for group in range(metadata.num_row_groups)]
            rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._groups, self._starts = groups, np.cumsum([0, *rows])
        feature = datasets.Features.from_arrow_schema(schema)[config.label_key]
        names: list[str] | None = class_names or getattr(feature, "names", None)
        if names is None:
            raise ValueError(f"{name} names no classes; list them, one a line, in a file: --data.class_names FILE")
        self.class_names = list(names)
        self._places: dict[Any, int] = {label: place for place, label in enumerate(names)}
        self._places |= {place: place for place in range(len(names))}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, position: int) -> str:
        """File and row, for messages."""
        group = bisect_right(self._starts, position) - 1
        file = self._groups[group][0]
        first = self._starts[next(place for place, (number, _) in enumerate(self._groups) if number == file)]
        return f"{self._files[file]}[{position - first}]"

    def first_label(self) -> Any:
        """As the file has it; nothing when there are no rows."""
        return next((label for _, label, _ in self._rows(range(len(self._groups)), Part(first=0, last=1))), None)

    def renamed(self, class_names: list[str]) -> Stream:
        """The same rows with labels that follow other class names.

        Raises:
            ValueError: when a class of the stream is not among them.
        """
        places, _ = match_classes(self.class_names, class_names)
        other = copy.copy(self)
        other.class_names = class_names
        other._places = {label: places[place] for label, place in self._places.items()}
        return other

    def read(self, part: Part, shuffle: tuple[int, int] | None = None) -> Iterator[tuple[Path | BinaryIO, int, int]]:
        """What ``read_image`` takes, label and position of each sample of a part.

        Args:
            part: which.
            shuffle: seed and epoch of the order; the files' own order when left out.
        """
        if shuffle is None:
            rows = self._rows(range(len(self._groups)), part)
        else:
            order = np.random.default_rng([*shuffle, 0]).permutation(len(self._groups)).tolist()
            generator = random.Random(zlib.crc32(np.array([*shuffle, part.first]).tobytes()))
            rows = _shuffled(self._rows(order, part), generator)
        for number, (image, label, position) in enumerate(rows):
            if number >= part.skip:
                yield self._source(image, position), self._place(label, position), position

    def _rows(self, order: Sequence[int], part: Part) -> Iterator[tuple[Any, Any, int]]:
        """Image, label and position of the rows of a part, row groups taken in this order."""
        place = 0
        for group in order:
            file, number = self._groups[group]
            start, count = int(self._starts[group]), int(self._starts[group + 1] - self._starts[group])
            first, last = max(part.first - place, 0), min(part.last - place, count)
            place += count
            if first >= last:
                continue
            row = 0
            with _parquet(self._files[file]) as opened:
                columns = [self._image_key, self._label_key]
                for batch in opened.iter_batches(_READ_ROWS, [number], columns, use_threads=False):
                    wanted = batch.slice(max(first - row, 0), max(min(last, row + len(batch)) - max(first, row), 0))
                    positions = range(start + max(first, row), start + last)
                    row += len(batch)
                    images, labels = (wanted.column(key).to_pylist() for key in columns)
                    yield from zip(images, labels, positions, strict=False)
                    if row >= last:
                        break

    def _source(self, image: Any, position: int) -> Path | BinaryIO:
        if isinstance(image, dict):
            content = image.get("bytes")
            image = content if content is not None else image.get("path") or ""
        if isinstance(image, str):
            return Path(image)
        if not isinstance(image, bytes | None):
            raise ValueError(
                f"{self.name(position)} has {type(image).__name__} in the column {self._image_key!r}, which is neither "
                "an image nor the path of one; name another column with --data.image_key"
            )
        return io.BytesIO(image or b"")

    def _place(self, label: Any, position: int) -> int:
        if label not in self._places:
            raise ValueError(
                f"{self.name(position)} has the label {label!r}, which is no place of a name among "
                f"{len(self.class_names)} classes; a label is the place of its name, from 0 on"
            )
        return self._places[label]


def _parquet(file: str) -> Any:
    import fsspec
    from pyarrow import parquet

    filesystem, path = fsspec.core.url_to_fs(file)
    return parquet.ParquetFile(path, filesystem=filesystem)


def _shuffled(rows: Iterator[Any], generator: random.Random) -> Iterator[Any]:
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(row)
            continue
        place = generator.randrange(SHUFFLE_BUFFER)
        buffer[place], row = row, buffer[place]
        yield row
    generator.shuffle(buffer)
    yield from buffer
