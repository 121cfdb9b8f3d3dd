"""Data sets by name: whichever format they have, the same images come out under the same class names."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import class_folders, parquet, pixels, png, real_data, shards
from PIL import Image
from sklearn.datasets import load_digits

from epsanet.data.check import check_images
from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.samples import Samples, match_classes
from epsanet.data.sources import open_data, open_split
from epsanet.data.streams import Stream

PREPROCESSING = {
    "input_size": (3, 12, 12),
    "mean": (0, 0, 0),
    "std": (1, 1, 1),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def image(samples: Samples | Stream, position: int) -> np.ndarray:
    assert isinstance(samples, Samples)
    return np.asarray(read_image(samples.open(position)))


def contents(samples: Samples | Stream) -> Counter[tuple[bytes, str]]:
    """Every image with its class name, however often it is there."""
    assert isinstance(samples, Samples)
    return Counter(
        (image(samples, place).tobytes(), samples.class_names[samples.labels[place]]) for place in range(len(samples))
    )


def names(samples: Samples | Stream) -> list[str]:
    assert isinstance(samples, Samples)
    return [samples.class_names[label] for label in samples.labels]


# Digits


def test_digits_are_those_of_scikit_learn_in_three_disjoint_stratified_splits() -> None:
    splits = open_data(DataConfig())
    assert splits.test is not None
    digits = load_digits()
    wanted = Counter()
    for values, label in zip(digits.images, digits.target, strict=True):
        small = Image.fromarray(np.round(values / 16 * 255).astype(np.uint8))
        enlarged = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        wanted[(np.dstack([enlarged] * 3).tobytes(), str(label))] += 1
    found = [contents(split) for split in (splits.train, splits.val, splits.test)]
    assert found[0] + found[1] + found[2] == wanted
    assert [sum(part.values()) for part in found] == [1293, 144, 360]
    shares = np.bincount(digits.target) / len(digits.target)
    for split in (splits.train, splits.val, splits.test):
        assert isinstance(split, Samples)
        assert np.abs(np.bincount(split.labels) - shares * len(split)).max() < 1.5


def test_digits_split_the_same_way_every_time() -> None:
    first, second = open_data(DataConfig()), open_data(DataConfig(val_fraction=0.3))
    assert first.test is not None
    assert second.test is not None
    assert contents(first.test) == contents(second.test), "the test split depends on nothing"
    assert len(second.val) == 432
    assert contents(open_data(DataConfig()).train) == contents(first.train)


# Folders


def test_a_folder_with_train_val_and_test_is_read_as_it_lies(tmp_path: Path) -> None:
    for start, split in enumerate(("train", "val", "test")):
        class_folders(tmp_path / split, {"cat": 2, "dog": 3}, start=10 * start)
    splits = open_data(DataConfig(source=str(tmp_path)))
    assert splits.class_names == ["cat", "dog"]
    for start, samples in enumerate((splits.train, splits.val, splits.test)):
        assert samples is not None
        assert contents(samples) == Counter(
            (pixels(sum(name.encode()), 10 * start + number).tobytes(), name)
            for name, count in {"cat": 2, "dog": 3}.items()
            for number in range(count)
        )
    assert splits.notes == ()
    assert isinstance(splits.val, Samples)
    assert Path(splits.val.name(0)).is_file()


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_a_validation_folder_may_have_its_other_usual_names(name: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "training", {"a": 3})
    class_folders(tmp_path / name, {"a": 2}, start=5)
    splits = open_data(DataConfig(source=str(tmp_path)))
    assert len(splits.train) == 3
    assert len(splits.val) == 2
    assert len(open_split(DataConfig(source=str(tmp_path)), "val", ["a"])[0]) == 2


def test_split_folders_may_be_written_with_capitals_as_on_kaggle(tmp_path: Path) -> None:
    class_folders(tmp_path / "Training", {"glioma": 6, "none": 6})
    class_folders(tmp_path / "Testing", {"glioma": 2, "none": 1}, start=20)
    splits = open_data(DataConfig(source=str(tmp_path)))
    assert splits.class_names == ["glioma", "none"]
    assert (len(splits.train) + len(splits.val), len(splits.test or ())) == (12, 3)
    class_folders(tmp_path / "testing", {"glioma": 1})
    with pytest.raises(ValueError, match="two folders of the testing split, testing too; leave one"):
        open_data(DataConfig(source=str(tmp_path)))


def test_a_class_may_be_called_like_a_split_with_a_capital(tmp_path: Path) -> None:
    class_folders(tmp_path, {"Bus": 10, "Train": 10})
    assert open_data(DataConfig(source=str(tmp_path))).class_names == ["Bus", "Train"]


def test_hidden_folders_are_no_classes_and_hide_no_parquet_files(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"a": 10, "b": 10})
    for hidden in (".git", ".ipynb_checkpoints"):
        class_folders(tmp_path / "images" / hidden, {"x": 1})
    splits = open_data(DataConfig(source=str(tmp_path / "images")))
    assert splits.class_names == ["a", "b"]
    assert len(splits.train) + len(splits.val) == 20
    parquet(tmp_path / "files" / "x.parquet", [0, 1] * 10, names=["a", "b"])
    (tmp_path / "files" / ".cache" / "huggingface").mkdir(parents=True)
    assert open_data(DataConfig(source=str(tmp_path / "files"), root=str(tmp_path))).class_names == ["a", "b"]


def test_one_folder_of_classes_is_split_by_the_fraction_of_each_class(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 20, "b": 40})
    splits = open_data(DataConfig(source=str(tmp_path), val_fraction=0.25))
    assert Counter(names(splits.val)) == {"a": 5, "b": 10}
    assert Counter(names(splits.train)) == {"a": 15, "b": 30}
    together = contents(splits.train) + contents(splits.val)
    assert len(together) == 60
    assert set(together.values()) == {1}
    assert splits.test is None
    assert "no validation split: 15 images of the training split" in splits.notes[0]
    again = open_data(DataConfig(source=str(tmp_path), val_fraction=0.25))
    assert contents(again.val) == contents(splits.val)


def test_evaluation_of_one_folder_can_take_what_training_set_aside(tmp_path: Path) -> None:
    """Else the command that training prints would count the images it learned from."""
    class_folders(tmp_path, {"a": 20, "b": 40})
    config = DataConfig(source=str(tmp_path), val_fraction=0.25)
    split, _, _ = open_split(config, "val", ["a", "b"])
    assert contents(split) == contents(open_data(config).val)
    everything, name, notes = open_split(config, None, ["a", "b"])
    assert (len(everything), name) == (60, "all")
    assert "also those that a network was trained on; --split val" in notes[0]


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 20, "lonely": 1})
    with pytest.raises(ValueError, match=r"one image only of lonely; .* needs two of each class"):
        open_data(DataConfig(source=str(tmp_path)))


def test_a_share_too_small_for_the_classes_says_what_to_raise(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 3, "c": 3})
    with pytest.raises(ValueError, match=r"too small to split off .* of 0\.1.*raise --data\.val_fraction"):
        open_data(DataConfig(source=str(tmp_path)))


def test_a_validation_folder_that_lacks_a_class_is_matched_by_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2})
    class_folders(tmp_path / "val", {"bee": 1, "cow": 2}, start=7)
    splits = open_data(DataConfig(source=str(tmp_path)))
    assert names(splits.val) == ["bee", "cow", "cow"]
    assert isinstance(splits.val, Samples)
    assert splits.val.labels.tolist() == [1, 2, 2], "as the network counts, not as the folder does"
    assert splits.notes == ("the validation split lacks 1 of 3 classes (ant); matched by name",)


def test_an_unknown_class_in_validation_is_refused_by_its_name(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"ant": 2, "cow": 2})
    class_folders(tmp_path / "val", {"ant": 1, "bee": 1})
    with pytest.raises(
        ValueError,
        match=r"the validation split does not fit: 1 of 2 classes are unknown: 'bee'; known are 'ant', 'cow'",
    ):
        open_data(DataConfig(source=str(tmp_path)))


def test_an_empty_folder_of_an_unknown_class_does_no_harm(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"ant": 2, "cow": 2})
    class_folders(tmp_path / "val", {"ant": 1, "cow": 1, "nothing": 0})
    assert names(open_data(DataConfig(source=str(tmp_path))).val) == ["ant", "cow"]


def test_classes_counted_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    """A folder sorts 1, 10, 2; the network, trained elsewhere, counts 1, 2, 10."""
    class_folders(tmp_path, {"1": 1, "2": 1, "10": 1})
    split, _, _ = open_split(DataConfig(source=str(tmp_path)), None, ["1", "2", "10"])
    assert isinstance(split, Samples)
    assert split.labels.tolist() == [0, 2, 1]
    assert names(split) == ["1", "10", "2"]
    assert contents(split) == Counter((pixels(sum(n.encode()), 0).tobytes(), n) for n in ("1", "2", "10"))


def test_matching_gives_places_and_what_is_lacking() -> None:
    assert match_classes(["b", "a"], ["a", "c", "b"]) == ([2, 0], ["c"])
    with pytest.raises(ValueError, match=r"6 of 7 classes are unknown: '0', '1', '2', '3', '4', …; known are 'a'"):
        match_classes(["0", "1", "2", "3", "4", "5", "a"], ["a"])


def test_images_deep_in_a_class_folder_belong_to_it_and_other_files_do_not(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 1, "a/b": 1})
    class_folders(tmp_path / "val", {"a": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "a" / "LOUD.PNG").write_bytes(png(pixels(1, 1)))
    assert names(open_data(DataConfig(source=str(tmp_path))).train) == ["a", "a", "a"]


# What is wrong with a source


def nothing(_: Path) -> None: ...


def flat(folder: Path) -> None:
    (folder / "x.png").write_bytes(png(pixels(0, 0)))


def empty_classes(folder: Path) -> None:
    (folder / "cat").mkdir()


def only_test(folder: Path) -> None:
    class_folders(folder / "test", {"a": 2})


def usual(folder: Path) -> None:
    class_folders(folder / "train", {"a": 4})
    class_folders(folder / "val", {"a": 4})


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (nothing, {}, "has no class folders; put the images of each class in a folder"),
        (flat, {}, "has no class folders"),
        (empty_classes, {}, r"has class folders but no images \(\.bmp"),
        (only_test, {}, r"no split to train on \(train\), only test; name it with --data\.train_split"),
        (usual, {"val_split": "vla"}, r"no split 'vla' but train, val; correct --data\.val_split"),
        (usual, {"test_split": "tset"}, r"no split 'tset' but train, val; correct --data\.test_split"),
        (usual, {"train_split": "trian"}, r"no split to train on \(trian\), only train, val"),
        (usual, {"class_names": "/nowhere/names.txt"}, "names.txt cannot be read as text"),
    ],
)
def test_a_folder_that_does_not_fit_says_what_to_do(
    prepare: Callable[[Path], None], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        open_data(DataConfig(source=str(tmp_path), **options))
    assert "\n" not in str(raised.value)


def test_a_source_that_is_nothing_says_what_there_could_be(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no data set 'dgits'.*takes digits, a folder, a Parquet file or folder, torch/"
    ):
        open_data(DataConfig(source="dgits"))
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.zip is a file; --data takes a folder, a \.parquet file"):
        open_data(DataConfig(source=str(tmp_path / "data.zip")))


def test_a_split_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    usual(tmp_path)
    with pytest.raises(ValueError, match="no split 'tset' but train, val; choose one with --split"):
        open_split(DataConfig(source=str(tmp_path)), "tset", ["a"])


def test_evaluation_prefers_test_then_val(tmp_path: Path) -> None:
    usual(tmp_path)
    config = DataConfig(source=str(tmp_path))
    assert open_split(config, None, ["a"])[1] == "val"
    class_folders(tmp_path / "test", {"a": 1})
    assert open_split(config, None, ["a"])[1] == "test"
    assert open_split(config, "train", ["a"])[1] == "train"


def test_a_test_split_that_chooses_the_epoch_is_not_reported_as_test(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 2})
    class_folders(tmp_path / "test", {"a": 2})
    splits = open_data(DataConfig(source=str(tmp_path), val_split="test"))
    assert len(splits.val) == 2
    assert splits.test is None


# Parquet


def test_a_parquet_file_gives_its_images_under_its_own_class_names(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [2, 0, 1, 2] * 5, names=["ant", "bee", "cow"])
    splits = open_data(DataConfig(source=str(path), root=str(tmp_path / "cache"), val_fraction=0.25))
    assert splits.class_names == ["ant", "bee", "cow"]
    wanted = Counter(
        (pixels(label, place).tobytes(), ["ant", "bee", "cow"][label]) for place, label in enumerate([2, 0, 1, 2] * 5)
    )
    assert contents(splits.train) + contents(splits.val) == wanted
    assert isinstance(splits.train, Samples)
    assert splits.train.name(0).startswith(f"{path}:train[")


def test_a_folder_of_parquet_files_keeps_its_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "train-00000-of-00001.parquet", [0, 1, 1], names=["a", "b"])
    parquet(tmp_path / "d" / "test-00000-of-00001.parquet", [1, 0], names=["a", "b"], start=50)
    config = DataConfig(source=str(tmp_path / "d"), root=str(tmp_path / "cache"), val_split="test")
    splits = open_data(config)
    assert names(splits.train) == ["a", "b", "b"]
    assert contents(splits.val) == Counter([(pixels(1, 50).tobytes(), "b"), (pixels(0, 51).tobytes(), "a")])


def test_labels_that_are_words_or_have_gaps_become_classes(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    words = parquet(tmp_path / "words.parquet", ["dog", "cat"] * 10)
    splits = open_data(DataConfig(source=str(words), root=cache))
    assert splits.class_names == ["cat", "dog"]
    wanted = Counter((pixels(3, n).tobytes(), ["dog", "cat"][n % 2]) for n in range(20))
    assert contents(splits.train) + contents(splits.val) == wanted
    gaps = parquet(tmp_path / "gaps.parquet", [30, 7] * 10)
    assert open_data(DataConfig(source=str(gaps), root=cache)).class_names == ["7", "30"]


def test_a_file_of_class_names_names_and_orders_the_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\ncat\n\n", encoding="utf-8")
    options = {"root": str(tmp_path / "cache"), "class_names": str(tmp_path / "names.txt")}
    numbers = parquet(tmp_path / "numbers.parquet", [0, 1] * 10)
    splits = open_data(DataConfig(source=str(numbers), **options))
    wanted = Counter((pixels(n % 2, n).tobytes(), ["dog", "cat"][n % 2]) for n in range(20))
    assert contents(splits.train) + contents(splits.val) == wanted
    words = parquet(tmp_path / "words.parquet", ["cat", "dog"] * 10)
    splits = open_data(DataConfig(source=str(words), **options))
    assert splits.class_names == ["dog", "cat"]
    wanted = Counter((pixels(3, n).tobytes(), ["cat", "dog"][n % 2]) for n in range(20))
    assert contents(splits.train) + contents(splits.val) == wanted
    (tmp_path / "names.txt").write_text("dog\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.txt names a class twice"):
        open_data(DataConfig(source=str(numbers), **options))
    (tmp_path / "names.txt").write_text("dog\n", encoding="utf-8")
    with pytest.raises(ValueError, match="labels from 0 to 1 for 1 classes"):
        open_data(DataConfig(source=str(numbers), **options))


def test_files_of_windows_are_read_as_they_are_meant(tmp_path: Path) -> None:
    """A mark of the byte order before the first name, and browsers' suffix of a JPEG."""
    parquet(tmp_path / "x.parquet", [0, 1] * 10)
    (tmp_path / "names.txt").write_text("cat\r\ndog\r\n", encoding="utf-8-sig", newline="")
    found = open_data(DataConfig(source=str(tmp_path / "x.parquet"), class_names=str(tmp_path / "names.txt")))
    assert found.class_names == ["cat", "dog"]
    class_folders(tmp_path / "images", {"a": 10})
    for path in sorted((tmp_path / "images" / "a").iterdir())[:4]:
        path.rename(path.with_suffix(".jfif"))
    splits = open_data(DataConfig(source=str(tmp_path / "images")))
    assert len(splits.train) + len(splits.val) == 10


def test_a_test_split_without_labels_is_left_out(tmp_path: Path) -> None:
    """Benchmarks publish test images with -1 for a label."""
    parquet(tmp_path / "d" / "train-00000-of-00001.parquet", [0, 1] * 10, names=["a", "b"])
    parquet(tmp_path / "d" / "test-00000-of-00001.parquet", [-1, -1], names=["a", "b"])
    assert open_data(DataConfig(source=str(tmp_path / "d"), root=str(tmp_path / "cache"))).test is None


def test_a_parquet_file_without_the_columns_lists_those_it_has(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", [0, 1])
    with pytest.raises(ValueError, match=r"no column 'fine' but image, label; name them with .*--data\.label_key"):
        open_data(DataConfig(source=str(path), root=str(tmp_path / "cache"), label_key="fine"))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 no it is not")
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read: ") as raised:
        open_data(DataConfig(source=str(tmp_path / "p.parquet"), root=str(tmp_path / "cache")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [1, 2], "label": [0, 1]}, "no images in column 'image' but .*int64.*--data.image_key"),
        ({"image": ["a.png", "b.png"], "label": [[0], [1]]}, "more than one number .* in column 'label'.*label_key"),
        ({"image": ["a.png", "b.png"], "label": [0, None]}, "without a label in column 'label'"),
    ],
)
def test_columns_of_another_kind_are_one_line(columns: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message) as raised:
        open_data(DataConfig(source=str(tmp_path / "p.parquet"), root=str(tmp_path / "cache")))
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_a_row_is_one_line(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    empty = pyarrow.table({"image": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.int64())})
    pyarrow.parquet.write_table(empty, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet cannot be read: ") as raised:
        open_data(DataConfig(source=str(tmp_path / "p.parquet"), root=str(tmp_path / "cache")))
    assert "\n" not in str(raised.value)


def test_a_row_without_an_image_is_a_bad_image(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [None, *({"bytes": png(pixels(0, position)), "path": None} for position in range(19))]
    table = pyarrow.table({"image": rows, "label": [0, 1] * 10})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    splits = open_data(DataConfig(source=str(tmp_path / "p.parquet"), root=str(tmp_path / "cache")))
    assert isinstance(splits.train, Samples)
    assert isinstance(splits.val, Samples)
    bad = {}
    for samples in (splits.train, splits.val):
        kept, report = check_images(samples, "images", on_bad_image="skip")
        bad |= report.bad
        assert len(kept) == len(samples) - len(report.bad)
    assert list(bad.values()) == ["no image in its row"]


def test_the_real_cifar_10_has_its_ten_classes_in_order(tmp_path: Path) -> None:
    import pyarrow.parquet

    source = real_data("cifar10") / "train-00000-of-00001.parquet"
    batch = next(pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=300))
    part = pyarrow.Table.from_batches([batch])
    pyarrow.parquet.write_table(part, tmp_path / "part.parquet")
    splits = open_data(DataConfig(source=str(tmp_path / "part.parquet"), root=str(tmp_path / "cache")))
    wanted = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert splits.class_names == wanted
    assert (len(splits.train), len(splits.val)) == (270, 30)
    assert isinstance(splits.train, Samples)
    assert image(splits.train, 0).shape == (32, 32, 3)
    assert Counter(names(splits.train)) + Counter(names(splits.val)) == Counter(
        wanted[label] for label in part["label"].to_pylist()
    )


# torchvision


def cifar10(root: Path, train: int, test: int) -> np.ndarray:
    """CIFAR-10 as torchvision finds it on disk; gives the pictures, training first."""
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (train + test, 3072), dtype=np.uint8)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = [*np.array_split(np.arange(train), 5), np.arange(train, train + test)]
    for name, part in zip([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], batches, strict=True):
        content = {"data": data[part], "labels": [int(place) % 10 for place in part]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{n}" for n in range(10)]}))
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_torchvisions_cifar_10_is_read_with_its_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # of the real files
    pictures = cifar10(tmp_path, 200, 20)
    splits = open_data(DataConfig(source="torch/cifar10", root=str(tmp_path)))
    assert splits.test is not None
    assert splits.class_names == [f"class{n}" for n in range(10)]
    labelled = [(picture.tobytes(), f"class{place % 10}") for place, picture in enumerate(pictures)]
    assert contents(splits.test) == Counter(labelled[200:])
    assert contents(splits.train) + contents(splits.val) == Counter(labelled[:200])
    assert len(splits.val) == 20


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_torchvisions_mnist_is_read_from_its_own_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    digits = {"train": random.integers(0, 256, (40, 28, 28), dtype=np.uint8)}
    digits["t10k"] = random.integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for name, array in digits.items():
        idx(tmp_path / "MNIST" / "raw" / f"{name}-images-idx3-ubyte", array)
        idx(tmp_path / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte", (np.arange(len(array)) % 10).astype(np.uint8))
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"), encoding="utf-8")
    options = {"root": str(tmp_path), "class_names": str(tmp_path / "names.txt"), "val_fraction": 0.25}
    splits = open_data(DataConfig(source="torch/mnist", **options))
    assert splits.test is not None
    assert contents(splits.test) == Counter(
        (np.dstack([array] * 3).tobytes(), "abcdefghij"[place]) for place, array in enumerate(digits["t10k"])
    )
    assert len(splits.train) == 30


@pytest.mark.parametrize(
    ("source", "root", "message"),
    [
        ("torch/cifar10", None, r"needs a folder; say where it lies.*--data\.root FOLDER"),
        ("torch/cifar10", "here", r"torch/cifar10 is not in .*here.*add --data\.download=true"),
        ("torch/cifar1000", "here", "is not one of timm's torchvision data sets"),
    ],
)
def test_a_torchvision_data_set_that_is_not_there_says_how_to_get_it(
    source: str, root: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(DataConfig(source=source, root=root and str(tmp_path / root)))


# WebDataset


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """11 training and 7 validation images of 3 classes in two shards each."""
    folder = tmp_path / "shards"
    splits = {
        "train": shards(folder, "train", [6, 5], classes=3),
        "validation": shards(folder, "validation", [4, 3], classes=3, start=100),
    }
    (folder / "info.json").write_text(json.dumps({"splits": splits, "class_names": ["a", "b", "c"]}))
    return folder


def images_of(start: int, count: int, class_names: str) -> Counter[tuple[bytes, str]]:
    """What ``shards`` puts into its tar files."""
    classes = len(class_names)
    return Counter((pixels(n % classes, n).tobytes(), class_names[n % classes]) for n in range(start, start + count))


def test_shards_hold_every_image_with_its_class(sharded: Path) -> None:
    splits = open_data(DataConfig(source=f"wds/{sharded}"))
    assert splits.class_names == ["a", "b", "c"]
    assert contents(splits.train) == images_of(0, 11, "abc")
    assert contents(splits.val) == images_of(100, 7, "abc")
    assert splits.notes == ()
    assert isinstance(splits.train, Samples)
    assert splits.train.name(7) == f"{sharded}/train-0001.tar/000007.png"


@pytest.mark.filterwarnings(  # webdataset leaves a finished shard to the garbage collector
    "ignore:unclosed file:ResourceWarning", "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_webdataset_itself_reads_the_same_from_the_shards(sharded: Path) -> None:
    import webdataset

    samples = open_data(DataConfig(source=f"wds/{sharded}")).train
    assert isinstance(samples, Samples)
    with contextlib.closing(
        webdataset.WebDataset([str(sharded / f"train-{n:04}.tar") for n in range(2)], shardshuffle=False)
    ) as dataset:
        found = [(sample["png"], int(sample["cls"])) for sample in dataset]
    gc.collect()
    ours = [samples.open(place) for place in range(len(samples))]
    assert [(file.read(), int(label)) for file, label in zip(ours, samples.labels, strict=True)] == found  # type: ignore[union-attr]


def test_shards_without_a_description_are_known_by_their_file_names(sharded: Path, tmp_path: Path) -> None:
    (sharded / "info.json").unlink()
    (tmp_path / "names.txt").write_text("a\nb\nc\n", encoding="utf-8")
    splits = open_data(DataConfig(source=f"wds/{sharded}", class_names=str(tmp_path / "names.txt")))
    assert contents(splits.train) == images_of(0, 11, "abc")
    assert contents(splits.val) == images_of(100, 7, "abc")


def test_shards_named_by_pattern_need_no_description(tmp_path: Path) -> None:
    shards(tmp_path, "tr", [4, 4], classes=2)
    shards(tmp_path, "va", [3], classes=2, start=50)
    (tmp_path / "names.txt").write_text("0\n1\n", encoding="utf-8")
    config = DataConfig(
        source=f"wds/{tmp_path}",
        train_split="tr-{0000..0001}.tar|9",
        val_split="va-0000.tar",
        class_names=str(tmp_path / "names.txt"),
    )
    splits = open_data(config)
    assert contents(splits.train) == images_of(0, 8, "01")
    assert contents(splits.val) == images_of(50, 3, "01")
    assert splits.notes == ("the tr-{0000..0001}.tar|9 split has 8 samples, not 9 as was said of it",)


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


def test_labels_of_shards_may_be_names_or_stand_in_json(tmp_path: Path) -> None:
    picture = png(pixels(0, 0))
    names = {"x/1.png": picture, "x/1.cls": b"dog\n", "x/2.CLS": b"cat", "x/2.seg.png": b"", "x/2.PNG": picture}
    tar(tmp_path / "train-0.tar", names)
    info = {"x.png": picture, "x.json": json.dumps({"breed": "dog", "label": 7}).encode()}
    tar(
        tmp_path / "val-0.tar",
        {**info, "long/" * 40 + "name.jpeg": picture, "long/" * 40 + "name.json": info["x.json"]},
    )
    splits = open_data(DataConfig(source=f"wds/{tmp_path}", label_key="breed"))
    assert splits.class_names == ["cat", "dog"]
    assert contents(splits.train) == {(pixels(0, 0).tobytes(), "dog"): 1, (pixels(0, 0).tobytes(), "cat"): 1}
    assert contents(splits.val) == {(pixels(0, 0).tobytes(), "dog"): 2}
    assert splits.notes == ("the validation split lacks 1 of 2 classes (cat); matched by name",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": b"", "1.txt": b"1"}, r"its sample 1 has no label \(\.cls, or 'label' in \.json\)"),
        ({"1.txt": b"", "1.cls": b"1"}, "its sample 1 has no image"),
        ({"1.png": b"", "1.cls": b"\xff"}, "codec can't decode"),
        ({"1.png": b"", "1.json": b"{"}, "Expecting property name"),
        ({"1.png": b"", "1.json": b'[{"label": 1}]'}, r"train-0\.tar .*: its sample 1 has no label"),
        ({"1.png": b"", "1.cls": b"3"}, "has labels from 3 to 3 for 2 classes"),
        ({"1.png": b"", "1.cls": b"-1"}, "has labels from -1 to -1 for 2 classes"),
        ({"1.png": b"", "1.cls": b"owl"}, "has the class 'owl', which is none of its 2 class names"),
    ],
)
def test_a_shard_that_lacks_something_says_which_sample(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    tar(tmp_path / "train-0.tar", files)
    (tmp_path / "info.json").write_text(json.dumps({"class_names": ["cat", "dog"]}))
    with pytest.raises(ValueError, match=message) as raised:
        open_data(DataConfig(source=f"wds/{tmp_path}"))
    assert "\n" not in str(raised.value)
    assert "train" in str(raised.value)


@pytest.mark.parametrize("damage", ["cut", "compressed", "words", "missing"])
def test_a_shard_that_is_no_whole_tar_file_is_named(damage: str, sharded: Path) -> None:
    path = sharded / "train-0001.tar"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        changed = {"cut": content[:3000], "compressed": gzip.compress(content), "words": b"no tar file\n" * 99}
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"train-0001\.tar cannot be read as a shard: ") as raised:
        open_data(DataConfig(source=f"wds/{sharded}"))
    assert "\n" not in str(raised.value)


def test_shards_without_names_or_splits_say_what_to_write(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no shards like train-0000\.tar; make them with epsanet shard"):
        open_data(DataConfig(source=f"wds/{tmp_path / 'empty'}"))
    info = json.loads((sharded / "info.json").read_text())
    del info["class_names"]
    (sharded / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"names no classes; list them.*--data\.class_names FILE"):
        open_data(DataConfig(source=f"wds/{sharded}"))
    lists = ('{"filenames": "train.tar", "num_samples": 4}', '{"filenames": [1], "num_samples": 4}')
    numbers = '{"filenames": ["train.tar"], "num_samples": []}'
    inside = [f'{{"splits": {{"train": {split}}}}}' for split in ("{}", *lists, numbers)]
    for damaged in ("{", "[]", '{"splits": 3}', *inside, '{"class_names": [["a"]]}', '{"class_names": 2}'):
        (sharded / "info.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"info\.json is no description of shards"):
            open_data(DataConfig(source=f"wds/{sharded}"))


def test_only_parquet_is_streamed(sharded: Path, tmp_path: Path) -> None:
    class_folders(tmp_path / "folder", {"a": 2})
    for source in ("digits", f"wds/{sharded}", str(tmp_path / "folder")):
        with pytest.raises(ValueError, match=r"cannot be streamed, only Parquet and hfds/ can; leave out --data\.str"):
            open_data(DataConfig(source=source, streaming=True))


@pytest.mark.parametrize(
    ("source", "module"), [("hfds/someone/something", "datasets"), ("p.parquet", "datasets"), ("wds/.", "webdataset")]
)
def test_a_missing_library_names_the_line_to_install_it(
    source: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    Path("p.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"this needs {module}, .*pip install 'epsanet\[data\]'"):
        open_data(DataConfig(source=source, val_split="{0..9}.tar" if source == "wds/." else None))


def test_a_fraction_of_the_training_images_has_the_same_share_of_each_class_and_leaves_validation_alone() -> None:
    whole = open_data(DataConfig(source="digits"))
    part = open_data(DataConfig(source="digits", train_fraction=0.25))
    again = open_data(DataConfig(source="digits", train_fraction=0.25))
    assert len(part.train) == -(-len(whole.train) // 4)
    shares = np.bincount(part.train.labels) / np.bincount(whole.train.labels)
    assert (abs(shares - 0.25) < 0.01).all()
    assert list(part.val.labels) == list(whole.val.labels)
    assert len(part.test or ()) == len(whole.test or ()) == 360
    names = [whole.train.name(place) for place in range(len(whole.train))]
    chosen = [part.train.name(place) for place in range(len(part.train))]
    assert set(chosen) < set(names)
    assert chosen == [again.train.name(place) for place in range(len(again.train))]
    assert any("a fraction of 0.25" in note for note in part.notes)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_an_impossible_fraction_of_the_training_images_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="use a share above 0, up to 1"):
        DataConfig(train_fraction=fraction)
