"""Images with labels, whatever keeps them: an array, a folder, torchvision, Hugging Face, WebDataset shards.

Reading is those libraries'; here is what makes them look alike.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from epsanet.data.config import DataConfig
from epsanet.data.images import IMAGE_SUFFIXES, ImageError, image_files, printable

__all__ = [
    "DigitsSamples",
    "FolderSamples",
    "HuggingFaceSamples",
    "Samples",
    "ShardSamples",
    "Subset",
    "TorchvisionSamples",
    "match_classes",
    "subfolders",
]


class Samples(ABC):
    """Images with labels, by position."""

    class_names: list[str]
    """In the order of the labels."""
    labels: np.ndarray
    """One index into ``class_names`` an image, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, position: int) -> Path | BinaryIO | Image.Image:
        """What ``read_image`` takes."""

    @abstractmethod
    def name(self, position: int) -> str:
        """A file name or the like, for messages and tables."""


class Subset(Samples):
    """Some positions of other samples, possibly under other class names."""

    def __init__(
        self,
        base: Samples,
        positions: Sequence[int] | np.ndarray,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.base, self.positions = base, np.asarray(positions, dtype=np.int64)
        self.labels = base.labels[self.positions] if labels is None else labels
        self.class_names = base.class_names if class_names is None else class_names

    def open(self, position: int) -> Path | BinaryIO | Image.Image:
        return self.base.open(int(self.positions[position]))

    def name(self, position: int) -> str:
        return self.base.name(int(self.positions[position]))


class DigitsSamples(Samples):
    """The 1,797 handwritten digits of scikit-learn (8×8, UCI), enlarged to 32×32."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        self.labels = digits.target.astype(np.int64)
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)

    def open(self, position: int) -> Image.Image:
        return Image.fromarray(self._images[position]).resize((32, 32), Image.Resampling.BICUBIC)

    def name(self, position: int) -> str:
        return f"digits[{position}]"


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones (``.git``, ``.cache``, ``.ipynb_checkpoints``)."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


class FolderSamples(Samples):
    """A folder a class, in the order of torchvision's ImageFolder; but a link to a folder above it is not entered, and
    a hidden folder is no class.

    Raises:
        ValueError: when there are no class folders, no images in them, or a class has a name that cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.class_names = [entry.name for entry in subfolders(folder)]
        if not self.class_names:
            raise ValueError(f"{folder} has no class folders; put the images of each class in a folder")
        strange = next((name for name in self.class_names if printable(name) != name), None)
        if strange is not None:
            raise ValueError(f"{folder} has a class folder whose name is not UTF-8, {printable(strange)}; rename it")
        files = [image_files(folder / name) for name in self.class_names]
        self._paths = list(itertools.chain.from_iterable(files))
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), list(map(len, files)))
        if not self._paths:
            raise ValueError(f"{folder} has class folders but no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def open(self, position: int) -> Path:
        return Path(self._paths[position])

    def name(self, position: int) -> str:
        return self._paths[position]


class TorchvisionSamples(Samples):
    """A data set of ``torchvision.datasets`` that timm knows as ``torch/NAME``."""

    def __init__(self, name: str, dataset: Any, class_names: list[str] | None) -> None:
        self._name, self._dataset = name, dataset
        labels = next(
            (getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None
        )
        if labels is None:
            labels = [dataset[position][1] for position in range(len(dataset))]
        self.labels = np.asarray(labels, dtype=np.int64)
        names = class_names or getattr(dataset, "classes", None) or range(int(self.labels.max()) + 1)
        self.class_names = [str(name) for name in names]

    def open(self, position: int) -> Image.Image:
        image: Image.Image = self._dataset[position][0]
        return image

    def name(self, position: int) -> str:
        return f"{self._name}[{position}]"


class HuggingFaceSamples(Samples):
    """A split in the layout of Hugging Face ``datasets``: an image column and a label column."""

    def __init__(self, name: str, dataset: Any, config: DataConfig, class_names: list[str] | None) -> None:
        import datasets

        for key in (config.image_key, config.label_key):
            if key not in dataset.column_names:
                raise ValueError(
                    f"{name} has no column {key!r} but {', '.join(dataset.column_names)}; "
                    "name them with --data.image_key and --data.label_key"
                )
        self._name, self._key = name, config.image_key
        try:
            self._images = dataset.select_columns([config.image_key]).cast_column(
                config.image_key, datasets.Image(decode=False)
            )
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} has no images in column {config.image_key!r} but {dataset.features[config.image_key]}; "
                "name another with --data.image_key"
            ) from error
        values = dataset[config.label_key][:]
        if any(value is None for value in values):
            raise ValueError(f"{name} has images without a label in column {config.label_key!r}; remove them")
        if not all(isinstance(value, int | float | str) for value in values):
            raise ValueError(
                f"{name} has more than one number or name for an image in column {config.label_key!r}; name another "
                "with --data.label_key"
            )
        named: list[Any] | None = getattr(dataset.features[config.label_key], "names", None)
        if named is None and (class_names is None or any(isinstance(value, str) for value in values)):
            named = sorted(set(values))
            places = {value: place for place, value in enumerate(named)}
            values = [places[value] for value in values]
            if class_names is not None:  # the column has names, the file says their order
                order, _ = match_classes([str(value) for value in named], class_names)
                values, named = [order[value] for value in values], class_names
        self.class_names = [str(value) for value in (class_names or named or ())]
        self.labels = np.asarray(values, dtype=np.int64)
        _check_labels(name, self.labels, self.class_names)

    def open(self, position: int) -> Path | BinaryIO:
        image = self._images[position][self._key] or {"bytes": None, "path": None}
        if image["bytes"] is None and image["path"] is None:
            raise ImageError("no image in its row")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])

    def name(self, position: int) -> str:
        return f"{self._name}[{position}]"


def _check_labels(name: str, labels: np.ndarray, class_names: Sequence[str]) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"{name} has labels from {labels.min()} to {labels.max()} for {len(class_names)} classes"
            "; a label is the place of its name, from 0 on"
        )


class ShardSamples(Samples):
    """WebDataset shards on disk: tar files in which the parts of a sample share their name up to the first dot.

    The shards are looked through once, for the place of each image in them. So they are read like any other files: in
    any order, by any number of processes, and each image by its name. A label is in ``.cls``, a number or a class's
    name, or in ``.json`` under the label key.

    Args:
        name: of the split, for messages.
        paths: of its shards.
        class_names: in the order of the labels; the sorted names in the shards when left out.
        label_key: of labels in ``.json``.

    Raises:
        ValueError: for a shard that is no whole tar file, a sample without an image or label, or labels without names.
    """

    def __init__(self, name: str, paths: Sequence[Path], class_names: list[str] | None, label_key: str) -> None:
        self._shards = list(paths)
        self._names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int | str] = []
        for number, path in enumerate(self._shards):
            for image, label in _tar_samples(path, label_key):
                self._names.append(image.name)
                places.append((number, image.offset_data, image.size))
                labels.append(label)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)
        if class_names is None:
            if not labels or any(isinstance(label, int) for label in labels):
                raise ValueError(f"{name} names no classes; list them, one a line, in a file: --data.class_names FILE")
            class_names = sorted({str(label) for label in labels})
        known = {class_name: place for place, class_name in enumerate(class_names)}
        strange = next((label for label in labels if isinstance(label, str) and label not in known), None)
        if strange is not None:
            raise ValueError(f"{name} has the class {strange!r}, which is none of its {len(class_names)} class names")
        self.class_names = class_names
        self.labels = np.array([known[label] if isinstance(label, str) else label for label in labels], dtype=np.int64)
        _check_labels(name, self.labels, class_names)

    def open(self, position: int) -> BinaryIO:
        shard, offset, size = self._places[position].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))

    def name(self, position: int) -> str:
        return f"{self._shards[self._places[position, 0]]}/{self._names[position]}"


def _tar_samples(path: Path, label_key: str) -> Iterator[tuple[tarfile.TarInfo, int | str]]:
    """The image's place and the label of each sample of a shard."""
    try:
        with tarfile.open(path, "r:") as tar:
            named = ((_sample_key(member.name), member) for member in tar if member.isfile())
            for key, members in itertools.groupby(named, key=lambda pair: pair[0]):
                parts = {member.name[len(key) :].lower(): member for _, member in members}
                image = next((parts[suffix] for suffix in parts if suffix in IMAGE_SUFFIXES), None)
                text: dict[str, str] = {
                    suffix: _text(tar, parts[suffix]) for suffix in (".cls", ".json") if suffix in parts
                }
                label = _label(text, label_key)
                if image is None or label is None:
                    lacking = "image" if image is None else f"label (.cls, or {label_key!r} in .json)"
                    raise ValueError(f"its sample {key} has no {lacking}")
                yield image, int(label) if str(label).lstrip("-").isdigit() else str(label)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a shard: {error}") from error


def _sample_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _label(text: dict[str, str], key: str) -> Any:
    """What .cls says, or .json under the key; nothing where neither does."""
    if ".cls" in text:
        return text[".cls"].strip()
    described = json.loads(text.get(".json", "{}"))
    return described.get(key) if isinstance(described, dict) else None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None  # it is a file
    return file.read().decode("utf-8")


def match_classes(found: Sequence[str], wanted: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where each found class stands among the wanted ones, by name.

    Returns:
        An index into ``wanted`` for each of ``found``, and the wanted classes that were not found.

    Raises:
        ValueError: when a found class is not wanted.
    """
    places = {name: place for place, name in enumerate(wanted)}
    unknown = [name for name in found if name not in places]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise ValueError(
            f"{len(unknown)} of {len(found)} classes are unknown: {shown}; known are "
            f"{', '.join(repr(name) for name in wanted[:5])}{', …' if len(wanted) > 5 else ''}; rename or remove them"
        )
    return [places[name] for name in found], [name for name in wanted if name not in set(found)]
