"""How many images a second one core loads, from folders, shards and Parquet, against the bare JPEG decode: tables.

Counts processor time of one thread, so that other work on the machine disturbs little. Every backend holds the same
files; contenders take turns until the time is up.

Usage: python benchmarks/data.py IMAGE_FOLDER [--small PARQUET] [--seconds N] [--clock cpu|wall]
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from torchvision.io import ImageReadMode, decode_image

from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.loaders import ImageDataset, StreamDataset, evaluation_transform, train_transform
from epsanet.data.samples import Samples, Subset
from epsanet.data.shard import write_shards
from epsanet.data.sources import open_splits
from epsanet.data.streams import Stream
from epsanet.tasks.devices import processor_name

PREPROCESSING: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "center",
}
Load = Callable[[], object]


def race(contenders: dict[str, Load], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Images a second of each; each call loads one."""
    spent, done = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0)
    for load in contenders.values():
        load()
    while min(spent.values()) < seconds:
        for name, load in contenders.items():
            start = clock()
            for _ in range(20):
                load()
            spent[name] += clock() - start
            done[name] += 20
    return {name: done[name] / spent[name] for name in contenders}


def table(title: str, rates: dict[str, float], limit: float) -> None:
    print(f"\n### {title}\n\n| what one core does | images/s | of the limit |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / limit:.0%} |")


def decoders(files: list[bytes], draft: int) -> dict[str, Load]:
    """The bare decode, by several hands."""
    turns = [itertools.cycle(files) for _ in range(4)]
    tensors = itertools.cycle([torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files])

    def smaller() -> object:
        image = Image.open(io.BytesIO(next(turns[1])))
        image.draft("RGB", (draft, draft))
        return image.load()

    return {
        "decode: Pillow (the limit)": lambda: Image.open(io.BytesIO(next(turns[0]))).load(),
        f"decode: Pillow, draft at {draft} pixels or more": smaller,
        "decode: torchvision.io.decode_image": lambda: decode_image(next(tensors), ImageReadMode.RGB),
        "decode and what `read_image` adds": lambda: read_image(io.BytesIO(next(turns[2]))),
    }


def as_parquet(samples: Samples, path: Path) -> None:
    images = [{"bytes": _bytes(samples, place), "path": None} for place in range(len(samples))]
    table = pyarrow.table({"image": images, "label": samples.labels})
    parquet.write_table(table, path, row_group_size=100)


def _bytes(samples: Samples, place: int) -> bytes:
    source = samples.open(place)
    assert not isinstance(source, Image.Image)
    return source.read_bytes() if isinstance(source, Path) else source.read()


def as_folder(samples: Samples, folder: Path) -> None:
    for place in range(len(samples)):
        path = folder / samples.class_names[samples.labels[place]] / f"{place:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_bytes(samples, place))


def backends(folder: Path, place: Path) -> dict[str, Samples | Stream]:
    """The same files as a folder, as shards, and as Parquet."""
    write_shards(str(folder), place / "shards")
    samples = only(DataConfig(source=str(folder)))
    assert isinstance(samples, Samples)
    as_parquet(samples, place / "images.parquet")
    (place / "classes.txt").write_text("\n".join(samples.class_names))
    file = DataConfig(source=str(place / "images.parquet"), root=str(place / "cache"))
    file.class_names = str(place / "classes.txt")
    return {
        "folder": samples,
        "shards": only(DataConfig(source=f"wds/{place / 'shards'}")),
        "Parquet": only(file),
        "Parquet, streamed": Stream("images", [file.source], file, samples.class_names),
    }


def only(config: DataConfig) -> Samples | Stream:
    return next(iter(open_splits(config)[0].values()))


def loads(samples: Samples | Stream, config: DataConfig, size: int, *, training: bool) -> Load:
    """One image after the other, through the transform of training or evaluation."""
    data_config = PREPROCESSING | {"input_size": (3, size, size)}
    transform = train_transform(config, data_config) if training else evaluation_transform(data_config)
    epochs = itertools.count()

    def forever() -> Iterator[object]:
        if isinstance(samples, Stream):
            stream = StreamDataset(samples, transform, 1, 0 if training else None)
            for epoch in epochs:
                stream.set_epoch(epoch)
                yield from stream
        dataset = ImageDataset(samples, transform)  # type: ignore[arg-type]
        for epoch in epochs:
            for position in torch.randperm(len(dataset)).tolist():
                yield dataset[(epoch, position) if training else position]

    images = forever()
    return lambda: next(images)


def measure(
    title: str, folder: Path, config: DataConfig, size: int, seconds: float, clock: Callable[[], float]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        found = backends(folder, Path(place))
        samples = found["folder"]
        assert isinstance(samples, Samples)
        files = [_bytes(samples, position) for position in range(len(samples))]
        kilobytes = sum(map(len, files)) / len(files) / 1000
        contenders = decoders(files, size)
        for name, split in found.items():
            contenders[f"training, {name}"] = loads(split, config, size, training=True)
        for name, split in found.items():
            contenders[f"evaluation, {name}"] = loads(split, config, size, training=False)
        rates = race(contenders, seconds, clock)
    limit = rates["decode: Pillow (the limit)"]
    table(f"{title}: {len(files):,} JPEGs of {kilobytes:.1f} kB, to {size}×{size}", rates, limit)
    kinds = {name: rates[f"training, {name}"] for name in found}
    best = max(kinds, key=kinds.__getitem__)
    print(
        f"\nadvice: a device that trains on 1,000 images/s needs {1000 / kinds['folder']:.1f} such cores that load "
        f"(--data.workers) from a folder, {1000 / kinds[best]:.1f} from the best ({best})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="photographs, a folder a class")
    parser.add_argument("--small", type=Path, help="a Parquet file of small images, for example CIFAR-10's")
    parser.add_argument("--seconds", type=float, default=5, help="for each row")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    print(f"{processor_name()}, one thread, {options.clock} clock, {datetime.date.today()}")
    measure("Photographs", options.folder, DataConfig(source="photographs"), 224, options.seconds, clock)
    if options.small:
        with tempfile.TemporaryDirectory() as place:
            config = DataConfig(source=str(options.small), root=str(Path(place) / "cache"))
            whole = only(config)
            assert isinstance(whole, Samples)
            as_folder(Subset(whole, range(2000)), Path(place) / "small")
            config = DataConfig(source="small", crop_padding=4)
            measure("Small images", Path(place) / "small", config, 32, options.seconds, clock)


if __name__ == "__main__":
    main()
