"""Pack a data set into WebDataset shards: a few large files instead of millions of small ones."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from epsanet._files import atomic_folder
from epsanet._processes import cores
from epsanet.data.config import DataConfig
from epsanet.data.images import ImageError, read_image
from epsanet.data.samples import Samples
from epsanet.data.sources import SPLIT_SEED, open_splits

__all__ = ["ShardReport", "write_shards"]

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are packed as they are, by Pillow's names; every reader of shards knows them."""


@dataclass(kw_only=True)
class ShardReport:
    """What was packed."""

    class_names: list[str]
    """In the order of the labels."""
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    """File names of each split, and the number of images in each."""
    bad: dict[str, str] = field(default_factory=dict)
    """Images that cannot be read by name, and why; they were left out."""


def write_shards(
    source: str | DataConfig,
    destination: str | Path,
    *,
    shard_size: int = 1000,
    on_bad_image: Literal["skip", "raise"] = "skip",
    progress: Callable[[Iterable[str], int], Iterable[str]] = lambda items, _: items,
) -> ShardReport:
    """Write shards and an ``info.json`` that this package and timm read: as ``wds/DESTINATION``, with no more flags.

    JPEG, PNG and WebP files are packed byte for byte, other formats as PNG with the same pixels. Images are shuffled,
    always in the same way, so that a reader which goes through a shard from front to back meets all classes. Each
    image is decoded once, so that no damaged one is packed.

    Args:
        source: an image folder, or whatever else ``--data`` takes; a configuration also says where its images and
            labels are. It is never streamed.
        destination: the folder to make.
        shard_size: images a shard, at most.
        on_bad_image: leave damaged images out, or stop at the first; then nothing is written.
        progress: wraps the names of the images as they are packed, with their number.

    Raises:
        ValueError: when there is no such data set, the destination is there already, a split has no readable image,
            or at a damaged image with ``on_bad_image="raise"``.
    """
    destination = Path(destination)
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size} is impossible; use 1 or more images")
    if destination.exists():
        raise ValueError(f"{destination} is there already; choose another folder, or remove it")
    config = source if isinstance(source, DataConfig) else DataConfig(source=source)
    opened, class_names = open_splits(replace(config, streaming=False))
    splits = {split: samples for split, samples in opened.items() if isinstance(samples, Samples)}
    assert len(splits) == len(opened), "nothing was asked to be streamed"
    if list(splits) == ["all"]:
        splits = {"train": splits["all"]}
    report = ShardReport(class_names=class_names)
    with atomic_folder(destination) as folder:
        names = _pack(folder, splits, shard_size, on_bad_image, report)
        deque(progress(names, sum(map(len, splits.values()))), maxlen=0)
        entries = {split: _entry(split, files) for split, files in report.shards.items()}
        info = {"class_names": class_names, "splits": entries}
        (folder / "info.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
    return report


def _entry(split: str, files: dict[str, int]) -> dict[str, Any]:
    """As timm's reader wants it."""
    lengths = list(files.values())
    return {"name": split, "num_samples": sum(lengths), "filenames": list(files), "shard_lengths": lengths}


def _pack(
    folder: Path, splits: dict[str, Samples], shard_size: int, on_bad_image: str, report: ShardReport
) -> Iterator[str]:
    """Write the shards; names the images as it goes."""
    for split, samples in splits.items():
        order = np.random.default_rng(SPLIT_SEED).permutation(len(samples)).tolist()
        count = -(-len(samples) // shard_size)
        report.shards[split] = {}
        for number in range(count):
            file = f"{split}-{number:0{max(4, len(str(count - 1)))}}.tar"
            report.shards[split][file] = 0
            part = order[number * len(order) // count : (number + 1) * len(order) // count]
            for name, bad in _pack_shard(folder / file, samples, part, number):
                if bad and on_bad_image == "raise":
                    raise ValueError(f"{name}: {bad}; mend or remove it, or use --on_bad_image=skip")
                if bad:
                    report.bad[name] = bad
                else:
                    report.shards[split][file] += 1
                yield name
            if not report.shards[split][file]:
                del report.shards[split][file]
                (folder / file).unlink()
        if not report.shards[split]:
            raise ValueError(f"the {split} split has no readable image; {len(samples):,} were tried")


def _pack_shard(path: Path, samples: Samples, positions: list[int], number: int) -> Iterator[tuple[str, str]]:
    """Write one shard; the name of each image, and why it was left out."""
    pool = ThreadPoolExecutor(max_workers=len(cores()))
    try:
        with tarfile.open(path, "w") as tar:
            contents = pool.map(partial(_content, samples), positions)
            for place, (position, content) in enumerate(zip(positions, contents, strict=True)):
                name = samples.name(position)
                if not isinstance(content, str):
                    _add(tar, f"{number:04}{place:06}_{_plain(name)}", content, int(samples.labels[position]))
                yield name, content if isinstance(content, str) else ""
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not decode the rest


def _content(samples: Samples, position: int) -> tuple[str, bytes] | str:
    """Suffix and bytes to pack, or why the image cannot be read."""
    try:
        source = samples.open(position)
        image = read_image(source)
        if not isinstance(source, Image.Image):
            content = source.read_bytes() if isinstance(source, Path) else _rewound(source).read()
            with Image.open(io.BytesIO(content)) as opened:
                if opened.format in _SUFFIXES:
                    return _SUFFIXES[opened.format], content
    except (ImageError, OSError) as error:
        return str(error)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()


def _rewound(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    return file


def _plain(name: str) -> str:
    """Class folder and file of an image in the letters that every reader of shards takes; a dot would end the name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "/".join(PurePath(name).with_suffix("").parts[-2:])).strip("-")


def _add(tar: tarfile.TarFile, key: str, content: tuple[str, bytes], label: int) -> None:
    for suffix, data in (content, ("cls", str(label).encode())):
        entry = tarfile.TarInfo(f"{key}.{suffix}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
