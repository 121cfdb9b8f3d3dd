"""Handwritten digits on cluttered canvases, to detect: made on the fly from (seed, index), never twice the same.

The digits are the real ones of scikit-learn (UCI); sizes, positions, angles, colours and clutter are drawn. Digits that
validation and test show never appear in training.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.ops import masks_to_boxes

from epsanet.data.config import DataConfig
from epsanet.data.detection import DetectionSamples, DetectionSplits, Objects
from epsanet.data.samples import Samples
from epsanet.data.sources import open_data

__all__ = ["DIGITS_DETECTION", "DigitsScenes", "open_digits_scenes"]

DIGITS_DETECTION = "digits-detection"
SIZE = 128
"""Height and width of a canvas in pixels."""
_IMAGES = {"train": 1200, "val": 120, "test": 400}
_SIDES = (18, 60)
"""Smallest and largest side of a digit, before it is turned."""
_VISIBLE = 0.7
"""A digit keeps at least this share of its pixels when others are laid over it; of half a digit nobody can tell which
it was."""
_CONTRAST = 60
"""Least mean difference of a digit's colour from what is behind it."""
_INK = 128
"""Enlarged pixels from this value on belong to the mask."""


@dataclass(kw_only=True)
class _Layer:
    """A digit on a canvas: what later ones left of it, and how many pixels it had."""

    label: int
    mask: np.ndarray
    whole: int


class DigitsScenes(DetectionSamples):
    """Canvases of 128×128 pixels with up to eight digits, some of them overlapping.

    Args:
        digits: the digits to draw from.
        split: val and test are the same canvases in every epoch, train has new ones.
    """

    has_masks = True

    def __init__(self, digits: Samples, split: Literal["train", "val", "test"]) -> None:
        self.digits, self.split, self.class_names = digits, split, digits.class_names
        self._split_key = list(_IMAGES).index(split)

    def __len__(self) -> int:
        return _IMAGES[self.split]

    def name(self, position: int) -> str:
        return f"{DIGITS_DETECTION}:{self.split}[{position}]"

    def read(self, position: int, epoch: int = 0, *, masks: bool = True) -> tuple[Image.Image, Objects]:
        random = np.random.default_rng([self._split_key, epoch if self.split == "train" else 0, position])
        canvas = _clutter(random)
        layers: list[_Layer] = []
        for _ in range(random.integers(3, 9)):
            self._add_digit(random, canvas, layers)
        noise = random.standard_normal(canvas.shape, np.float32) * np.float32(random.uniform(0, 12))
        pixels = np.clip(canvas + noise, 0, 255).astype(np.uint8)
        visible = torch.from_numpy(np.stack([layer.mask for layer in layers]))
        return Image.fromarray(pixels), Objects(
            boxes=masks_to_boxes(visible) + torch.tensor([0.0, 0, 1, 1]),  # its corners are inclusive
            labels=torch.tensor([layer.label for layer in layers]),
            iscrowd=torch.zeros(len(layers), dtype=torch.int64),
            area=visible.flatten(1).sum(dim=1).float(),
            masks=visible.to(torch.uint8) if masks else None,
        )

    def _add_digit(self, random: np.random.Generator, canvas: np.ndarray, layers: list[_Layer]) -> None:
        """Lay one digit over the canvas, unless it would hide too much of those that lie there."""
        chosen = int(random.integers(len(self.digits)))
        strength = self._drawn(random, chosen)
        height, width = strength.shape
        y, x = random.integers(0, SIZE - height + 1), random.integers(0, SIZE - width + 1)
        place = np.s_[y : y + height, x : x + width]
        ink = np.zeros((SIZE, SIZE), dtype=bool)
        ink[place] = strength >= _INK
        if any((layer.mask & ~ink).sum() < _VISIBLE * layer.whole for layer in layers):
            return
        for layer in layers:
            layer.mask &= ~ink
        layers.append(_Layer(label=int(self.digits.labels[chosen]), mask=ink, whole=int(ink.sum())))
        behind, colour = canvas[place].mean(axis=(0, 1)), random.uniform(0, 255, 3)
        while np.abs(colour - behind).mean() < _CONTRAST:
            colour = random.uniform(0, 255, 3)
        alpha = (strength / 255)[..., None]
        canvas[place] += alpha * (colour.astype(np.float32) - canvas[place])

    def _drawn(self, random: np.random.Generator, chosen: int) -> np.ndarray:
        """A digit at a random size and angle: how strongly each pixel is inked, 0 to 255."""
        side = int(np.exp(random.uniform(*np.log(_SIDES))))
        opened: Any = self.digits.open(chosen)
        picture = opened.convert("L").resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(picture.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True), np.float32)


class SceneReport:
    """What a split of canvases is made from; there is nothing to check."""

    def __init__(self, samples: DigitsScenes) -> None:
        self.title, self._samples = samples.split, samples

    def __str__(self) -> str:
        made = "made anew each epoch" if self.title == "train" else "the same each time"
        return (
            f"{len(self._samples):,} canvases of {SIZE}×{SIZE} pixels with {len(self._samples.digits):,} digits, {made}"
        )


def _clutter(random: np.random.Generator) -> np.ndarray:
    """A canvas that fades from one colour to another, with faint lines, ellipses and rectangles; float32."""
    colours, across = random.uniform(0, 255, (2, 3)).astype(np.float32), random.uniform(-1, 1, 2).astype(np.float32)
    ramp = np.add.outer(*(np.linspace(0, end, SIZE, dtype=np.float32) for end in across))
    ramp = (ramp - ramp.min()) / max(np.ptp(ramp), 1e-6)
    picture = Image.fromarray((colours[0] + ramp[..., None] * (colours[1] - colours[0])).astype(np.uint8))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(random.integers(4, 14)):
        (x0, x1), (y0, y1) = np.sort(random.integers(0, SIZE, (2, 2)), axis=1).tolist()
        colour = (*random.integers(0, 256, 3).tolist(), int(random.integers(40, 140)))
        kind = random.integers(3)
        if kind == 0:
            draw.line((x0, y0, x1, y1), fill=colour, width=int(random.integers(1, 5)))
        elif kind == 1:
            draw.ellipse((x0, y0, x1, y1), outline=colour, width=int(random.integers(1, 4)))
        else:
            draw.rectangle((x0, y0, x1, y1), outline=colour, width=int(random.integers(1, 4)))
    return np.asarray(picture, np.float32).copy()


def open_digits_scenes(config: DataConfig) -> DetectionSplits:
    """The three splits, over the splits of the data set ``digits``.

    Args:
        config: its ``val_fraction``.
    """
    digits = open_data(dataclasses.replace(config, source="digits"))
    assert isinstance(digits.train, Samples)
    assert isinstance(digits.val, Samples)
    assert isinstance(digits.test, Samples)
    train = DigitsScenes(digits.train, "train")
    val, test = DigitsScenes(digits.val, "val"), DigitsScenes(digits.test, "test")
    return DetectionSplits(
        name=DIGITS_DETECTION,
        train=train,
        val=val,
        test=test,
        reports=[SceneReport(samples) for samples in (train, val, test)],
    )
