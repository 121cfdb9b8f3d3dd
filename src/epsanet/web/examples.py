"""Pictures to try, from what is installed anyway: scikit-learn's digits and two photographs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from epsanet.data.samples import DigitsSamples
from epsanet.web.models import ServedDetector, ServedModel

__all__ = ["write_examples"]

_DIGITS = (3, 7, 2, 5, 8)
"""Positions in scikit-learn's digits."""
_SCENES = 3


def write_examples(folder: Path, models: Iterable[ServedModel]) -> list[Path]:
    """Write pictures that suit the models: digits for networks that know them, photographs for others.

    Args:
        folder: to write to.
        models: behind the page.

    Returns:
        The files.
    """
    pictures: dict[str, Image.Image] = {}
    digits = DigitsSamples()
    for model in models:
        if model.class_names != digits.class_names:
            pictures |= _photographs()
        elif isinstance(model, ServedDetector):
            pictures |= _scenes(digits)
        else:
            pictures |= {f"digit-{digits.labels[place]}": digits.open(place).convert("RGB") for place in _DIGITS}
    folder.mkdir(parents=True)
    files = []
    for name, picture in pictures.items():
        files.append(folder / f"{name}.png")
        picture.save(files[-1])
    return files


def _scenes(digits: DigitsSamples) -> dict[str, Image.Image]:
    from epsanet.data.digits_scenes import DigitsScenes

    scenes = DigitsScenes(digits, "test")
    return {f"digits-{place}": scenes.read(place)[0] for place in range(_SCENES)}


def _photographs() -> dict[str, Image.Image]:
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return {Path(name).stem: Image.fromarray(image) for name, image in zip(found.filenames, found.images, strict=True)}
