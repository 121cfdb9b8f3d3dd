"""Before the first epoch every image is looked at, and the report says what was found."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from making import class_folders
from PIL import Image
from test_images import bomb

from epsanet.data import check
from epsanet.data.check import check_images
from epsanet.data.images import read_image
from epsanet.data.samples import FolderSamples


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Five sound images of two sizes in two classes, three damaged ones, and a class without any sound one."""
    class_folders(tmp_path, {"cat": 2, "dog": 2})
    Image.new("RGB", (30, 8)).save(tmp_path / "dog" / "wide.png")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "JPEG")
    (tmp_path / "cat" / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "dog" / "empty.png").write_bytes(b"")
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "words.gif").write_bytes(b"words")
    return tmp_path


def test_damaged_images_are_named_once_counted_and_left_out(mixed: Path) -> None:
    kept, report = check_images(FolderSamples(mixed), "train")
    assert {Path(name).relative_to(mixed).as_posix() for name in report.bad} == {
        "cat/half.jpg",
        "dog/empty.png",
        "eel/words.gif",
    }
    assert "truncated" in report.bad[str(mixed / "cat" / "half.jpg")]
    assert sorted(Path(kept.name(place)).name for place in range(len(kept))) == [
        "000.png",
        "000.png",
        "001.png",
        "001.png",
        "wide.png",
    ]
    for place in range(len(kept)):
        assert kept.class_names[kept.labels[place]] == Path(kept.name(place)).parent.name
        assert tuple(report.sizes[place]) == read_image(kept.open(place)).size


def test_the_report_counts_classes_sizes_and_damage(mixed: Path) -> None:
    _, report = check_images(FolderSamples(mixed), "train")
    assert report.title == "train"
    assert report.images == 5
    assert report.per_class == {"cat": 2, "dog": 3, "eel": 0}
    assert str(report) == "5 images of 3 classes, 0 to 3 a class, 12×8 to 30×12 pixels; none of eel; 3 damaged"


def test_a_sound_folder_is_described_in_the_fewest_words(tmp_path: Path) -> None:
    samples = FolderSamples(class_folders(tmp_path, {"cat": 2, "dog": 2}))
    kept, report = check_images(samples, "val")
    assert kept is samples
    assert str(report) == "4 images of 2 classes, 2 a class, 12×12 pixels"


def test_raise_stops_at_a_damaged_image_and_names_it(mixed: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cat/half\.jpg: damaged: .*; mend or remove it, or use --data\.on_bad_image=skip"
    ):
        check_images(FolderSamples(mixed), "train", on_bad_image="raise")


def test_headers_alone_find_what_is_no_image_but_not_what_is_cut_short(mixed: Path) -> None:
    (mixed / "dog" / "bomb.png").write_bytes(bomb())
    kept, report = check_images(FolderSamples(mixed), "train", depth="headers")
    assert {Path(name).name for name in report.bad} == {"bomb.png", "empty.png", "words.gif"}
    assert report.per_class == {"cat": 3, "dog": 3, "eel": 0}
    assert len(kept) == len(report.sizes) == 6


def test_a_split_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "words.gif").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"the val split has no readable image; the first: .*words\.gif"):
        check_images(FolderSamples(tmp_path), "val")


def test_progress_sees_every_result_and_their_number(mixed: Path) -> None:
    seen: list[object] = []

    def watch(items: Iterable[tuple[int, int] | str], total: int) -> Iterable[tuple[int, int] | str]:
        for item in items:
            seen.append(item)
            yield item
        assert total == len(seen)

    _, report = check_images(FolderSamples(mixed), "train", progress=watch)
    assert len(seen) == 8
    sizes = [item for item in seen if isinstance(item, tuple)]
    assert np.array_equal(sizes, report.sizes)


def test_images_do_not_all_wait_at_once_and_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_BLOCK", 10)
    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        results = check.map_in_blocks(pool, lambda position: (begun.append(position), -position)[1], range(3, 100, 2))
        first = next(results)
        assert len(begun) <= 10
        assert [first, *results] == [-position for position in range(3, 100, 2)]
    assert sorted(begun) == list(range(3, 100, 2))
