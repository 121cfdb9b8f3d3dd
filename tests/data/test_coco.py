"""COCO data sets are read as pycocotools reads them, and what is wrong with them is named before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detecting import coco_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from making import real_data

from epsanet.data.coco import CocoSamples, check_coco, find_coco_splits, open_coco, open_coco_split, read_rle
from epsanet.data.config import DataConfig


def opened(folder: Path, *, masks: bool = True, **changes: Any) -> Any:
    config = DataConfig(source=str(folder), workers=0, **changes)
    return open_coco(config, masks=masks, progress=lambda _: lambda items, __: items)


def changed(folder: Path, change: Any, split: str = "train") -> None:
    """Rewrite the JSON of a split."""
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_real_annotations_are_those_of_pycocotools() -> None:
    """Boxes, masks, crowd regions and areas of coco100, an image at a time."""
    from pycocotools.coco import COCO

    folder = real_data("coco100")
    file = folder / "annotations" / "instances_val2017.json"
    samples, reference = CocoSamples(file, folder / "val2017"), COCO(str(file))
    crowds = 0
    with_crowds = [place for place in range(len(samples)) if any(a["iscrowd"] for a in samples.annotations(place))]
    for position in {*with_crowds[:3], *range(0, len(samples), 5)}:
        wanted = reference.loadAnns(reference.getAnnIds(imgIds=[samples.image_id(position)]))
        image = samples.images[position]
        found = samples.objects(position, image["height"], image["width"], masks=True)
        names = [reference.cats[entry["category_id"]]["name"] for entry in wanted]
        assert [samples.class_names[label] for label in found.labels] == names
        assert [samples.category_id(int(label)) for label in found.labels] == [a["category_id"] for a in wanted]
        assert found.iscrowd.tolist() == [entry["iscrowd"] for entry in wanted]
        assert found.area.tolist() == [entry["area"] for entry in wanted]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in wanted)]
        assert found.boxes.tolist() == corners
        assert found.masks is not None
        for mask, entry in zip(found.masks, wanted, strict=True):
            assert np.array_equal(mask.numpy(), reference.annToMask(entry))
        crowds += int(found.iscrowd.sum())
    assert crowds > 0


def test_polygons_and_both_run_length_encodings_give_the_same_mask(tmp_path: Path) -> None:
    from pycocotools import mask as reference

    square = np.zeros((40, 50), dtype=np.uint8)
    square[10:30, 5:25] = 1
    compressed = reference.encode(np.asfortranarray(square))
    compressed["counts"] = compressed["counts"].decode()
    runs = np.flatnonzero(np.diff(np.concatenate([[0], square.flatten("F"), [0]])))
    counts = np.diff(np.concatenate([[0], runs, [square.size]])).tolist()
    forms = [
        [[5, 10, 25, 10, 25, 30, 5, 30]],
        [[5, 10, 15, 10, 15, 30, 5, 30], [15, 10, 25, 10, 25, 30, 15, 30]],
        compressed,
        {"size": [40, 50], "counts": counts},
    ]
    folder = coco_folder(tmp_path, images=4, size=(50, 40))

    def write(content: dict[str, Any]) -> None:
        content["annotations"] = [
            {
                "id": 7 + place,
                "image_id": content["images"][place]["id"],
                "category_id": 3,
                "iscrowd": 0,
                "bbox": [5, 10, 20, 20],
                "area": 400,
                "segmentation": form,
            }
            for place, form in enumerate(forms)
        ]

    changed(folder, write)
    train = opened(folder).train
    for position in range(4):
        _, objects = train.read(position)
        assert objects.masks.shape == (1, 40, 50)
        assert np.array_equal(objects.masks[0].numpy(), square)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("segmentation", [[5, 10, 25, float("nan"), 25, 30]], "a corner that is no number"),
        ("segmentation", [[5, 10, 1e9, 10, 25, 30]], "far outside the image"),
        ("segmentation", [[5, 10, 10**400, 10, 25, 30]], "a corner that is no number"),
        ("segmentation", [[5, 10, "25", 10, 25, 30]], "a corner that is no number"),
        ("segmentation", [5, 10, 25, 10, 25, 30], "less than three corners"),
        ("segmentation", [], "has no polygon"),
        ("segmentation", {"size": 40, "counts": [2000]}, "is of size 40"),
        ("segmentation", {"size": [50, 40], "counts": [2000]}, r"is of size \[50, 40\]"),
        ("segmentation", {"size": [40, 50], "counts": [-5, 2005]}, "neither whole numbers"),
        ("segmentation", {"size": [40, 50], "counts": ["2000"]}, "neither whole numbers"),
        ("segmentation", {"size": [40, 50], "counts": [10**9]}, "do not fill"),
        ("segmentation", {"size": [40, 50], "counts": "zzzzzzzzzzzz"}, "neither whole numbers"),
        ("segmentation", {"size": [40, 50], "counts": "\x00"}, "neither whole numbers"),
        ("segmentation", {"size": [40, 50], "counts": "oooooo1"}, "do not fill"),
        ("bbox", [5, 10, float("inf"), 20], "not four numbers"),
        ("iscrowd", "x", "neither 0 nor 1"),
    ],
)
def test_what_would_bring_the_decoder_down_is_left_out(field: str, value: Any, problem: str, tmp_path: Path) -> None:
    """A corner that is no number takes all memory in it, and runs that do not fill the image may write past it."""
    folder = coco_folder(tmp_path, images=4, size=(50, 40))

    def write(content: dict[str, Any]) -> None:
        content["annotations"][0][field] = value

    changed(folder, write)
    entries = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    splits = opened(folder)
    ((kind, (name,)),) = splits.reports[0].problems.items()
    assert name.startswith(f"annotation {entries[0]['id']} of ")
    assert re.search(problem, f"{kind} {name}")
    assert sum(len(splits.train.annotations(place)) for place in range(len(splits.train))) == len(entries) - 1
    for position in range(len(splits.train)):
        splits.train.read(position)


@settings(max_examples=100)
@given(arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70)), elements=st.integers(0, 1)))
def test_any_mask_that_pycocotools_has_compressed_is_read(wanted: np.ndarray) -> None:
    from pycocotools import mask as reference

    compressed = reference.encode(np.asfortranarray(wanted))
    segmentation = {"size": list(wanted.shape), "counts": compressed["counts"].decode()}
    assert np.array_equal(read_rle(segmentation, *wanted.shape), wanted)
    with pytest.raises(ValueError, match="of size"):
        read_rle(segmentation, wanted.shape[0] + 1, wanted.shape[1])


def test_an_area_that_is_no_number_is_that_of_the_box(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)

    def write(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        first["area"] = "large"
        first["bbox"] = [1, 2, 10, 12]

    changed(folder, write)
    assert opened(folder, masks=False).train.read(0)[1].area.tolist()[0] == 120


def test_gaps_in_ids_are_closed_by_name_and_empty_images_stay(tmp_path: Path) -> None:
    """The folder has categories 3 and 8; the validation file has them in the other order, with other ids."""
    folder = coco_folder(tmp_path)

    def swap(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 20, "name": "cat"}, {"id": 90, "name": "ant"}]
        for entry in content["annotations"]:
            entry["category_id"] = {3: 90, 8: 20}[entry["category_id"]]

    before = opened(folder)
    labels = [before.val.read(position)[1].labels.tolist() for position in range(len(before.val))]
    changed(folder, swap, "val")
    splits = opened(folder)
    assert splits.class_names == ["ant", "cat"]
    assert [splits.val.read(position)[1].labels.tolist() for position in range(len(splits.val))] == labels
    assert [splits.val.category_id(label) for label in (0, 1)] == [90, 20]
    report = splits.reports[0]
    assert (report.images, report.empty) == (6, 1)
    image, objects = splits.train.read(5)
    assert image.size == (64, 48)
    assert objects.boxes.shape == (0, 4)
    assert objects.masks.shape == (0, 48, 64)


def test_a_class_that_only_the_validation_split_has_is_an_error(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: content["categories"][0].update(name="yak"), "val")
    with pytest.raises(ValueError, match=r"instances_val\.json does not fit: 1 of 2 classes are unknown: 'yak'"):
        opened(folder)


def damage(content: dict[str, Any]) -> None:
    images, boxes = content["images"], content["annotations"]
    images[0]["file_name"] = "gone.png"
    images[1]["width"] = 99
    images.append({**images[2]})
    first = {"image_id": images[2]["id"], "category_id": 3, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    boxes.extend(
        [
            {**first, "id": 900, "bbox": [5, 5, 0, 9]},
            {**first, "id": 901, "bbox": [500, 5, 9, 9]},
            {**first, "id": 902, "bbox": [60, 40, 30, 30]},
            {**first, "id": 903, "bbox": [5, 5, float("nan"), 9]},
            {**first, "id": 904, "bbox": [5, 5, 9]},
            {**first, "id": 905, "bbox": [5, 5, 9, 9], "category_id": 77},
            {**first, "id": 906, "bbox": [5, 5, 9, 9], "image_id": 12345},
            {**first, "id": 907, "bbox": [5, 5, 9, 9], "segmentation": [[1, 1, 9, 1]]},
            {**first, "id": 902, "bbox": [5, 5, 9, 9]},
        ]
    )


def test_everything_wrong_is_named_counted_and_left_out(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    sound = opened(folder)
    (folder / "train" / "3.png").write_bytes(b"no image")
    changed(folder, damage)
    splits = opened(folder)
    problems = splits.reports[0].problems
    shown = {kind: names[0] for kind, names in problems.items()}
    assert {kind: len(names) for kind, names in problems.items()} == dict.fromkeys(problems, 1) | {
        "boxes that are not four numbers": 2
    }
    assert shown["missing images"].endswith("gone.png (no such file)")
    assert "3.png (not an image" in shown["damaged images"]
    assert "64×48, in the file 99×48" in shown["images of another size than the file says"]
    assert shown["duplicate image ids"] == f"image {10 + 2 * 7}"
    assert shown["duplicate annotation ids"] == "annotation 902"
    assert shown["boxes without area"] == "annotation 900 of 2.png"
    assert shown["boxes outside the image"] == "annotation 901 of 2.png"
    assert shown["boxes reaching out of the image, cut at its border"] == "annotation 902 of 2.png"
    assert shown["boxes that are not four numbers"] == "annotation 903 of 2.png"
    assert shown["annotations of unknown categories"] == "annotation 905 of category 77"
    assert shown["annotations of unknown images"] == "annotation 906 of image 12345"
    assert shown["objects without a usable segmentation"].startswith("annotation 907 of 2.png (has a polygon")
    assert "1 missing images" in str(splits.reports[0])
    assert len(splits.train) == 3
    kept = splits.train.read(0)[1].boxes
    assert kept.tolist() == [*sound.train.read(2)[1].boxes.tolist(), [60, 40, 64, 48], [5, 5, 14, 14]]
    with pytest.raises(ValueError, match=r"1 missing images .*gone.png.*mend them, or use --data.on_bad_image=skip"):
        opened(folder, on_bad_image="raise")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": []}', "no list 'categories'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "no 'file_name'"),
        (
            '{"images": [{"id": [1], "file_name": "a.png"}], "annotations": [], "categories": []}',
            "'id' of a wrong type",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": "1", "name": "a"}]}', "'id' of a wrong type"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "twice: a",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable image"),
    ],
)
def test_a_file_that_is_no_coco_json_is_refused(text: str, message: str, tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    (folder / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        opened(folder)
    assert "instances_train.json" in str(caught.value)


def test_the_usual_layouts_are_found(tmp_path: Path) -> None:
    wanted = {
        "coco": ("annotations/instances_train2017.json", "train2017"),
        "plain": ("train.json", "train"),
        "images": ("train.json", "images/train"),
        "roboflow": ("train/_annotations.coco.json", "train"),
        "together": ("annotations/train.json", "images"),
    }
    for name, (file, images) in wanted.items():
        folder = coco_folder(tmp_path / name)
        source = folder / "annotations" / "instances_train.json"
        (tmp_path / name / images).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train").rename(folder / "moved")
        (folder / "val").rename(folder / "elsewhere")
        (folder / "moved").rename(folder / images)
        text = source.read_text()
        (folder / "annotations" / "instances_val.json").unlink()
        source.unlink()
        (folder / file).write_text(text)
        assert find_coco_splits(folder) == {"train": (folder / file, folder / images)}, name


def test_a_folder_without_splits_or_masks_says_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no COCO JSON for train; .*instances_train.json"):
        opened(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder"):
        opened(tmp_path / "gone")
    folder = coco_folder(tmp_path / "boxes")
    changed(folder, lambda content: [entry.pop("segmentation") for entry in content["annotations"]])
    with pytest.raises(ValueError, match=r"has boxes but no segmentations; train --detector.architecture=faster_rcnn"):
        opened(folder)
    assert opened(folder, masks=False).train.read(0, masks=False)[1].masks is None


def test_a_split_is_opened_for_a_detector_with_more_classes_in_another_order(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    config = DataConfig(source=str(folder), workers=0)
    progress: Any = lambda _: lambda items, __: items  # noqa: E731
    samples, report = open_coco_split(config, None, ["cat", "dog", "ant"], masks=True, progress=progress)
    plain = opened(folder).val
    assert report.title == "val"
    for position in range(len(plain)):
        wanted = [{0: 2, 1: 0}[label] for label in plain.read(position)[1].labels.tolist()]
        assert samples.read(position)[1].labels.tolist() == wanted
    with pytest.raises(ValueError, match="'ant'"):
        open_coco_split(config, "val", ["cat"], masks=True, progress=progress)
    with pytest.raises(ValueError, match="no COCO JSON for test, only train, val"):
        open_coco_split(config, "test", ["cat", "ant"], masks=True, progress=progress)


def test_a_rounded_box_at_the_border_is_no_problem(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: content["annotations"][0].update(bbox=[-0.5, 0, 30, 48.5]))
    file, images = find_coco_splits(folder)["train"]
    samples = CocoSamples(file, images)
    report = check_coco(samples, "train", DataConfig(source=str(folder)), masks=True)
    assert report.problems == {}
    assert torch.equal(samples.read(0)[1].boxes[0], torch.tensor([0, 0, 29.5, 48]))
