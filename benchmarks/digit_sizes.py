"""Handwritten digits drawn at five sizes on a canvas of 32×32, as folders: do blocks choose scales by object size?

The digits are scikit-learn's (8×8, UCI). ``classes/`` has train, val and test folders by digit, to train on: each
training image at two sizes, the others at all. ``sizes/`` has the test images by the size they are drawn at.

Usage: python benchmarks/digit_sizes.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from epsanet.data.config import DataConfig
from epsanet.data.samples import Samples
from epsanet.data.sources import open_data

CANVAS = 32
SIZES = (8, 12, 16, 24, 32)


def drawn(digit: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """The digit at a size, somewhere on the canvas."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    left, top = (int(place) for place in random.integers(0, CANVAS - size + 1, 2))
    canvas.paste(digit.resize((size, size), Image.Resampling.BICUBIC), (left, top))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    splits = open_data(DataConfig(source="digits"))
    random = np.random.default_rng(0)
    written = 0
    for title, samples in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        assert isinstance(samples, Samples)
        for position, label in enumerate(samples.labels.tolist()):
            digit = samples.open(position)
            assert isinstance(digit, Image.Image)
            sizes = random.choice(SIZES, 2, replace=False).tolist() if title == "train" else SIZES
            for size in sizes:
                picture = drawn(digit, size, random)
                places = [folder / "classes" / title / samples.class_names[label]]
                if title == "test":
                    places.append(folder / "sizes" / f"{size:02d} px")
                for place in places:
                    place.mkdir(parents=True, exist_ok=True)
                    picture.save(place / f"{position:04d}-{size:02d}.png")
                    written += 1
    print(f"{written:,} images in {folder}")


if __name__ == "__main__":
    main()
