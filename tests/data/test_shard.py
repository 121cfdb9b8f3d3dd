"""Folders become shards that hold the same images under the same classes, or nothing at all."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from making import class_folders
from PIL import Image

from epsanet.data.config import DataConfig
from epsanet.data.images import read_image
from epsanet.data.samples import Samples
from epsanet.data.shard import write_shards
from epsanet.data.sources import open_data


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 7 and 5 training and 2 validation images; the second lacks a class."""
    class_folders(tmp_path / "pictures" / "train", {"ant": 7, "bee": 5})
    class_folders(tmp_path / "pictures" / "val", {"bee": 2}, start=50)
    return tmp_path / "pictures"


def contents(samples: object) -> list[tuple[str, bytes]]:
    assert isinstance(samples, Samples)
    return sorted(
        (samples.class_names[samples.labels[place]], read_image(samples.open(place)).tobytes())
        for place in range(len(samples))
    )


def test_shards_hold_the_folders_images_under_the_same_classes(pictures: Path, tmp_path: Path) -> None:
    report = write_shards(str(pictures), tmp_path / "out", shard_size=5)
    assert report.class_names == ["ant", "bee"]
    assert report.bad == {}
    assert report.shards == {
        "train": {"train-0000.tar": 4, "train-0001.tar": 4, "train-0002.tar": 4},
        "val": {"val-0000.tar": 2},
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "info.json",
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
        "val-0000.tar",
    ]
    packed, folder = (
        open_data(DataConfig(source=f"wds/{tmp_path / 'out'}")),
        open_data(DataConfig(source=str(pictures))),
    )
    assert packed.class_names == folder.class_names
    assert contents(packed.train) == contents(folder.train)
    assert contents(packed.val) == contents(folder.val)


@pytest.mark.filterwarnings(  # webdataset leaves a finished shard to the garbage collector
    "ignore:unclosed file:ResourceWarning", "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)
def test_timm_reads_the_shards_with_no_more_than_their_folder(pictures: Path, tmp_path: Path) -> None:
    from timm.data import create_dataset

    write_shards(str(pictures), tmp_path / "out", shard_size=5)
    dataset = create_dataset("wds/out", root=str(tmp_path / "out"), split="train", is_training=False, batch_size=1)
    found = sorted((["ant", "bee"][label], image.tobytes()) for image, label in dataset)
    assert found == contents(open_data(DataConfig(source=str(pictures))).train)


def test_every_shard_has_images_of_all_classes_and_the_same_ones_each_time(tmp_path: Path) -> None:
    class_folders(tmp_path / "pictures", {"ant": 20, "bee": 20})
    for name in ("one", "two"):
        write_shards(str(tmp_path / "pictures"), tmp_path / name, shard_size=10)
    for number in range(4):
        content = [(tmp_path / name / f"train-{number:04}.tar").read_bytes() for name in ("one", "two")]
        assert content[0] == content[1]
        with tarfile.open(tmp_path / "one" / f"train-{number:04}.tar") as tar:
            labels = [tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")]  # type: ignore[union-attr]
        assert set(labels) == {b"0", b"1"}


def test_files_are_packed_byte_for_byte_unless_readers_of_shards_do_not_know_them(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "dots"
    folder.mkdir(parents=True)
    picture = Image.effect_noise((9, 5), 80)
    for name in ("a.b.jpg", "x.png", "y.webp", "wrong.gif", "z.tiff", "z.bmp"):
        picture.save(folder / name, "JPEG" if name == "wrong.gif" else None)
    write_shards(str(tmp_path / "pictures"), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-0000.tar") as tar:
        packed = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    assert len(packed) == 12
    found = {name[11:]: data for name, data in packed.items() if not name.endswith(".cls")}
    same = {"dots-a-b.jpg": "a.b.jpg", "dots-x.png": "x.png", "dots-y.webp": "y.webp", "dots-wrong.jpg": "wrong.gif"}
    assert {name: found.pop(name) for name in same} == {
        name: (folder / file).read_bytes() for name, file in same.items()
    }
    assert list(found) == ["dots-z.png", "dots-z.png"] or set(found) == {"dots-z.png"}
    samples = open_data(DataConfig(source=f"wds/{tmp_path / 'out'}", val_fraction=0.5)).train
    assert isinstance(samples, Samples)
    wanted = {np.asarray(read_image(path)).tobytes() for path in folder.iterdir()}
    assert {data for _, data in contents(samples)} <= wanted


def test_a_damaged_image_is_named_and_left_out_or_stops_all(pictures: Path, tmp_path: Path) -> None:
    (pictures / "train" / "ant" / "bad.png").write_bytes(b"words")
    report = write_shards(str(pictures), tmp_path / "out")
    assert report.bad == {str(pictures / "train/ant/bad.png"): "not an image that can be identified"}
    assert report.shards["train"] == {"train-0000.tar": 12}
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["splits"]["train"]["num_samples"] == 12
    with pytest.raises(ValueError, match=r"bad\.png: not an image .*; mend or remove it, or use --on_bad_image=skip"):
        write_shards(str(pictures), tmp_path / "strict", on_bad_image="raise")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_nothing_is_written_over_and_nothing_is_left_half_written(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already; choose another folder, or remove it"):
        write_shards(str(pictures), tmp_path / "out")
    with pytest.raises(ValueError, match="shard_size=0 is impossible; use 1 or more"):
        write_shards(str(pictures), tmp_path / "new", shard_size=0)
    with pytest.raises(ValueError, match="there is no data set 'nowhere'"):
        write_shards("nowhere", tmp_path / "new")

    def interrupt(names: Iterable[str], total: int) -> Iterator[str]:
        assert total == 14
        for number, name in enumerate(names):
            yield name
            if number == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(str(pictures), tmp_path / "new", shard_size=2, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
    (pictures / "val" / "bee" / "050.png").write_bytes(b"")
    (pictures / "val" / "bee" / "051.png").write_bytes(b"")
    with pytest.raises(ValueError, match="the val split has no readable image; 2 were tried"):
        write_shards(str(pictures), tmp_path / "new")
