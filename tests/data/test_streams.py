"""Streams are cut among processes and workers without loss or repetition, and go on where they were interrupted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from making import parquet, pixels, png
from pyarrow import parquet as arrow
from test_loaders import PREPROCESSING, config, epoch_of, in_process, same

from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.loaders import evaluation_loader, train_loader
from epsanet.data.sources import open_data, open_split
from epsanet.data.streams import Part, Stream, cut

PLAIN: dict[str, Any] = {
    "scale": (1, 1),
    "ratio": (1, 1),
    "hflip": 0,
    "vflip": 0,
    "color_jitter": 0,
    "re_prob": 0,
    "auto_augment": None,
}
EXACT = {**PREPROCESSING, "input_size": (3, 12, 12), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
COUNT = 47


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """47 training images of 3 classes in three files of uneven row groups, and 10 for validation."""
    for number, (start, count, rows) in enumerate([(0, 20, 7), (20, 3, 1), (23, 24, 24)]):
        labels: list[object] = [n % 3 for n in range(start, start + count)]
        path = tmp_path / "data" / f"train-0000{number}-of-00003.parquet"
        parquet(path, labels, names=["a", "b", "c"], start=start, row_group_size=rows)
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [n % 3 for n in range(10)], names=["a", "b", "c"])
    return tmp_path / "data"


def streamed(folder: Path, **options: Any) -> DataConfig:
    return config(source=str(folder), root=str(folder.parent / "cache"), streaming=True, **options)


def stream(source: DataConfig) -> Stream:
    found = open_data(source).train
    assert isinstance(found, Stream)
    return found


def batches(loader: Any) -> list[list[tuple[bytes, int, int]]]:
    """Pixels, label and position of each image, by batch."""
    return [
        [
            ((image * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0).tobytes(), label, place)
            for image, label, place in zip(images, labels.tolist(), places.tolist(), strict=True)
        ]
        for images, labels, places in loader
    ]


WANTED = [(pixels(n % 3, n).tobytes(), n % 3, n) for n in range(COUNT)]
"""What the training files hold; the position is the row's, counted over all files."""


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_ranges_hold_every_place_once_and_go_on_from_any_batch(processes: int, workers: int) -> None:
    for total, batches, start in [
        (40, 10, 0),
        (40, 10, 1),
        (40, 10, 2),
        (38, 10, 3),
        (3, 1, 0),
        (0, 0, 0),
        (60, 15, 4),
    ]:
        places: list[int] = []
        for process in range(processes):
            mine = (process + 1) * batches // processes - process * batches // processes
            place = {"process": process, "processes": processes, "workers": workers}
            whole = [cut(batches, 4, total, worker=worker, start=0, **place) for worker in range(workers)]
            places += [place for part in whole for place in range(part.first, part.last)]
            # A loader takes the batches of its workers in turns, those of the whole epoch and those of the rest.
            cuts = [[(p.first + n, min(p.first + n + 4, p.last)) for n in range(0, p.last - p.first, 4)] for p in whole]
            order = [cuts[turn % workers][turn // workers] for turn in range(mine)]
            assert sum(map(len, cuts)) == mine
            if start > mine:
                continue
            rest = [cut(batches, 4, total, worker=worker, start=start, **place) for worker in range(workers)]
            left = [[(n, min(n + 4, p.last)) for n in range(p.first + p.skip, p.last, 4)] for p in rest]
            assert [left[turn % workers][turn // workers] for turn in range(mine - start)] == order[start:]
        assert sorted(places) == list(range(total))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_and_training_see_each_image_at_most_once_on_any_number_of_processes(
    folder: Path, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = streamed(folder, workers=workers, **PLAIN)
    samples = stream(source)
    evaluated, trained = [], []
    for rank in range(processes):
        in_process(monkeypatch, rank, processes)
        loader = evaluation_loader(samples, source, EXACT)
        evaluated.append(batches(loader))
        assert len(loader) == len(evaluated[-1])
        training = train_loader(samples, source, EXACT, seed=3)
        trained.append(batches(training))
        assert len(training) == len(trained[-1])
    assert (
        sorted((row for process in evaluated for batch in process for row in batch), key=lambda row: row[2]) == WANTED
    )
    # 47 images give 11 batches of 4 in all: fewer than one batch of all processes is left out.
    assert [len(process) for process in trained] == [11 // processes] * processes
    assert {len(batch) for process in trained for batch in process} == {4}
    seen = [row for process in trained for batch in process for row in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(WANTED)
    assert [place for _, _, place in seen] != sorted(place for _, _, place in seen)


def test_each_epoch_and_seed_has_its_own_order_and_leaves_out_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epsanet.data.streams.SHUFFLE_BUFFER", 8)
    samples = stream(streamed(folder))
    loader = train_loader(samples, streamed(folder, **PLAIN), EXACT, seed=3)
    orders = []
    for epoch in range(8):
        loader.set_epoch(epoch)
        orders.append([place for batch in batches(loader) for _, _, place in batch])
        assert len(set(orders[-1])) == len(orders[-1]) == 44
    assert len(set(map(tuple, orders))) == 8
    left_out = Counter(place for order in orders for place in set(range(COUNT)) - set(order))
    assert len(left_out) > 3
    other = train_loader(samples, streamed(folder, **PLAIN), EXACT, seed=4)
    assert [place for batch in batches(other) for _, _, place in batch] != orders[0]
    again = train_loader(samples, streamed(folder, **PLAIN), EXACT, seed=3)
    assert [place for batch in batches(again) for _, _, place in batch] == orders[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_stream_goes_on_with_exactly_the_remaining_batches(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epsanet.data.streams.SHUFFLE_BUFFER", 8)
    source = streamed(folder, workers=workers)
    samples = stream(source)
    loader = train_loader(samples, source, PREPROCESSING, seed=7)
    whole = [epoch_of(loader, epoch) for epoch in (0, 1)]
    assert not same(*whole)
    for given in (0, 1, 4) if workers == 0 else (5,):
        later = train_loader(samples, source, PREPROCESSING, seed=7)
        later.load_state_dict({"epoch": 1, "batches": given})
        torch.rand(3)  # what else was drawn does not matter
        rest = [(images, labels.tolist(), places.tolist()) for images, labels, places in later]
        assert same(rest, whole[1][given:])
        assert same(epoch_of(later, 0), whole[0]), "only the first iteration begins in the middle"


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """The folder with two images that cannot be read, one after the other, and one at the very end."""
    for path in sorted(folder.glob("train-*")):
        table = arrow.read_table(path)
        images = table["image"].to_pylist()
        for row, image in enumerate(images):
            if (path.name[:11], row) in {("train-00000", 4), ("train-00000", 5), ("train-00002", 23)}:
                image["bytes"] = b"no image"
        changed = table.set_column(
            0, table.schema.field("image"), pyarrow.array(images, table.schema.field("image").type)
        )
        arrow.write_table(changed, path, row_group_size=50)
    return folder


def test_an_image_that_cannot_be_read_is_named_once_and_changes_nothing_else(
    spoilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = streamed(spoilt, workers=0, batch_size=1, **PLAIN)
    samples = stream(source)
    good = [row for row in WANTED if row[2] not in (4, 5, 46)]
    assert [row for batch in batches(evaluation_loader(samples, source, EXACT)) for row in batch] == good
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped {spoilt}/{name}.parquet[{row}]: not an image that can be identified"
        for name, row in [("train-00000-of-00003", 4), ("train-00000-of-00003", 5), ("train-00002-of-00003", 23)]
    ]
    caplog.clear()
    loader = train_loader(samples, source, EXACT, seed=0)
    for _ in range(2):
        seen = Counter(row for batch in batches(loader) for row in batch)
        assert set(seen) == set(good)
        assert seen.total() == COUNT, "every process must make as many steps, so others are taken once more"
    assert len(caplog.records) == 3
    source = streamed(spoilt, workers=0, on_bad_image="raise")
    with pytest.raises(
        ValueError, match=r"train-00000-of-00003\.parquet\[4\]: not an image .*--data\.on_bad_image=skip"
    ):
        list(evaluation_loader(samples, source, EXACT))


def test_an_interrupted_stream_with_images_that_cannot_be_read_goes_on_exactly(spoilt: Path) -> None:
    """Wherever it was interrupted: what stands in for an image may lie on both sides."""
    source = streamed(spoilt, workers=0, batch_size=2)
    samples = stream(source)
    loader = train_loader(samples, source, PREPROCESSING, seed=7)
    across = 0
    for epoch in range(6):
        whole = epoch_of(loader, epoch)
        places = [batch[2] for batch in whole]
        for given in range(1, len(whole)):
            later = train_loader(samples, source, PREPROCESSING, seed=7)
            later.load_state_dict({"epoch": epoch, "batches": given})
            rest = [(images, labels.tolist(), places.tolist()) for images, labels, places in later]
            assert same(rest, whole[given:]), (epoch, given)
            across += places[given - 1][-1] == places[given][0]
    assert across, "no image was taken twice, before and after an interruption"


@pytest.mark.parametrize(("images", "batch_size", "processes"), [(10, 64, 2), (10, 4, 4), (3, 1, 3), (10, 5, 3)])
def test_each_process_has_something_to_evaluate(
    images: int, batch_size: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = tmp_path / "data", str(tmp_path / "cache")
    parquet(folder / "test-00000-of-00001.parquet", [n % 3 for n in range(images)], names=["a", "b", "c"])
    for streaming in (True, False):
        source = config(source=str(folder), root=root, streaming=streaming, workers=0, batch_size=batch_size)
        samples, _, _ = open_split(source, None, None)
        seen = []
        for rank in range(processes):
            in_process(monkeypatch, rank, processes)
            loader = evaluation_loader(samples, source, EXACT)
            found = batches(loader)
            assert len(loader) == len(found) > 0
            seen += [place for batch in found for _, _, place in batch]
        assert sorted(seen) == list(range(images))
        in_process(monkeypatch, 0, images + 1)
        with pytest.raises(ValueError, match=f"{images} images to look at for {images + 1} processes; start fewer"):
            evaluation_loader(samples, source, EXACT)
        monkeypatch.undo()


def test_a_stream_without_a_readable_image_ends_the_run(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [b"x"] * 3, "label": [0, 0, 0]})
    arrow.write_table(table, tmp_path / "x.parquet")
    samples = Stream("x", [str(tmp_path / "x.parquet")], DataConfig(), ["a"])
    with pytest.raises(ValueError, match="none of 3 images can be read"):
        list(train_loader(samples, config(batch_size=1), PREPROCESSING, seed=0))


def test_streams_follow_the_class_names_of_a_network(folder: Path) -> None:
    split, name, _ = open_split(streamed(folder), "val", ["c", "x", "a", "b"])
    assert isinstance(split, Stream)
    assert (name, len(split)) == ("validation", 10)
    found = [label for batch in batches(evaluation_loader(split, streamed(folder), EXACT)) for _, label, _ in batch]
    assert found == [[2, 3, 0][n % 3] for n in range(10)]
    with pytest.raises(ValueError, match="the validation split does not fit: 1 of 3 classes are unknown: 'c'"):
        open_split(streamed(folder), "val", ["a", "b"])


def test_a_stream_is_opened_by_the_address_that_the_hub_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of fsspec that is not the disk stands in for the Hub's."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/hub/{path.name}", path.read_bytes())
    files = {
        split: [f"memory://hub/{path.name}" for path in sorted(folder.glob(f"{split}-*"))]
        for split in ("train", "validation")
    }
    asked: list[str] = []

    def builder(path: str, cache_dir: str | None) -> Any:
        del cache_dir
        asked.append(path)
        return SimpleNamespace(config=SimpleNamespace(data_files=files), info=SimpleNamespace(features=None))

    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    source = config(source="hfds/someone/something", streaming=True, **PLAIN)
    splits = open_data(source)
    assert asked == ["someone/something"]
    assert [row for batch in batches(evaluation_loader(splits.train, source, EXACT)) for row in batch] == WANTED
    files["train"].append("hf://datasets/someone/something/train.tar")
    with pytest.raises(ValueError, match=r"holds hf://.*train\.tar; only Parquet is streamed, leave out --data\.str"):
        open_data(source)


def test_test_images_without_labels_are_left_out_of_streams_too(folder: Path) -> None:
    parquet(folder / "test-00000-of-00001.parquet", [-1, -1], names=["a", "b", "c"])
    assert open_data(streamed(folder)).test is None


def test_what_cannot_be_streamed_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'fine' but image, label; name them with"):
        open_data(streamed(folder, label_key="fine"))
    path = parquet(tmp_path / "plain.parquet", [0, 7])
    with pytest.raises(ValueError, match=r"names no classes; .*--data\.class_names FILE"):
        open_data(streamed(path))
    samples = Stream("plain", [str(path)], DataConfig(), ["a", "b"])
    with pytest.raises(ValueError, match=r"plain\.parquet\[1\] has the label 7, which is no place .* 2 classes"):
        list(evaluation_loader(samples, config(), EXACT))
    with pytest.raises(ValueError, match="no validation split, and none can be set aside of a stream"):
        open_data(streamed(parquet(tmp_path / "named.parquet", [0, 1], names=["a", "b"])))
    (tmp_path / "words.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match=r"words\.parquet cannot be streamed: ") as raised:
        open_data(streamed(tmp_path / "words.parquet"))
    assert "\n" not in str(raised.value)


def test_a_column_of_paths_is_read_and_one_of_numbers_is_refused(tmp_path: Path) -> None:
    wanted = [pixels(label, label) for label in (0, 1)]
    for label, image in enumerate(wanted):
        (tmp_path / f"{label}.png").write_bytes(png(image))
    paths = [str(tmp_path / f"{label}.png") for label in (0, 1)]
    arrow.write_table(pyarrow.table({"image": paths, "size": [1.5, 2.5], "label": [0, 1]}), tmp_path / "x.parquet")

    def images(key: str) -> list[np.ndarray]:
        samples = Stream("x", [str(tmp_path / "x.parquet")], DataConfig(image_key=key), ["a", "b"])
        return [np.asarray(read_image(source)) for source, _, _ in samples.read(Part(first=0, last=2))]

    assert np.array_equal(images("image"), wanted)
    with pytest.raises(ValueError, match=r"x\.parquet\[0\] has float in the column 'size', which is neither"):
        images("size")


def test_a_stream_does_not_repeat_augmentation(folder: Path) -> None:
    source = streamed(folder, aug_repeats=3)
    with pytest.raises(ValueError, match="not streamed"):
        train_loader(stream(source), source, EXACT, seed=0)
