"""Real images to check and calibrate an exported network with, through the network's own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epsanet.data.config import DataConfig
from epsanet.data.images import IMAGE_SUFFIXES, ImageError, image_files, read_image
from epsanet.data.loaders import evaluation_transform
from epsanet.data.samples import DigitsSamples, Samples
from epsanet.data.sources import open_split
from epsanet.data.streams import Stream

__all__ = ["CALIBRATION_IMAGES", "RealImages", "included_images", "open_images", "photographs"]

MOST_IMAGES = 500
"""Of a data set, to check with; they are kept in memory."""
CALIBRATION_IMAGES = 300
"""Of a data set; NNCF's own default."""


class RealImages:
    """Some images of a data set, evenly spread over it, as a network takes them.

    Args:
        samples: the data set; its labels may be absent (-1).
        data_config: preprocessing as timm resolves it.
        most: images at most; unreadable ones are left out.
    """

    def __init__(self, samples: Samples, data_config: dict[str, Any], most: int = MOST_IMAGES) -> None:
        transform = evaluation_transform(data_config)
        images, labels = [], []
        for position in np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int).tolist():
            try:
                images.append(transform(read_image(samples.open(position))))
            except ImageError:
                continue
            labels.append(int(samples.labels[position]))
        if not images:
            raise ValueError(f"none of the {len(samples)} images can be read, first {samples.name(0)}")
        self.images = torch.stack(images)
        """Shape ``N, 3, H, W``."""
        self.labels = torch.tensor(labels)
        """Shape ``N``; -1 where unknown."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[Tensor]:
        """The images, so many at a time."""
        yield from self.images.split(size)


class _Unlabelled(Samples):
    """Image files, or images already open, that nobody has labelled."""

    def __init__(self, images: list[Any]) -> None:
        self._images, self.class_names = images, []
        self.labels = np.full(len(images), -1)

    def open(self, position: int) -> Any:
        return self._images[position]

    def name(self, position: int) -> str:
        return str(self._images[position])


def included_images(data_config: dict[str, Any]) -> RealImages:
    """The images that need no download: scikit-learn's two photographs, their quarters, and some of its digits."""
    digits = DigitsSamples()
    pictures = [*photographs(), *(digits.open(position) for position in range(22))]
    return RealImages(_Unlabelled(pictures), data_config)


def photographs() -> list[Image.Image]:
    """scikit-learn's two photographs, and their quarters."""
    from sklearn.datasets import load_sample_images

    pictures: list[Image.Image] = []
    for photograph in map(Image.fromarray, load_sample_images().images):
        width, height = photograph.width // 2, photograph.height // 2
        corners = [(left, top) for left in (0, width) for top in (0, height)]
        pictures += [photograph, *(photograph.crop((x, y, x + width, y + height)) for x, y in corners)]
    return pictures


def open_images(
    source: str,
    data_config: dict[str, Any],
    class_names: list[str],
    split: str | None,
    most: int = MOST_IMAGES,
    *,
    labelled: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> RealImages:
    """Images of a folder or data set; those of a folder whose classes are not the network's have no labels.

    Args:
        source: what ``--data`` takes, or a folder of images without classes, searched to any depth.
        data_config: preprocessing.
        class_names: of the network.
        split: of the data set; test, else val, else the only one, when left out. A data set without it gives all.
        most: images at most.
        labelled: whether other classes are an error.
        note: told why there are no labels.

    Raises:
        ValueError: when there are no such images, or their classes are not the network's and labels are needed.
    """
    folder, files = Path(source), list[Path]()
    if folder.is_dir() and not any(folder.glob("*.parquet")):
        files = sorted(file for file in map(Path, image_files(folder)) if file.is_file())
        if not files:
            raise ValueError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        if all(file.parent == folder for file in files):
            return RealImages(_Unlabelled(files), data_config, most)
    samples: Samples
    try:
        samples = _open_split(source, split, class_names)
    except ValueError as error:
        if labelled or not files:
            raise
        note(f"{error}; the images of {source} are taken without labels")
        samples = _Unlabelled(files)
    return RealImages(samples, data_config, most)


def _open_split(source: str, split: str | None, class_names: list[str]) -> Samples:
    try:
        samples, _, _ = open_split(DataConfig(source=source), split, class_names)
    except ValueError as error:
        if split is None or "has no split" not in str(error):
            raise
        samples, _, _ = open_split(DataConfig(source=source), None, class_names)
    if isinstance(samples, Stream):
        raise ValueError(f"{source} can only be read from front to back; give a folder of some of its images")
    return samples
