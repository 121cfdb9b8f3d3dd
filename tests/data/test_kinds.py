"""Bad and unusual files behave as the table in docs/images.md says, and change nothing for their neighbours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from kinds import KINDS, Kind
from making import class_folders
from torchvision.datasets import ImageFolder

from epsanet.data.check import check_images
from epsanet.data.config import DataConfig
from epsanet.data.images import IMAGE_SUFFIXES, ImageError, image_files, printable, read_image
from epsanet.data.samples import FolderSamples
from epsanet.data.shard import write_shards
from epsanet.data.sources import open_data

PAGE = Path(__file__).parents[2] / "docs" / "images.md"
ROWS = re.findall(r"^\| ([^|]+) \| (read|skipped) \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
TABLE = {title: (outcome, text) for title, outcome, text in ROWS}
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
HERE = [kind for kind in KINDS if not (ROOT and kind.name == "secret.jpg")]  # root reads everything


def make(folder: Path, kinds: list[Kind] = HERE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        kind.make(folder / kind.name)
    return folder


def test_the_page_has_a_row_for_every_kind_and_none_else() -> None:
    assert list(TABLE) == list(dict.fromkeys(kind.title for kind in KINDS))
    assert len(TABLE) >= 32


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.name.encode(errors="replace").decode())
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_file_is_read_or_skipped_as_the_page_says(kind: Kind, tmp_path: Path) -> None:
    make(tmp_path, [kind, *(other for other in HERE if other.name == "plain.bmp")])
    outcome, text = TABLE[kind.title]
    assert outcome == ("skipped" if kind.pixels is None else "read")
    if kind.pixels is None:
        with pytest.raises(ImageError, match=re.escape(text.strip("`"))) as raised:
            read_image(tmp_path / kind.name)
        assert "\n" not in str(raised.value)
        return
    found = np.asarray(read_image(tmp_path / kind.name)).astype(int)
    assert found.shape == kind.pixels.shape
    assert np.abs(found - kind.pixels).max() <= kind.tolerance


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound images of two classes, one of them among all kinds of others."""
    root = class_folders(tmp_path_factory.mktemp("mixed"), {"a": 3, "b": 3})
    make(root / "a")
    (root / "b" / "folder.jpg").mkdir()
    (root / "b" / "up").symlink_to("..")
    return root


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_the_check_before_training_and_evaluation_leaves_out_what_the_page_says(mixed: Path) -> None:
    kept, report = check_images(FolderSamples(mixed), "train")
    assert sorted(Path(name).name for name in report.bad) == sorted(k.name for k in HERE if k.pixels is None)
    good = sorted([*(k.name for k in HERE if k.pixels is not None), *["000.png", "001.png", "002.png"] * 2])
    assert sorted(Path(kept.name(place)).name for place in range(len(kept))) == good
    assert report.per_class == {"a": len(good) - 3, "b": 3}
    _, quick = check_images(FolderSamples(mixed), "train", depth="headers")
    assert quick.bad.keys() < report.bad.keys()
    assert {"pipe.jpg", "loop.jpg", "bomb.png"} <= {Path(name).name for name in quick.bad}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_shards_are_made_of_what_is_read_with_the_same_pixels_and_labels(mixed: Path, tmp_path: Path) -> None:
    report = write_shards(str(mixed), tmp_path / "shards", shard_size=10)
    kept, check = check_images(FolderSamples(mixed), "train")
    assert report.bad == check.bad
    packed = open_data(DataConfig(source=f"wds/{tmp_path / 'shards'}", val_fraction=0.2))

    def contents(samples: object) -> list[tuple[str, bytes]]:
        return [
            (samples.class_names[samples.labels[place]], read_image(samples.open(place)).tobytes())  # type: ignore[attr-defined]
            for place in range(len(samples))  # type: ignore[arg-type]
        ]

    assert sorted(contents(packed.train) + contents(packed.val)) == sorted(contents(kept))


def test_folders_are_listed_as_by_torchvision(tmp_path: Path) -> None:
    class_folders(tmp_path, {"b": 2, "a": 2, "b/deep": 2, "b/a.folder": 1, "c": 0})
    (tmp_path / "b" / "NOTE.txt").write_text("no image")
    (tmp_path / "b" / "Z.JPG").write_bytes(b"")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "deep")
    samples = FolderSamples(tmp_path)
    wanted = ImageFolder(
        str(tmp_path), allow_empty=True, is_valid_file=lambda name: Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    assert samples.class_names == wanted.classes
    assert [(samples.name(place), label) for place, label in enumerate(samples.labels.tolist())] == wanted.samples


def test_links_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 2, "b": 1})
    for name in "ab":  # two of them would be 2⁴⁰ paths
        (tmp_path / name / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to("self")
    assert [Path(name).relative_to(tmp_path).as_posix() for name in FolderSamples(tmp_path)._paths] == [
        "a/000.png",
        "a/001.png",
        "b/000.png",
    ]
    assert len(image_files(tmp_path)) == 3


def test_a_folder_is_searched_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path, {"a": 2, "b": 1})
    (tmp_path / "here").symlink_to(".")
    wanted = ["a/000.png", "a/001.png", "b/000.png"]
    for place, names in (("", (".", "./", "b/..", "here", tmp_path)), ("a", ("..", "../../" + tmp_path.name))):
        monkeypatch.chdir(tmp_path / place)
        for name in names:
            found = [Path(path).resolve().relative_to(tmp_path.resolve()).as_posix() for path in image_files(name)]
            assert sorted(found) == wanted, name


def test_a_name_that_is_no_utf_8_can_be_printed_and_no_class_can_have_it(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == "caf\\xe9"
    assert printable("café") == "café"
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"class folder whose name is not UTF-8, caf\\xe9; rename it"):
        FolderSamples(tmp_path)
