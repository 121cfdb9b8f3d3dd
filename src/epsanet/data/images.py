"""One way to open an image, for training, evaluation and prediction alike."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["IMAGE_SUFFIXES", "ImageError", "read_image"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
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
    try:
        # A file is closed here, also one that is damaged or has more frames to read.
        opened = contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(source)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}×{image.height} pixels are more than the limit of {MAX_PIXELS:,}")
            image.load()
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except PermissionError as error:
        raise ImageError("not readable with the rights of this user") from error
    except IsADirectoryError as error:
        raise ImageError("a folder, not a file") from error
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image that can be identified") from error
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise ImageError(f"damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    with contextlib.suppress(*_DECODE_ERRORS):  # damaged EXIF leaves the picture as it is
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        step = 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1
        return Image.fromarray(np.clip(values / step, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, "white")
        return Image.alpha_composite(below, above).convert("RGB")
    return image.convert("RGB")
