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
from PIL import Image

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


def test_crowd_regions_of_a_class_that_training_does_not_know_are_left_out(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)

    def add(content: dict[str, Any]) -> None:
        content["categories"].append({"id": 9, "name": "yak"})
        content["annotations"].append({**content["annotations"][0], "id": 900, "category_id": 9, "iscrowd": 1})

    wanted = opened(folder)
    changed(folder, add, "val")
    splits = opened(folder)
    assert splits.reports[1].problems == {"crowd regions of unknown classes": ["annotation 900 (yak)"]}
    assert splits.reports[1].crowds == 0
    for position in range(len(splits.val)):
        found, before = (one.val.read(position)[1].as_target() for one in (splits, wanted))
        assert all(torch.equal(found[key], before[key]) for key in before)
    changed(folder, add, "train")
    assert opened(folder).reports[1].crowds == 1


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 1e-6, 9],  # nothing in float32
        [5, 5, 9, 1e-3],  # next to nothing when the image is scaled
        [-9, 5, 9 + 1e-7, 9],  # all of it beyond the border
        [64 - 1e-9, 5, 9, 9],
        [5, 5, -2, 9],
        [70, 5, -9, 9],
    ],
)
def test_slivers_are_boxes_without_area(box: list[float], tmp_path: Path) -> None:
    """torchvision's losses refuse a box whose corners meet, at whatever size the image is."""
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: content["annotations"][0].update(bbox=box))
    splits = opened(folder)
    (names,) = (splits.reports[0].problems[kind] for kind in ("boxes without area",))
    assert names == ["annotation 2 of 0.png"]
    for position in range(len(splits.train)):
        boxes = splits.train.read(position)[1].boxes
        for scale in (0.1, 1 / 3, 1, 7.77):
            assert (boxes[:, 2:] * scale > boxes[:, :2] * scale).all()


def test_a_class_that_only_the_validation_split_has_is_an_error(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: content["categories"][0].update(name="yak"), "val")
    with pytest.raises(ValueError, match=r"instances_val\.json does not fit: 1 of 2 classes are unknown: 'yak'"):
        opened(folder)


def test_entries_of_one_id_are_kept_where_they_are_the_same_and_left_out_where_not(tmp_path: Path) -> None:
    """Images 10, 17, … of two files that were merged: nobody can tell whose the objects of image 17 are."""
    folder = coco_folder(tmp_path)
    before = opened(folder).train

    def merge(content: dict[str, Any]) -> None:
        content["images"] += [{"id": 17, "file_name": "5.png"}, content["images"][2]]
        content["annotations"] += content["annotations"][:2]

    changed(folder, merge)
    splits = opened(folder)
    objects = len(before.annotations(1))
    assert splits.reports[0].problems == {
        "image ids of several images, left out with their annotations": [
            f"image 17 (1.png, 5.png; {objects} annotations)"
        ],
        "duplicate image ids": ["image 24"],
        "duplicate annotation ids": ["annotation 2", "annotation 7"],
    }
    assert [Path(splits.train.name(place)).name for place in range(5)] == [f"{name}.png" for name in (0, 2, 3, 4, 5)]
    for place, other in enumerate((0, 2, 3, 4, 5)):
        assert splits.train.annotations(place) == before.annotations(other)
    with pytest.raises(ValueError, match=r"1 image ids of several images, .* \(image 17 \(1\.png, 5\.png; 2 annot"):
        opened(folder, on_bad_image="raise")


def test_a_category_id_of_two_classes_is_left_out_with_its_objects(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    for split in ("train", "val"):
        changed(folder, lambda content: content["categories"].append({"id": 8, "name": "yak"}), split)
    splits = opened(folder)
    assert splits.class_names == ["ant"]
    ((kind, (name,)),) = splits.reports[0].problems.items()
    assert kind == "category ids of several categories, left out with their annotations"
    cats = json.loads((folder / "annotations" / "instances_train.json").read_text())["annotations"]
    cats = [entry for entry in cats if entry["category_id"] == 8]
    assert len(cats) > 0
    assert name == f"category 8 (cat, yak; {len(cats)} annotations)"
    assert {e["category_id"] for place in range(len(splits.train)) for e in splits.train.annotations(place)} == {3}


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
        ("[" * 100_000, "cannot be read as JSON"),
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
        "cvat": ("annotations/instances_Train.json", "images/Train"),
        "fiftyone": ("train/labels.json", "train/data"),
        "beside": ("train/annotations.json", "train/images"),
    }
    for name, (file, images) in wanted.items():
        folder = coco_folder(tmp_path / name)
        source = folder / "annotations" / "instances_train.json"
        (tmp_path / name / images).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train").rename(folder / "moved")
        (folder / "val").rename(folder / "elsewhere")
        (folder / images).parent.mkdir(exist_ok=True)
        (folder / "moved").rename(folder / images)
        text = source.read_text()
        (folder / "annotations" / "instances_val.json").unlink()
        source.unlink()
        (folder / file).write_text(text)
        assert find_coco_splits(folder) == {"train": (folder / file, folder / images)}, name


@pytest.mark.parametrize(
    ("prefix", "wanted"), [("images/", "."), ("train/", "."), ("cam1/", "train"), ("cam1/", "images/train")]
)
def test_images_are_where_the_file_names_lead_to(prefix: str, wanted: str, tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(
        folder, lambda content: [image.update(file_name=prefix + image["file_name"]) for image in content["images"]]
    )
    (folder / "images").mkdir()
    (folder / "images" / "other.png").write_bytes(b"")
    (folder / "train").rename(folder / "moved")
    place = folder / wanted / prefix
    place.parent.mkdir(exist_ok=True, parents=True)
    if prefix == "images/":
        (folder / "images" / "other.png").unlink()
        (folder / "images").rmdir()
    (folder / "moved").rename(place)
    splits = opened(folder)
    assert Path(splits.train.folder).resolve() == (folder / wanted).resolve()
    assert (len(splits.train), splits.train.problems) == (6, {})


def test_file_names_of_windows_are_found(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(
        folder, lambda content: [image.update(file_name="train\\" + image["file_name"]) for image in content["images"]]
    )
    file = folder / "annotations" / "instances_train.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    splits = opened(folder)
    assert (len(splits.train), splits.train.problems) == (6, {})


def test_cvats_own_names_of_subsets_are_found(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    for split, title in (("train", "Train"), ("val", "Validation")):
        places = folder / "annotations"
        (places / f"instances_{split}.json").rename(places / f"instances_{title}.json")
        (folder / "images").mkdir(exist_ok=True)
        (folder / split).rename(folder / "images" / title)
    splits = opened(folder)
    assert (len(splits.train), len(splits.val), splits.class_names) == (6, 6, ["ant", "cat"])


def test_a_list_of_test_images_is_left_out_with_a_note_and_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    file = folder / "annotations" / "test.json"
    file.write_text(json.dumps({"images": [], "categories": []}), encoding="utf-8-sig")  # Windows' mark is no fault
    (folder / "val").rename(folder / "moved")
    (folder / "test").mkdir()
    (folder / "moved").rename(folder / "val")
    (folder / "test" / "x.png").write_bytes(b"")
    splits = opened(folder)
    assert splits.test is None
    assert splits.notes == (f"{file} lists test images without annotations, and is left out",)
    with pytest.raises(ValueError, match=r"test.json is no COCO JSON: it has no list 'annotations'"):
        split_of(folder, "test")


@pytest.mark.parametrize("split", ["train", "val"])
def test_crowd_regions_alone_are_nothing_to_learn_from(split: str, tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]], split)
    with pytest.raises(ValueError, match=rf"instances_{split}.json has no object to .*, only 10 crowd regions"):
        opened(folder)


def test_an_unused_category_of_a_name_that_another_has_is_left_out(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    root = {"id": 0, "name": "ant", "supercategory": "none"}
    changed(folder, lambda content: content["categories"].insert(0, root))
    train = opened(folder).train
    assert train.class_names == ["ant", "cat"]
    assert train.problems == {"unused categories of a name that another has": ["0 (ant)"]}
    changed(folder, lambda content: content["annotations"][0].update(category_id=0))
    with pytest.raises(ValueError, match="names a category twice: ant"):
        opened(folder)


def test_specks_of_a_contour_do_not_take_their_object_along() -> None:
    square = [2, 3, 12, 3, 12, 13, 2, 13]
    wanted = read_rle([square], 20, 30)
    for specks in ([[17, 3, 18, 3]], [[17, 3]], [[17, 3, 18, 3], [5, 5]]):
        assert np.array_equal(read_rle([*specks, square], 20, 30), wanted)
        assert np.array_equal(read_rle([square, *specks], 20, 30), wanted)
        with pytest.raises(ValueError, match="less than three corners"):
            read_rle(specks, 20, 30)


@pytest.mark.parametrize("name", ["training-data", "testset", "valves", "train"])
def test_the_name_of_the_data_set_is_not_taken_for_that_of_a_split(name: str, tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / name)
    wanted = {}
    for split in ("train", "val"):
        (folder / "annotations" / f"instances_{split}.json").rename(folder / f"{split}.json")
        wanted[split] = (folder / f"{split}.json", folder / split)
    (folder / "annotations").rmdir()
    (folder / "valves").mkdir()
    (folder / "valves" / "settings.json").write_text("{}")
    assert find_coco_splits(folder) == wanted
    (folder / "val.json").unlink()
    assert find_coco_splits(folder) == {"train": wanted["train"]}


def test_cocos_own_lists_of_test_images_are_no_test_split(tmp_path: Path) -> None:
    """The files of cocodataset.org as they are unpacked, all in one folder."""
    folder = coco_folder(tmp_path)
    places = folder / "annotations"
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        for kind in ("captions", "person_keypoints"):
            (places / f"{kind}_{split}2017.json").write_text("{}")
        (places / f"instances_{split}.json").rename(places / f"instances_{split}2017.json")
    listed = json.dumps({"images": [], "categories": []})
    for name in ("image_info_test2017", "image_info_test-dev2017"):
        (places / f"{name}.json").write_text(listed)
    splits = opened(folder)
    assert (len(splits.train), len(splits.val), splits.test) == (6, 6, None)
    _, report, _ = split_of(folder, None)
    assert report.title == "val"


def split_of(folder: Path, split: str | None, **changes: Any) -> Any:
    """A split opened for a detector with masks."""
    config = DataConfig(source=str(folder), workers=0)
    arguments = {"class_names": ["ant", "cat"], "masks": True, "progress": lambda _: lambda items, __: items}
    return open_coco_split(config, split, **{**arguments, **changes})


def test_only_the_split_that_is_asked_for_has_to_be_there(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    (folder / "annotations" / "instances_test.json").write_text("{}")
    for split in ("train", "val"):
        assert split_of(folder, split)[1].title == split
    for split in ("test", None):
        with pytest.raises(ValueError, match=r"instances_test.json has no folder of images beside it"):
            split_of(folder, split)


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
    samples, report, masks = open_coco_split(config, None, ["cat", "dog", "ant"], masks=True, progress=progress)
    plain = opened(folder).val
    assert masks
    assert report.title == "val"
    for position in range(len(plain)):
        wanted = [{0: 2, 1: 0}[label] for label in plain.read(position)[1].labels.tolist()]
        assert samples.read(position)[1].labels.tolist() == wanted
    with pytest.raises(ValueError, match="'ant'"):
        open_coco_split(config, "val", ["cat"], masks=True, progress=progress)
    with pytest.raises(ValueError, match="no COCO JSON for test, only train, val"):
        open_coco_split(config, "test", ["cat", "ant"], masks=True, progress=progress)


def test_segmentations_are_used_where_any_object_has_one(tmp_path: Path) -> None:
    """An object without a segmentation, or a placeholder of the annotator's tool, does not hide those of the others."""
    folder = coco_folder(tmp_path)

    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0].update(bbox=[0, 0, 0, 0], segmentation=[])
        content["annotations"][1].update(segmentation=[[1, 1, 9, 9]])
        content["annotations"][2].pop("segmentation")

    changed(folder, spoil, "val")
    splits = opened(folder)
    samples, report, masks = split_of(folder, "val")
    assert masks
    assert report.problems == splits.reports[1].problems
    kinds = {kind: len(names) for kind, names in report.problems.items()}
    assert kinds == {"boxes without area": 1, "objects without a usable segmentation": 2}
    for position in range(len(samples)):
        objects = samples.read(position)[1]
        assert objects.masks is not None
        assert len(objects.masks) == len(objects.boxes)
    changed(folder, lambda content: [entry.update(segmentation=[]) for entry in content["annotations"]], "val")
    samples, report, masks = split_of(folder, "val")
    assert not masks
    assert sum(report.per_class.values()) == 9  # all but the placeholder
    assert split_of(folder, "train", masks=False)[2] is False


@pytest.mark.parametrize("check", ["headers", "full"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_photographs_lie_as_their_orientation_says_however_they_are_checked(
    suffix: str, check: Any, tmp_path: Path
) -> None:
    """Orientations 5 to 8 of EXIF 2.3 swap width and height; annotators see the upright picture."""
    folder = coco_folder(tmp_path, images=8, size=(64, 48))

    def turn(content: dict[str, Any]) -> None:
        for orientation, image in enumerate(content["images"], start=1):
            picture = Image.open(folder / "train" / image["file_name"])
            image["file_name"] = f"{orientation}.{suffix}"
            exif = Image.Exif()
            exif[0x0112] = orientation
            picture.save(folder / "train" / image["file_name"], exif=exif)
            image["width"], image["height"] = (64, 48) if orientation < 5 else (48, 64)

    changed(folder, turn)
    splits = opened(folder, check=check)
    assert splits.reports[0].problems == {}
    assert [splits.train.read(place)[0].size for place in range(8)] == [(64, 48)] * 4 + [(48, 64)] * 4


def test_a_split_without_usable_images_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)

    def resize(content: dict[str, Any]) -> None:
        for image in content["images"][:5]:
            image.update(width=48, height=64)

    (folder / "train" / "5.png").write_bytes(b"no image")
    changed(folder, resize)
    with pytest.raises(ValueError, match="the train split has no usable image") as caught:
        opened(folder)
    text = str(caught.value)
    assert "5 images of another size than the file says" in text
    assert "0.png (64×48, in the file 48×64)" in text
    assert "1 damaged images" in text
    changed(folder, lambda content: [image.update(width=None, height=0) for image in content["images"]])
    assert len(opened(folder).train) == 5


def test_a_rounded_box_at_the_border_is_no_problem(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    changed(folder, lambda content: content["annotations"][0].update(bbox=[-0.5, 0, 30, 48.5]))
    file, images = find_coco_splits(folder)["train"]
    samples = CocoSamples(file, images)
    report = check_coco(samples, "train", DataConfig(source=str(folder)), masks=True)
    assert report.problems == {}
    assert torch.equal(samples.read(0)[1].boxes[0], torch.tensor([0, 0, 29.5, 48]))
