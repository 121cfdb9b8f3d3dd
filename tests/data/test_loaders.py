"""Order and augmentation are functions of (seed, epoch, position); an interrupted epoch goes on where it stood."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import class_folders
from PIL import Image
from torch.utils.data import Dataset

from epsanet.data.config import DataConfig
from epsanet.data.images import ImageError, read_image
from epsanet.data.loaders import (
    EpochOrder,
    EvaluationOrder,
    ImageDataset,
    Loader,
    TrainLoader,
    evaluation_loader,
    evaluation_transform,
    train_loader,
    train_transform,
    worker_count,
)
from epsanet.data.samples import FolderSamples

PREPROCESSING: dict[str, Any] = {
    "input_size": (3, 8, 8),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> FolderSamples:
    return FolderSamples(class_folders(tmp_path_factory.mktemp("images"), {"a": 6, "b": 5}, size=16))


def config(**options: Any) -> DataConfig:
    """With every kind of augmentation, so that each must be seeded."""
    options = {
        "hflip": 0.5,
        "vflip": 0.5,
        "color_jitter": 0.4,
        "re_prob": 0.5,
        "auto_augment": "rand-m9-mstd0.5",
    } | options
    return DataConfig(**{"batch_size": 4, "workers": 0} | options)


def positions(order: EpochOrder) -> list[int]:
    return [position for batch in order for _, position in batch]


def test_an_epoch_is_a_permutation_drawn_from_seed_and_epoch() -> None:
    order = EpochOrder(97, 1, seed=3)
    first = positions(order)
    assert sorted(first) == list(range(97))
    assert first != sorted(first)
    assert positions(EpochOrder(97, 1, seed=3)) == first
    assert positions(EpochOrder(97, 1, seed=4)) != first
    order.set_epoch(1)
    assert sorted(positions(order)) == list(range(97))
    assert positions(order) != first


def test_the_last_batch_is_dropped_when_it_is_not_full_unless_it_is_the_only_one() -> None:
    order = EpochOrder(11, 4, seed=0)
    batches = list(order)
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(order) == 2
    assert len({position for batch in batches for _, position in batch}) == 8
    assert [len(batch) for batch in EpochOrder(3, 8, seed=0)] == [3]


def epoch_of(loader: TrainLoader, epoch: int) -> list[tuple[torch.Tensor, list[int], list[int]]]:
    loader.set_epoch(epoch)
    return [(images, labels.tolist(), places.tolist()) for images, labels, places in loader]


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, second, strict=True)
    )


def test_batches_are_the_same_with_and_without_loader_processes(samples: FolderSamples) -> None:
    alone = train_loader(samples, config(), PREPROCESSING, seed=7)
    helped = train_loader(samples, config(workers=2), PREPROCESSING, seed=7)
    for epoch in (0, 1, 5):
        assert same(epoch_of(alone, epoch), epoch_of(helped, epoch))


def test_an_image_is_augmented_anew_each_epoch_and_by_each_seed(samples: FolderSamples) -> None:
    transform = train_transform(config(), PREPROCESSING)
    dataset = ImageDataset(samples, transform, seed=1)
    first = dataset[2, 3][0]
    torch.rand(5)  # what happened before does not matter
    random.random()
    assert torch.equal(dataset[2, 3][0], first)
    assert torch.equal(ImageDataset(samples, transform, seed=1)[2, 3][0], first)
    others = [dataset[1, 3][0], dataset[2, 4][0], ImageDataset(samples, transform, seed=2)[2, 3][0]]
    assert not any(torch.equal(other, first) for other in others)
    assert dataset[2, 3][1:] == (int(samples.labels[3]), 3)


def test_two_images_of_equal_pixels_are_augmented_differently(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in "xy":
        Image.radial_gradient("L").save(tmp_path / "a" / f"{name}.png")
    dataset = ImageDataset(FolderSamples(tmp_path), train_transform(config(), PREPROCESSING), seed=0)
    assert not torch.equal(dataset[0, 0][0], dataset[0, 1][0])


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_loading_leaves_the_global_random_generators_alone(samples: FolderSamples) -> None:
    loader = train_loader(samples, config(), PREPROCESSING, seed=7)
    batches: Iterator[Any] = iter(loader)
    next(batches)  # torch's loader draws a base seed when it starts
    before = states()
    next(batches)
    assert states() == before
    _ = ImageDataset(samples, train_transform(config(), PREPROCESSING))[0, 0]
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_loader_goes_on_from_the_middle_with_exactly_the_remaining_batches(
    samples: FolderSamples, given: int, workers: int
) -> None:
    whole = epoch_of(train_loader(samples, config(batch_size=2), PREPROCESSING, seed=7), 4)
    assert len(whole) == 5
    first = train_loader(samples, config(batch_size=2, workers=workers), PREPROCESSING, seed=7)
    first.set_epoch(4)
    batches = iter(first)
    for _ in range(given):
        next(batches)
    state = first.state_dict()
    assert state == {"epoch": 4, "batches": given}
    second = train_loader(samples, config(batch_size=2, workers=workers), PREPROCESSING, seed=7)
    second.load_state_dict(state)
    assert second.state_dict() == state
    rest = [(images, labels.tolist(), places.tolist()) for images, labels, places in second]
    assert same(rest, whole[given:])
    assert same(epoch_of(second, 4), whole), "only the first iteration begins in the middle"


def test_a_finished_epoch_counts_as_the_start_of_the_next(samples: FolderSamples) -> None:
    loader = train_loader(samples, config(), PREPROCESSING, seed=7)
    epoch_of(loader, 4)
    assert loader.state_dict() == {"epoch": 5, "batches": 0}


def test_evaluation_gives_each_image_once_in_order(samples: FolderSamples) -> None:
    for batch_size in (1, 4, 50):
        found = [
            place
            for _, labels, places in evaluation_loader(samples, config(batch_size=batch_size), PREPROCESSING)
            for place, label in zip(places.tolist(), labels.tolist(), strict=True)
            if label == samples.labels[place]
        ]
        assert found == list(range(11))


def test_evaluation_resizes_crops_the_centre_and_normalises(samples: FolderSamples) -> None:
    """Longhand: the shorter side to input_size / crop_pct, the centre of it, (x - mean) / std."""
    image = read_image(samples.open(0)).resize((24, 16))
    found = evaluation_transform(PREPROCESSING)(image)
    small = image.resize((15, 10), Image.Resampling.BILINEAR)
    crop = np.asarray(small)[1:9, 4:12]  # (15 - 8) / 2 rounded to even
    wanted = (crop / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.25])
    assert np.abs(found.numpy().transpose(1, 2, 0) - wanted).max() < 1e-5


def test_training_without_augmentation_shows_the_whole_image(samples: FolderSamples) -> None:
    plain = config(scale=(1, 1), ratio=(1, 1), hflip=0, vflip=0, color_jitter=0, re_prob=0, auto_augment=None)
    image = read_image(samples.open(0))
    small = image.resize((8, 8), Image.Resampling.BILINEAR)
    wanted = (np.asarray(small) / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.25])
    found = train_transform(plain, PREPROCESSING)(image).numpy().transpose(1, 2, 0)
    assert np.abs(found - wanted).max() < 1e-5
    mirrored = config(scale=(1, 1), ratio=(1, 1), hflip=1, vflip=1, color_jitter=0, re_prob=0, auto_augment=None)
    found = train_transform(mirrored, PREPROCESSING)(image).numpy().transpose(1, 2, 0)
    assert np.abs(found - wanted[::-1, ::-1]).max() < 1e-5


@pytest.fixture
def spoilt(tmp_path: Path) -> FolderSamples:
    """Sound when checked, damaged since."""
    samples = FolderSamples(class_folders(tmp_path, {"a": 3, "b": 1}))
    Path(samples.name(1)).write_bytes(b"gone")
    Path(samples.name(3)).unlink()
    return samples


def test_an_image_damaged_during_training_is_named_once_and_replaced_by_the_next(
    spoilt: FolderSamples, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = ImageDataset(spoilt, evaluation_transform(PREPROCESSING), on_bad_image="skip")
    for epoch in range(2):
        picture, label, position = dataset[epoch, 1]
        assert (label, position) == (0, 2)
        assert isinstance(picture, torch.Tensor)
        assert torch.equal(picture, dataset[epoch, 2][0])
        assert dataset[epoch, 3][1:] == (0, 0), "after the last image comes the first"
    assert [record.getMessage().split(";")[1] for record in caplog.records] == [" the next image takes its place"] * 2
    assert spoilt.name(1) in caplog.records[0].getMessage()
    assert "no such file" in caplog.records[1].getMessage()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_before_evaluation_is_named_once_and_left_out(
    workers: int, spoilt: FolderSamples, caplog: pytest.LogCaptureFixture
) -> None:
    for batch_size, batches in ((2, [[0], [2]]), (4, [[0, 2]]), (1, [[0], [2]])):
        loader = evaluation_loader(spoilt, config(batch_size=batch_size, workers=workers), PREPROCESSING)
        caplog.clear()
        for _ in range(2):
            assert [positions.tolist() for _, _, positions in loader] == batches
        said = [record.getMessage() for record in caplog.records]
        assert said == [
            f"skipped {spoilt.name(1)}: not an image that can be identified",
            f"skipped {spoilt.name(3)}: no such file",
        ]


def test_several_processes_leave_out_what_one_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is left of a batch."""
    samples = FolderSamples(class_folders(tmp_path, {"a": 9}))
    for place in (2, 3, 7):
        Path(samples.name(place)).unlink()
    found = []
    for rank in range(2):
        in_process(monkeypatch, rank, 2)
        found.append(
            [places.tolist() for *_, places in evaluation_loader(samples, config(batch_size=2), PREPROCESSING)]
        )
    assert found == [[[0, 1], [4, 5], [8]], [[6]]]


@pytest.mark.parametrize("make", [train_loader, evaluation_loader])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_that_is_not_to_be_skipped_is_one_line_from_a_loader_process_too(
    make: Callable[..., Any], workers: int, spoilt: FolderSamples
) -> None:
    """Of torch it would be the whole traceback."""
    seed = {"seed": 0} if make is train_loader else {}
    loader = make(spoilt, config(workers=workers, batch_size=4, on_bad_image="raise"), PREPROCESSING, **seed)
    before = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match=r"^/.*(a/001\.png: not an image|b/000\.png: no such).*=skip$") as raised:
        list(loader)
    assert "\n" not in str(raised.value)
    assert set(multiprocessing.active_children()) <= before, "its processes are gone"


class Broken(Dataset[int]):
    """Fails with an error of this type."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> int:
        raise self.error from KeyError("ValueError: behind it")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImageError("damaged: OSError: 3 bytes"), "damaged: OSError: 3 bytes"),
        (FileNotFoundError(2, "No such file", "x.parquet"), "[Errno 2] No such file: 'x.parquet'"),
        (ValueError("two\nlines"), "two\nlines"),
    ],
)
def test_an_error_of_a_loader_process_keeps_its_type_and_its_text(error: Exception, text: str) -> None:
    with pytest.raises(type(error)) as raised:
        list(Loader(Broken(error), num_workers=1))
    assert type(raised.value) is type(error)
    assert str(raised.value) == text
    assert "Traceback" in str(raised.value.__cause__), "what --debug shows"


def test_a_folder_that_vanished_ends_the_run(tmp_path: Path) -> None:
    samples = FolderSamples(class_folders(tmp_path, {"a": 2}))
    for place in range(2):
        Path(samples.name(place)).unlink()
    with pytest.raises(ValueError, match=r"100 images in a row cannot be read, the last .*no such file"):
        _ = ImageDataset(samples, evaluation_transform(PREPROCESSING), on_bad_image="skip")[0, 0]
    with pytest.raises(ValueError, match=r"none of 2 images can be read, the last .*no such file"):
        list(evaluation_loader(samples, config(batch_size=1), PREPROCESSING))


def test_a_folder_that_vanishes_during_an_evaluation_ends_it(tmp_path: Path) -> None:
    samples = FolderSamples(class_folders(tmp_path, {"a": 110}, size=2))
    batches = iter(evaluation_loader(samples, config(batch_size=5), PREPROCESSING))
    next(batches)
    for place in range(110):
        Path(samples.name(place)).unlink()
    with pytest.raises(ValueError, match=r"100 images in a row cannot be read, the last .*/104\.png: no such file"):
        next(batches)


def test_workers_follow_the_cores_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    assert worker_count(DataConfig(source="x")) == 6
    assert worker_count(DataConfig(source="x", workers=3)) == 3
    assert worker_count(DataConfig(source="digits")) == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert worker_count(DataConfig(source="x")) == 8


# Several processes


def in_process(patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    patch.setattr("epsanet.data.loaders.rank", lambda: rank)
    patch.setattr("epsanet.data.loaders.world_size", lambda: size)


def test_repeated_augmentation_shows_each_image_so_often_in_a_row_each_time_otherwise(samples: FolderSamples) -> None:
    plain, repeated = EpochOrder(50, 4, seed=5), EpochOrder(50, 4, seed=5, repeats=3)
    plain.set_epoch(2)
    repeated.set_epoch(2)
    wanted = [position for position in positions(plain) for _ in range(3)]
    keys = list(itertools.chain(*repeated))
    assert len(repeated) == len(plain)
    assert keys == [(2, position, place % 3) for place, position in enumerate(wanted[: len(keys)])]
    dataset = ImageDataset(samples, train_transform(config(), PREPROCESSING), seed=1)
    images = [dataset[2, 3, copy][0] for copy in range(3)]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(images, 2))
    assert torch.equal(dataset[2, 3, 1][0], images[1])


@pytest.mark.parametrize("size", [2, 3])
def test_the_processes_of_a_step_have_the_images_of_one_process_with_a_batch_as_large(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = EpochOrder(50, 4 * size, seed=5)
    one.set_epoch(2)
    wanted = list(one)
    shares = []
    for rank in range(size):
        in_process(monkeypatch, rank, size)
        share = EpochOrder(50, 4, seed=5)
        share.set_epoch(2)
        assert len(share) == len(wanted)
        share.start = 1
        shares.append(list(share))
    assert [list(itertools.chain(*step)) for step in zip(*shares, strict=True)] == wanted[1:]


@pytest.mark.parametrize(("length", "batch", "size"), [(50, 4, 2), (50, 7, 3), (5, 4, 3), (1, 8, 2)])
def test_the_processes_evaluate_the_batches_of_one_each_once(
    length: int, batch: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(EvaluationOrder(length, batch))
    assert list(itertools.chain(*wanted)) == list(range(length))
    found = []
    for rank in range(size):
        in_process(monkeypatch, rank, size)
        share = EvaluationOrder(length, batch)
        assert len(share) == len(list(share))
        found += list(share)
    if length > batch * (size - 1):
        assert sorted(found) == wanted
    else:  # smaller batches, so that no process is left without any
        assert sorted(itertools.chain(*found)) == list(range(length))
        assert len(found) >= min(length, size)


def test_more_processes_than_images_are_refused(samples: FolderSamples, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch, 0, 1000)
    with pytest.raises(ValueError, match=r"images to train on for 1000 processes"):
        train_loader(samples, config(), PREPROCESSING, seed=0)
