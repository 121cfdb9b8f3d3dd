"""Images with labels, whatever keeps them: an array, a folder, torchvision, Hugging Face, WebDataset shards.

Reading is those libraries'; here is what makes them look alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from epsanet.data.config import DataConfig
from epsanet.data.images import IMAGE_SUFFIXES, read_image

__all__ = [
    "DigitsSamples",
    "FolderSamples",
    "HuggingFaceSamples",
    "Samples",
    "Stream",
    "Subset",
    "TorchvisionSamples",
    "match_classes",
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


class FolderSamples(Samples):
    """torchvision's ImageFolder: a folder a class."""

    def __init__(self, folder: Path) -> None:
        try:
            dataset = ImageFolder(
                str(folder), allow_empty=True, is_valid_file=lambda name: Path(name).suffix.lower() in IMAGE_SUFFIXES
            )
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no class folders; put the images of each class in a folder") from error
        if not dataset.samples:
            raise ValueError(f"{folder} has class folders but no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._paths = [path for path, _ in dataset.samples]
        self.labels = np.array([label for _, label in dataset.samples], dtype=np.int64)
        self.class_names = dataset.classes

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
        self._images = dataset.select_columns([config.image_key]).cast_column(
            config.image_key, datasets.Image(decode=False)
        )
        values = dataset[config.label_key][:]
        if any(value is None for value in values):
            raise ValueError(f"{name} has images without a label in column {config.label_key!r}; remove them")
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
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(
                f"{name} has labels from {self.labels.min()} to {self.labels.max()} for {len(self.class_names)} classes"
                "; a label is the place of its name, from 0 on"
            )

    def open(self, position: int) -> Path | BinaryIO:
        import io

        image = self._images[position][self._key]
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])

    def name(self, position: int) -> str:
        return f"{self._name}[{position}]"


class _ReadThen:
    """``read_image`` before a transform; a class, because loader processes may have to pickle it."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(read_image(image))


@dataclass(kw_only=True)
class Stream:
    """A split that can only be read from front to back: WebDataset shards through timm's reader."""

    folder: str
    """Where the shards are."""
    split: str
    """timm's split: a name in ``info.json``, or a pattern of shards with the number of samples."""
    class_names: list[str]
    """In the order of the labels."""

    def dataset(self, *, is_training: bool, batch_size: int, seed: int, transform: Any) -> Any:
        """timm's iterable data set; shuffled when training."""
        from timm.data import create_dataset

        dataset = create_dataset(
            "wds/" + self.folder,
            root=self.folder,
            split=self.split,
            is_training=is_training,
            batch_size=batch_size,
            seed=seed,
            input_img_mode="",  # left to read_image, as for every other data set
        )
        dataset.transform = None if transform is None else _ReadThen(transform)
        return dataset

    def __len__(self) -> int:
        return int(self.dataset(is_training=False, batch_size=1, seed=0, transform=None).reader.num_samples)


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
