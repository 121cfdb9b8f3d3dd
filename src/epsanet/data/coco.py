"""COCO's JSON format: folders of images with boxes and masks, checked before anything is trained on them.

A data set is a folder with a JSON file and a folder of images for each split, in one of the usual layouts::

    annotations/instances_train2017.json   train2017/*.jpg        COCO's own
    train.json                             train/*.jpg            or images/train/*.jpg
    train/_annotations.coco.json           train/*.jpg            Roboflow's
    annotations/instances_Train.json       images/Train/*.jpg     CVAT's
    train/labels.json                      train/data/*.jpg       FiftyOne's

Segmentations may be polygons or run-length encodings, compressed or not; ids may have gaps; crowd regions and images
without objects are kept. A class is its *name*: labels follow the training split's list of names.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epsanet._processes import cores
from epsanet.data.check import look_at, map_in_blocks
from epsanet.data.config import DataConfig
from epsanet.data.detection import DetectionSamples, DetectionSplits, Objects, SplitReport
from epsanet.data.images import IMAGE_SUFFIXES, read_image
from epsanet.data.samples import match_classes, subfolders
from epsanet.data.sources import TEST_NAMES, TRAIN_NAMES, VAL_NAMES, require

__all__ = ["CocoSamples", "check_coco", "find_coco_splits", "open_coco", "open_coco_split", "read_rle"]

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
_TOLERANCE = 1.0
"""Annotators' tools round: a box may reach so many pixels out of its image without being called wrong."""
_FARTHEST = 4
"""A polygon may reach so many times the longer side of its image out of it."""
_LEAST_SIDE = 0.01
"""Boxes that are narrower in pixels have no area left in float32, when their image is scaled."""
_BEGINNING = 2**20
"""Bytes of a JSON file; the names of some images are among them."""
_LARGEST = 1e9
"""Numbers from this on are no pixels."""


class CocoSamples(DetectionSamples):
    """One split: a JSON file and its folder of images, as they are; ``check_coco`` leaves out what is wrong.

    Args:
        file: the JSON file.
        folder: of the images.
        class_names: whose order labels follow; the categories of the file, by their ids, when left out.

    Raises:
        ValueError: when the file is no COCO JSON, or has classes that ``class_names`` lacks.
    """

    def __init__(self, file: Path, folder: Path, class_names: list[str] | None = None) -> None:
        content = _read_json(file)
        self.file, self.folder = file, folder
        self.problems: dict[str, list[str]] = {}
        self.images = self._unambiguous(content, "images", "image", "file_name")
        categories = self._used(content, self._unambiguous(content, "categories", "category", "name"))
        categories.sort(key=lambda category: category["id"])
        names = [str(category["name"]) for category in categories]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{file} names a category twice: {', '.join(twice)}; give each its own name")
        self._categories = {category["id"]: name for category, name in zip(categories, names, strict=True)}
        self._annotations: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        self._add(content["annotations"])
        self.class_names = names if class_names is None else class_names
        used = [name for name in names if class_names is None or name in class_names or self._counts()[name]]
        try:
            places, _ = match_classes(used, self.class_names)
        except ValueError as error:
            raise ValueError(f"{file} does not fit: {error}") from error
        self._labels = dict(zip(used, places, strict=True))
        self._category_ids = {
            self._labels[name]: number for number, name in self._categories.items() if name in self._labels
        }
        for entries in self._annotations.values():
            entries[:] = [entry for entry in entries if self._has_label(entry)]

    def _unambiguous(self, content: dict[str, Any], key: str, kind: str, naming: str) -> list[dict[str, Any]]:
        """The entries, one an id; none of an id that several have, as after merging files that both count from 1.

        Whose the annotations of such an id are cannot be told, and they are taken out too.
        """
        entries: dict[Any, list[dict[str, Any]]] = {}
        for entry in content[key]:
            entries.setdefault(entry["id"], []).append(entry)
        annotations: list[dict[str, Any]] = content["annotations"]
        counts = Counter(annotation[f"{kind}_id"] for annotation in annotations)
        ambiguous = set()
        for number, group in entries.items():
            names = list(dict.fromkeys(str(entry[naming]) for entry in group))
            if len(names) > 1:
                ambiguous.add(number)
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                problem = f"{kind} ids of several {key}, left out with their annotations"
                self.found(problem, f"{kind} {number} ({shown}; {counts[number]:,} annotations)")
            elif len(group) > 1:
                self.found(f"duplicate {kind} ids", f"{kind} {number}")
        content["annotations"] = [one for one in annotations if one[f"{kind}_id"] not in ambiguous]
        return [group[0] for number, group in entries.items() if number not in ambiguous]

    def _used(self, content: dict[str, Any], categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without categories that no object has and whose name another has, as labelling tools add a root to them."""
        used = {annotation["category_id"] for annotation in content["annotations"]}
        taken = {str(category["name"]) for category in categories if category["id"] in used}
        kept = []
        for category in categories:
            if category["id"] in used or str(category["name"]) not in taken:
                kept.append(category)
            else:
                self.found("unused categories of a name that another has", f"{category['id']} ({category['name']})")
        return kept

    def _add(self, annotations: list[dict[str, Any]]) -> None:
        seen: dict[Any, list[dict[str, Any]]] = {}
        for annotation in annotations:
            title = f"annotation {annotation['id']}"
            others = seen.setdefault(annotation["id"], [])
            if others:
                self.found("duplicate annotation ids", title)
            if annotation in others:
                continue
            others.append(annotation)
            if annotation["image_id"] not in self._annotations:
                self.found("annotations of unknown images", f"{title} of image {annotation['image_id']}")
            elif annotation["category_id"] not in self._categories:
                self.found("annotations of unknown categories", f"{title} of category {annotation['category_id']}")
            else:
                self._annotations[annotation["image_id"]].append(annotation)

    def _has_label(self, annotation: dict[str, Any]) -> bool:
        name = self._categories[annotation["category_id"]]
        if name not in self._labels:  # other objects of such a class have been refused
            self.found("crowd regions of unknown classes", f"annotation {annotation['id']} ({name})")
        return name in self._labels

    def found(self, kind: str, name: str) -> None:
        """Note something wrong."""
        self.problems.setdefault(kind, []).append(name)

    def _counts(self) -> Counter[str]:
        return Counter(
            self._categories[entry["category_id"]]
            for entries in self._annotations.values()
            for entry in entries
            if not entry.get("iscrowd")
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:  # type: ignore[override]
        """Whether any object has a segmentation; where masks are used, objects without one are left out."""
        objects = [entry for entries in self._annotations.values() for entry in entries]
        return any(entry.get("segmentation") for entry in objects) or not objects

    def path(self, position: int) -> Path:
        """File of an image."""
        name = self.images[position]["file_name"]
        path = self.folder / name
        return self.folder / name.replace("\\", "/") if "\\" in name and not path.exists() else path

    def name(self, position: int) -> str:
        return str(self.path(position))

    def image_id(self, position: int) -> int | str:
        number: int | str = self.images[position]["id"]
        return number

    def category_id(self, label: int) -> int:
        return self._category_ids.get(label, -1)

    def annotations(self, position: int) -> list[dict[str, Any]]:
        """Of an image, as they stand in the file."""
        return self._annotations[self.images[position]["id"]]

    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:  # noqa: ARG002
        image = read_image(self.path(position))
        return image, self.objects(position, image.height, image.width, masks=masks)

    def objects(self, position: int, height: int, width: int, *, masks: bool) -> Objects:
        """Boxes, labels and masks of an image, boxes cut at its border."""
        entries = self.annotations(position)
        decoded = [read_rle(entry["segmentation"], height, width) for entry in entries] if masks else []
        shape = (0, height, width)
        return Objects(
            boxes=_corners([entry["bbox"] for entry in entries], height, width),
            labels=torch.tensor(
                [self._labels[self._categories[entry["category_id"]]] for entry in entries], dtype=torch.int64
            ),
            iscrowd=torch.tensor([int(entry.get("iscrowd") or 0) for entry in entries], dtype=torch.int64),
            area=torch.tensor([_area(entry) for entry in entries], dtype=torch.float32),
            masks=(torch.from_numpy(np.stack(decoded)) if decoded else torch.zeros(shape, dtype=torch.uint8))
            if masks
            else None,
        )

    def keep(self, positions: Sequence[int]) -> None:
        """Leave all other images out."""
        self.images = [self.images[position] for position in positions]

    def keep_annotations(self, position: int, kept: list[dict[str, Any]]) -> None:
        """Leave all other annotations of an image out."""
        self._annotations[self.images[position]["id"]] = kept

    def report(self, title: str, sizes: list[tuple[int, int]]) -> SplitReport:
        """What the split holds."""
        entries = [self.annotations(position) for position in range(len(self))]
        counts: Counter[int] = Counter(
            self._labels[self._categories[entry["category_id"]]]
            for group in entries
            for entry in group
            if not entry.get("iscrowd")
        )
        widths, heights = zip(*sizes, strict=True)
        least, most = f"{min(widths)}×{min(heights)}", f"{max(widths)}×{max(heights)}"
        return SplitReport(
            title=title,
            images=len(self),
            empty=sum(not group for group in entries),
            per_class={name: counts[label] for label, name in enumerate(self.class_names)},
            crowds=sum(bool(entry.get("iscrowd")) for group in entries for entry in group),
            size=least if least == most else f"{least} to {most}",
            problems=self.problems,
        )


_FIELDS: dict[str, dict[str, Any]] = {
    "images": {"id": int | str, "file_name": str},
    "annotations": {"id": int | str, "image_id": int | str, "category_id": int, "bbox": object},
    "categories": {"id": int, "name": int | str},
}
"""What every entry has, and of which type."""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    for key, fields in _FIELDS.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{file} is no COCO JSON: it has no list {key!r}")
        for entry in entries:
            lacking = [name for name in fields if not isinstance(entry, dict) or name not in entry]
            if lacking:
                raise ValueError(
                    f"{file} is no COCO JSON: an entry of {key!r} has no {lacking[0]!r}: {str(entry)[:80]}"
                )
            wrong = [name for name, kinds in fields.items() if not isinstance(entry[name], kinds)]
            if wrong:
                raise ValueError(
                    f"{file} is no COCO JSON: an entry of {key!r} has {wrong[0]!r} of a wrong type: {str(entry)[:80]}"
                )
    return content


def _corners(boxes: list[list[float]], height: int, width: int) -> Tensor:
    """Boxes ``x, y, width, height`` as ``x0, y0, x1, y1``, cut at the image's border; float32, shape ``K, 4``."""
    corners = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    corners[:, 0::2] = corners[:, 0::2].clamp(0, width)
    corners[:, 1::2] = corners[:, 1::2].clamp(0, height)
    return corners.float()


def _area(annotation: dict[str, Any]) -> float:
    """Of an object in pixels; of its box, where the file does not say."""
    area: Any = annotation.get("area")
    _, _, width, height = annotation["bbox"]
    return float(area) if _is_number(area) and area > 0 else float(width * height)


def read_rle(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A segmentation as a mask of shape ``H, W``, uint8, 0 or 1.

    Args:
        segmentation: polygons, or a run-length encoding, compressed or not.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        ValueError: when it is none of these, or of another size.
    """
    from faster_coco_eval.core import mask

    reason = _segmentation_error(segmentation, height, width)
    if reason:
        raise ValueError(f"a segmentation {reason}")
    if isinstance(segmentation, list):
        encoded = mask.merge(mask.frPyObjects(_with_an_area(segmentation), height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = mask.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    decoded: np.ndarray = mask.decode(encoded)
    return decoded


def _segmentation_error(segmentation: Any, height: int, width: int) -> str:
    """What keeps a segmentation from being decoded; the decoder checks nothing, and would take all memory."""
    if isinstance(segmentation, list):
        return _polygon_error(_with_an_area(segmentation) or segmentation, _FARTHEST * max(height, width))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither polygons nor a run-length encoding"
    if segmentation["size"] != [height, width]:
        return f"is of size {str(segmentation['size'])[:40]}, not {[height, width]}"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        return "has counts that are neither whole numbers nor COCO's text for them"
    return "" if sum(counts) == height * width else "has counts that do not fill the image"


def _with_an_area(polygons: list[Any]) -> list[Any]:
    """Without parts of one or two corners, specks that tools which follow contours leave in."""
    return [part for part in polygons if not (isinstance(part, list) and len(part) in (2, 4))]


def _polygon_error(polygons: list[Any], farthest: int) -> str:
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "has a polygon of less than three corners"
        if not all(_is_number(value) and abs(value) <= farthest for value in polygon):
            return "has a polygon with a corner that is no number, or far outside the image"
    return "" if polygons else "has no polygon"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST  # NaN is not below


def _run_lengths(text: str) -> list[int] | None:
    """The counts in COCO's compressed text: five bits a character, from the third on the change since the last but one.

    Returns:
        None when it is no such text.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def check_coco(
    samples: CocoSamples, title: str, config: DataConfig, *, masks: bool, progress: Progress = lambda items, _: items
) -> SplitReport:
    """Look at every image and annotation of a split, and leave out what cannot be used.

    Args:
        samples: the split; changed in place.
        title: what to call it.
        config: ``check`` decodes whole images or reads headers; ``on_bad_image="raise"`` stops at anything wrong.
        masks: whether segmentations are used.
        progress: wraps the results as they come, with their number, to show how far it is.

    Raises:
        ValueError: with ``on_bad_image="raise"``, and when no image can be used.
    """
    sizes: list[tuple[int, int]] = []
    kept: list[int] = []
    with ThreadPoolExecutor(max_workers=len(cores())) as pool:
        looked = map_in_blocks(
            pool, lambda place: look_at(lambda: samples.path(place), config.check), range(len(samples))
        )
        for position, size in enumerate(progress(looked, len(samples))):
            if _image_is_good(samples, position, size):
                assert not isinstance(size, str)
                kept.append(position)
                sizes.append(size)
                samples.keep_annotations(position, _good_annotations(samples, position, size, masks=masks))
    if samples.problems and config.on_bad_image == "raise":
        text = f"{samples.file}: {_shown(samples.problems)}"
        raise ValueError(f"{text}; mend them, or use --data.on_bad_image=skip")
    if not kept:
        text = f"the {title} split has no usable image; {samples.file} names images in {samples.folder}"
        raise ValueError(f"{text}{': ' if samples.problems else ''}{_shown(samples.problems)}")
    samples.keep(kept)
    return samples.report(title, sizes)


def _shown(problems: dict[str, list[str]]) -> str:
    """How many of each kind, and the first."""
    return "; ".join(f"{len(names):,} {kind} ({names[0]})" for kind, names in problems.items())


def _image_is_good(samples: CocoSamples, position: int, size: tuple[int, int] | str) -> bool:
    image, name = samples.images[position], samples.name(position)
    if isinstance(size, str):
        samples.found("missing images" if size == "no such file" else "damaged images", f"{name} ({size})")
        return False
    said = (image.get("width") or size[0], image.get("height") or size[1])  # some tools write null or 0
    if said != size:
        text = f"{name} ({size[0]}×{size[1]}, in the file {said[0]}×{said[1]})"
        samples.found("images of another size than the file says", text)
        return False
    return True


def _good_annotations(
    samples: CocoSamples, position: int, size: tuple[int, int], *, masks: bool
) -> list[dict[str, Any]]:
    file = samples.images[position]["file_name"]
    boxed = []
    for entry in samples.annotations(position):
        box = entry["bbox"]
        if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
            boxed.append(entry)
        else:
            samples.found("boxes that are not four numbers", f"annotation {entry['id']} of {file}")
    corners = _corners([entry["bbox"] for entry in boxed], size[1], size[0])
    sides = (corners[:, 2:] - corners[:, :2]).amin(dim=1).tolist()
    kept = []
    for entry, side in zip(boxed, sides, strict=True):
        name = f"annotation {entry['id']} of {file}"
        x, y, width, height = entry["bbox"]
        if min(width, height) > 0 and (x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0):
            samples.found("boxes outside the image", name)
            continue
        if side < _LEAST_SIDE:
            samples.found("boxes without area", name)
            continue
        if entry.get("iscrowd") not in (0, 1, None):
            samples.found("annotations whose iscrowd is neither 0 nor 1", name)
            continue
        reach = max(-x, -y, x + width - size[0], y + height - size[1])
        if reach > _TOLERANCE:
            samples.found("boxes reaching out of the image, cut at its border", name)
        reason = _segmentation_error(entry.get("segmentation"), size[1], size[0]) if masks else ""
        if reason:
            samples.found("objects without a usable segmentation", f"{name} ({reason})")
            continue
        kept.append(entry)
    return kept


def find_coco_splits(folder: Path, titles: Sequence[str] = ("train", "val", "test")) -> dict[str, tuple[Path, Path]]:
    """JSON file and image folder of each split in one of the usual layouts.

    Args:
        folder: of the data set.
        titles: the splits to look for.

    Raises:
        ValueError: when there is no such folder, or a JSON file without a folder of images.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; --data takes {_WANTED}")
    found = {}
    for title in titles:
        names = _NAMES.get(title, ())
        file = next(filter(None, (_json_of(folder, name) for name in names)), None)
        if file is None:
            continue
        images = next(filter(None, (_images_of(folder, name, file) for name in names)), None)
        if images is None:
            raise ValueError(
                f"{file} has no folder of images beside it: {folder / title} or {folder / 'images' / title}"
            )
        found[title] = (file, images)
    return found


_NAMES = {"train": TRAIN_NAMES, "val": VAL_NAMES, "test": TEST_NAMES}
_WANTED = "digits-detection, or a folder with annotations/instances_train.json and _val.json beside train/ and val/"


def _json_of(folder: Path, name: str) -> Path | None:
    inside = [file for part in subfolders(folder) if name in _words(part) for file in sorted(part.glob("[!.]*.json"))]
    files = [*sorted((folder / "annotations").glob("[!.]*.json")), *sorted(folder.glob("[!.]*.json"))]
    # COCO's own image_info_test2017.json and _test-dev2017.json list images and have no annotations.
    named = [file for file in files if name in _words(file) and not file.stem.startswith("image_info")]
    instances = [file for file in named if file.stem.startswith("instances")]
    return next(iter([*instances, *named, *inside]), None)


def _words(path: Path) -> list[str]:
    """``instances_train2017`` is about train."""
    return [word.rstrip("0123456789") for word in path.stem.lower().replace("-", "_").split("_")]


def _images_of(folder: Path, name: str, file: Path) -> Path | None:
    """The folder in which the first images of the file are; where none are there, one that has images at all."""
    if file.parent not in (folder, folder / "annotations"):
        places = [file.parent, file.parent / "images", file.parent / "data"]
    else:
        wanted = [f"{name}{year}" for year in (file.stem.lower().rpartition(name)[2], "")]
        parts = [part for parent in (folder, folder / "images") if parent.is_dir() for part in subfolders(parent)]
        places = [part for title in wanted for part in parts if part.name.lower() == title]
        places += [folder / "images", folder]
    places, names = [place for place in places if place.is_dir()], _first_names(file)
    found = [place for place in places if any((place / image).is_file() for image in names)]
    return next(iter([*found, *(place for place in places if _holds_images(place))]), None)


def _first_names(file: Path) -> list[str]:
    """Some file names of images, without reading all of a large file."""
    with file.open("rb") as opened:
        start = opened.read(_BEGINNING).decode("utf-8", "replace")
    found = itertools.islice(re.finditer(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', start), 20)
    return [name for name in (_unquoted(match[1]) for match in found) if name]


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text)).replace("\0", "").replace("\\", "/")
    except ValueError:
        return ""


def _holds_images(folder: Path) -> bool:
    return any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in folder.iterdir())


def open_coco(config: DataConfig, *, masks: bool, progress: Callable[[str], Progress]) -> DetectionSplits:
    """Open and check all splits of a folder.

    Args:
        config: its ``source``, ``on_bad_image`` and ``check``.
        masks: whether segmentations are used.
        progress: for the title of a split, what wraps its check.

    Raises:
        ValueError: when a split is lacking, damaged, or does not fit the others.
    """
    require("faster_coco_eval", "detection")
    found = find_coco_splits(Path(config.source))
    for title in ("train", "val"):
        if title not in found:
            raise ValueError(f"{config.source} has no COCO JSON for {title}; --data takes {_WANTED}")
    splits: dict[str, CocoSamples] = {}
    reports, notes = [], []
    for title, (file, folder) in found.items():
        if title == "test" and not _has_annotations(file):
            notes.append(f"{file} lists test images without annotations, and is left out")
            continue
        names = splits["train"].class_names if splits else None
        splits[title] = CocoSamples(file, folder, names)
        if masks and not splits[title].has_masks:
            raise ValueError(
                f"{file} has boxes but no segmentations; train --detector.architecture=faster_rcnn or retinanet"
            )
        report = check_coco(splits[title], title, config, masks=masks, progress=progress(title))
        if not sum(report.per_class.values()):
            crowds = f", only {report.crowds} crowd regions (iscrowd is 1)" if report.crowds else ""
            raise ValueError(f"{file} has no object to {'learn from' if title == 'train' else 'find'}{crowds}")
        reports.append(report)
    return DetectionSplits(
        name=config.source,
        train=splits["train"],
        val=splits["val"],
        test=splits.get("test"),
        reports=reports,
        notes=tuple(notes),
    )


def _has_annotations(file: Path) -> bool:
    """Of damaged files too, which are refused when they are read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(content, dict) or "annotations" in content


def open_coco_split(
    config: DataConfig, split: str | None, class_names: list[str], *, masks: bool, progress: Callable[[str], Progress]
) -> tuple[CocoSamples, SplitReport, bool]:
    """Open and check one split for evaluation, its labels matched by name to the classes of a detector.

    Args:
        config: its ``source``, ``on_bad_image`` and ``check``.
        split: train, val or test; test if there is one, else val, when left out.
        class_names: of the detector.
        masks: whether segmentations are wanted.
        progress: for the title of a split, what wraps its check.

    Returns:
        The split, what the check found, and whether there are segmentations to use.

    Raises:
        ValueError: when there is no such split, or it has classes that the detector does not know.
    """
    require("faster_coco_eval", "detection")
    folder, titles = Path(config.source), [split] if split else ["test", "val"]
    found = next(filter(None, (find_coco_splits(folder, [title]) for title in titles)), None)
    if found is None:
        there = [title for title, names in _NAMES.items() if any(_json_of(folder, name) for name in names)]
        raise ValueError(f"{folder} has no COCO JSON for {titles[-1]}, only {', '.join(there) or 'none at all'}")
    ((title, (file, images)),) = found.items()
    samples = CocoSamples(file, images, class_names)
    masks = masks and samples.has_masks
    return samples, check_coco(samples, title, config, masks=masks, progress=progress(title)), masks
