"""Prediction of any number of images into one Parquet file, resumable and shared among processes.

The list of images is cut into parts of ``PARQUET_ROWS`` rows. A part is predicted by itself, in batches that do not
reach into the next, and is a file that is whole or absent in a folder beside the output. So memory does not grow with
the number of images, what is written is not done again, process ``r`` of ``n`` does every ``n``-th part, and the
merged file has the same bytes whoever did which part and however often it was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epsanet._files import atomic_file
from epsanet.data.loaders import evaluation_transform
from epsanet.network.weights import LoadedModel, load_model
from epsanet.tasks.console import messages, track
from epsanet.tasks.devices import resolve_device
from epsanet.tasks.predict import (
    Prediction,
    check_numbers,
    find_images,
    predict_batches,
    write_predictions,
)
from epsanet.tasks.tables import PARQUET_ROWS, check_output

__all__ = ["ParquetResult", "predict_to_parquet", "process_of_many"]

_DESCRIPTION, _METADATA = "job.json", b"epsanet"
_SECONDS_BETWEEN_LOOKS = 0.5
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say that have none."""


def _unsaid(_: str) -> None:
    """The first process says it."""


@dataclass(frozen=True, kw_only=True)
class ParquetResult:
    """What is in a finished file."""

    rows: int
    """One an image."""
    errors: int
    """Rows of images that could not be read."""
    resumed: int
    """Rows that were there before this run."""


def process_of_many() -> tuple[int, int]:
    """Which process this is, from 0, and of how many, as torchrun says in ``RANK`` and ``WORLD_SIZE``.

    Raises:
        ValueError: when the environment says something impossible.
    """
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and processes.isdigit() and int(rank) < int(processes)):
        raise ValueError(f"RANK={rank} of WORLD_SIZE={processes} is impossible; unset both, or start with torchrun")
    return int(rank), int(processes)


def predict_to_parquet(
    model: str | Path | LoadedModel,
    images: Sequence[str | Path],
    output: str | Path,
    *,
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
) -> ParquetResult | None:
    """Classify images into a Parquet file with the columns of ``write_predictions``, a row each, in order.

    Called again with the same arguments after an interruption, it goes on. Under torchrun every process calls it with
    the same arguments; the first waits for the others and merges. An image that changes in the meantime is not noticed.

    Args:
        model: whatever ``load_model`` takes, or a loaded model.
        images: files, folders or glob patterns.
        output: ends in .parquet; parts are in a folder of that name with ``.parts`` at its end until all are there.
        topk: classes to give for each image.
        batch_size: images at a time.
        workers: processes that read images.
        device: auto, cpu, cuda, cuda:N or mps; of several CUDA devices each process takes its own.

    Returns:
        What is in the file; nothing in a process that leaves merging to the first.

    Raises:
        ValueError: for a model, device, folder or pattern that is not there, when the parts that are there are those
            of another model, other images or other arguments, or while another run is writing them.
    """
    check_output(output)
    if Path(output).suffix != ".parquet":
        raise ValueError(f"{output} is no Parquet file; end it in .parquet")
    check_numbers(topk, batch_size, workers)
    rank, processes = process_of_many()
    place = _own_device(resolve_device(device))
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    evaluation_transform(loaded.data_config)  # before anything is written, it refuses a network that RGB does not fit
    paths = find_images(images)
    job = _Job(Path(output), len(paths), _describe(loaded, paths, topk, batch_size, place))
    with job.begun(rank):
        missing = job.missing()
        if job.is_finished():  # asked after the parts, which are removed after the end
            return job.result(resumed=len(paths))
        resumed = len(paths) - sum(len(job.parts[part]) for part in missing)
        if resumed and rank == 0:
            messages.print(f"resuming: {resumed:,} of {len(paths):,} rows are in {job.folder}")
        own = [part for part in missing if part % processes == rank]
        try:
            batches = [
                rows[first : first + batch_size]
                for rows in map(job.parts.__getitem__, own)
                for first in range(0, len(rows), batch_size)
            ]
            known, note = min(topk, len(loaded.class_names)), messages.print if rank == 0 else _unsaid
            rows = predict_batches(loaded, paths, batches, known, workers, place, note)
            _watch(job.write(own, rows, topk), sum(map(len, batches)), "predicting", rank)
            if rank > 0:
                return None
            others = job.missing()
            _watch(job.wait(others), len(others), "waiting for the parts of other processes", rank)
        except KeyboardInterrupt:
            if rank == 0:
                messages.print(f"what is done is in {job.folder}; the same command goes on from there")
            raise
        job.merge()
        return job.result(resumed=resumed)


def _watch(items: Iterable[object], total: int, title: str, rank: int) -> None:
    """Go through all items, in the first process under a bar."""
    for _ in track(items, total, title) if rank == 0 and total else items:
        pass


def _own_device(device: torch.device) -> torch.device:
    """Of several processes on one machine, each takes a CUDA device, unless one was named."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _describe(
    loaded: LoadedModel, paths: list[str], topk: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """All that rows depend on."""
    model, listed = hashlib.sha256(), hashlib.sha256()
    model.update(json.dumps([loaded.class_names, loaded.data_config], sort_keys=True).encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        model.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        model.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    for path in paths:
        listed.update(os.fsencode(path) + b"\0")
    return {
        "model": model.hexdigest(),
        "images": f"{len(paths)} {listed.hexdigest()}",
        "topk": topk,
        "batch_size": batch_size,
        "device": device.type,
        "part_rows": PARQUET_ROWS,
    }


class _Job:
    """The parts of an output, and what they are parts of."""

    def __init__(self, output: Path, images: int, description: dict[str, Any]) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.parts")
        self.images, self.description = images, description
        self.parts = [range(first, min(first + PARQUET_ROWS, images)) for first in range(0, images, PARQUET_ROWS)]

    @contextlib.contextmanager
    def begun(self, rank: int) -> Iterator[None]:
        """Make the folder or find that of an earlier run, for a block that no other run disturbs; where the output is
        finished after it, the folder is removed.

        Args:
            rank: of this process; each has a lock of its own.

        Raises:
            ValueError: when the folder holds something else, or another run is at work.
        """
        with contextlib.ExitStack() as held:
            while not self.is_finished():
                self.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # another run has ended this moment, and removed it
                    held.enter_context(self._locked(rank))
                    break
            if not self.is_finished():
                self._check()
            yield
        # Not in the block: of a folder with an open file something stays on NFS.
        if self.is_finished() and not self._is_foreign():
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self, rank: int) -> Iterator[None]:
        """The system gives the lock back however the process ends."""
        with (self.folder / f".{rank}.lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is writing {self.output}; wait for its end, or choose another --output"
                ) from error
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
            yield

    def _is_foreign(self) -> bool:
        """Whether the folder holds files, and no description of a prediction."""
        try:
            names = {file.name for file in self.folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return False
        return _DESCRIPTION not in names and any(not name.startswith(".") for name in names)

    def _check(self) -> None:
        if self._is_foreign():
            for lock in self.folder.glob(".*.lock"):
                lock.unlink()
            raise ValueError(f"{self.folder} holds no parts of a prediction; remove it or choose another --output")
        path = self.folder / _DESCRIPTION
        if not path.is_file():
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.description), encoding="utf-8")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key, value in self.description.items() if found.get(key) != value]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged; remove {self.folder} and start again") from error
        if different:
            raise ValueError(
                f"{self.folder} holds parts of another prediction: not the same {', '.join(different)}; go on with the "
                "former arguments, remove that folder, or choose another --output"
            )

    def is_finished(self) -> bool:
        """Whether the output is there and is of this very prediction."""
        from pyarrow import ArrowException, parquet

        try:
            metadata = parquet.read_schema(self.output).metadata or {}
            return bool(json.loads(metadata.get(_METADATA, b"null")) == self.description)
        except (OSError, ValueError, ArrowException):
            return False

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:08d}.parquet"

    def missing(self) -> list[int]:
        """The parts that are not there, or not whole."""
        return [part for part in range(len(self.parts)) if not self._is_whole(part)]

    def _is_whole(self, part: int) -> bool:
        from pyarrow import ArrowException, parquet

        try:
            return bool(parquet.read_metadata(self._path(part)).num_rows == len(self.parts[part]))
        except (OSError, ValueError, ArrowException):
            return False

    def write(self, parts: Iterable[int], rows: Iterator[Prediction], topk: int) -> Iterator[Prediction]:
        """Write rows into parts, each as soon as it is whole, and pass them on."""
        for part in parts:
            yield from write_predictions(self._path(part), itertools.islice(rows, len(self.parts[part])), topk)

    def wait(self, parts: Iterable[int]) -> Iterator[int]:
        """Give each part when another process has written it, or another run, where there are no locks, the output."""
        for part in parts:
            while not (self._is_whole(part) or self.is_finished()):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            yield part

    def merge(self) -> None:
        """Write the output from the parts, a row group each.

        Raises:
            ValueError: when a part is damaged.
        """
        from pyarrow import ArrowException, parquet

        if self.is_finished():
            return
        with atomic_file(self.output) as temporary:
            writer = None
            for part in range(len(self.parts)):
                try:
                    table = parquet.read_table(self._path(part), page_checksum_verification=True)
                except (OSError, ArrowException) as error:
                    raise ValueError(f"{self._path(part)} is damaged ({error}); remove it and start again") from error
                if writer is None:
                    metadata = {_METADATA: json.dumps(self.description)}
                    writer = parquet.ParquetWriter(temporary, table.schema.with_metadata(metadata))
                writer.write_table(table.replace_schema_metadata(metadata))
            assert writer is not None
            writer.close()

    def result(self, resumed: int) -> ParquetResult:
        """What is in the output."""
        from pyarrow import parquet

        with parquet.ParquetFile(self.output) as file:
            groups = (file.read_row_group(group, ["error"]) for group in range(file.num_row_groups))
            errors = sum(table.num_rows - table["error"].null_count for table in groups)
        return ParquetResult(rows=self.images, errors=errors, resumed=resumed)
