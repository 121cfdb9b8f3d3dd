"""One way to open an image, for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

__all__ = ["IMAGE_SUFFIXES", "ImageError", "image_files", "image_size", "printable", "read_image"]

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
)
MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs; Pillow's own limit for an error."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    MemoryError,
)


class ImageError(ValueError):
    """A file that is no readable image; the message says why, without the file's name."""


def read_image(source: Path | BinaryIO | Image.Image) -> Image.Image:
    """Open and decode an image, upright and in RGB.

    The first frame of an animation is taken, EXIF orientation is applied, transparency is laid over white, and 16-bit
    grey is scaled to 8 bits.

    Args:
        source: a path, an open binary file, or a Pillow image.

    Raises:
        ImageError: when it cannot be read, decoded, or has too many pixels.
    """
    with _opened(source) as image:
        image.load()
    with contextlib.suppress(*_DECODE_ERRORS):  # damaged EXIF leaves the picture as it is
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def image_size(source: Path | BinaryIO | Image.Image) -> tuple[int, int]:
    """Width and height in pixels of the upright image, as its header tells; it is not decoded.

    Args:
        source: a path, an open binary file, or a Pillow image.

    Raises:
        ImageError: when it is no image, or has too many pixels.
    """
    with _opened(source) as image:
        orientation = None
        with contextlib.suppress(*_DECODE_ERRORS):
            # The method of all images: PNG's own decodes the file to look for EXIF behind the pixels.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size Pillow tells upright
        return image.size[::-1] if turned else image.size


@contextlib.contextmanager
def _opened(source: Path | BinaryIO | Image.Image) -> Iterator[Image.Image]:
    """What goes wrong in the block is an ``ImageError`` too; the file is closed, also a damaged one."""
    if isinstance(source, Path):
        _require_file(source)
    try:
        opened = contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}×{image.height} pixels are more than the limit of {MAX_PIXELS:,}")
            yield image
    except PermissionError as error:
        raise ImageError("not readable with the rights of this user") from error
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image that can be identified") from error
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ImageError(f"damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def image_files(folder: str | Path) -> list[str]:
    """Paths with the suffix of an image, in a folder and those below it; links are followed, but not in a circle.

    What is not a file has its place here too, so that it is named when it cannot be read.
    """
    found: list[tuple[str, str]] = []

    def walk(place: str, above: frozenset[str]) -> None:
        real = os.path.realpath(place)
        if real in above:
            return
        with os.scandir(place) as entries:
            for entry in entries:
                if _is_folder(entry):
                    walk(entry.path, above | {real})
                elif PurePath(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.append((place, entry.path))

    parent = Path(os.path.abspath(folder)).parent  # noqa: PTH100 - Path(".").parent is ".", and that of ".." too
    walk(str(folder), frozenset({os.path.realpath(parent)}) - {os.path.realpath(folder)})
    return [path for _, path in sorted(found)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def printable(name: str) -> str:
    """A file name that can be printed and written: bytes that are no UTF-8 appear as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _require_file(path: Path) -> None:
    """A pipe would be waited for without end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise ImageError("a link that leads nowhere" if path.is_symlink() else "no such file") from error
    except PermissionError as error:
        raise ImageError("not readable with the rights of this user") from error
    except OSError as error:
        raise ImageError(f"cannot be opened: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ImageError("a folder, not a file")
    if not stat.S_ISREG(mode):
        raise ImageError("a pipe, socket or device, not a file")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        step = 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1
        return Image.fromarray(np.clip(values / step, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(below, above).convert("RGB")
    return image.convert("RGB")
