"""Bad and unusual files, each with what must become of it: pixels, or a reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

RANDOM = np.random.default_rng(1)
PICTURE = np.kron(RANDOM.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))
"""24×32 pixels of flat blocks, so that JPEG keeps them; not square, and no symmetry."""
GREY = PICTURE[..., 0]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One file of the table in docs/images.md."""

    title: str
    """As in the table."""
    name: str
    """File name, with the suffix of an image."""
    make: Callable[[Path], object]
    """Writes it."""
    pixels: np.ndarray | None = None
    """What is read; nothing where it is skipped."""
    tolerance: int = 0
    """Largest difference of a value, for lossy formats."""


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def image(picture: np.ndarray | Image.Image, kind: str, **options: object) -> Callable[[Path], object]:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return content(saved(picture, kind, **options))


def png(width: int, height: int, rows: bytes, *, kind: bytes = b"\x08\x02") -> bytes:
    """A PNG that declares this size, whatever the rows hold."""
    chunks = [
        b"IHDR" + struct.pack(">II", width, height) + kind + b"\0\0\0",
        b"IDAT" + zlib.compress(rows),
        b"IEND",
    ]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def oriented(orientation: int) -> Callable[[Path], object]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image(PICTURE, "PNG", exif=exif)


def rgba() -> np.ndarray:
    return np.dstack([PICTURE, np.where(GREY > 127, 255, 0).astype(np.uint8)])


def frames() -> list[Image.Image]:
    return [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]


WHOLE = saved(Image.fromarray(PICTURE), "JPEG", quality=95, subsampling=0)
PHOTO = saved(Image.effect_noise((200, 150), 90), "JPEG")
OVER_WHITE = np.where(rgba()[..., 3:] == 255, PICTURE, 255)
GREY3 = np.dstack([GREY] * 3)
MORE = {"save_all": True, "append_images": frames()[1:]}
BILEVEL = np.where(GREY > 127, 255, 0).astype(np.uint8)
CMYK = np.dstack([255 - PICTURE, np.zeros_like(GREY)])
UPRIGHT = [
    PICTURE[:, ::-1],
    PICTURE[::-1, ::-1],
    PICTURE[::-1],
    PICTURE.transpose(1, 0, 2),
    PICTURE.transpose(1, 0, 2)[:, ::-1],
    PICTURE.transpose(1, 0, 2)[::-1, ::-1],
    PICTURE.transpose(1, 0, 2)[::-1],
]
"""EXIF orientations 2 to 8, by hand (EXIF 2.3, tag 0x0112)."""

KINDS = [
    # Skipped
    Kind(title="empty", name="empty.jpg", make=content(b"")),
    Kind(title="cut off in its header", name="header.png", make=content(saved(Image.fromarray(PICTURE), "PNG")[:20])),
    Kind(title="cut off in its data", name="half.jpg", make=content(PHOTO[: len(PHOTO) // 2])),
    Kind(title="HTML named .jpg", name="page.jpg", make=content(b"<!DOCTYPE html><html><title>404</title></html>")),
    Kind(title="SVG named .png", name="vector.png", make=content(b"<svg xmlns='http://www.w3.org/2000/svg'/>")),
    Kind(title="zeros in the place of the data", name="zeros.jpg", make=content(bytes(5000))),
    Kind(
        title="a bit flipped in PNG data",
        name="flipped.png",
        make=content(
            (data := saved(Image.effect_noise((64, 64), 90), "PNG"))[:900] + bytes([data[900] ^ 16]) + data[901:]
        ),
    ),
    Kind(
        title="decompression bomb, 60,000×60,000 in a few bytes",
        name="bomb.png",
        make=content(png(60000, 60000, b"\0" * 9)),
    ),
    Kind(title="width of zero", name="zero.png", make=content(png(0, 24, b""))),
    Kind(title="link that leads nowhere", name="dangling.jpg", make=lambda path: path.symlink_to("nowhere.jpg")),
    Kind(title="link to itself", name="loop.jpg", make=lambda path: path.symlink_to(path.name)),
    Kind(
        title="file without the right to read",
        name="secret.jpg",
        make=lambda path: (path.write_bytes(WHOLE), path.chmod(0)),
    ),
    Kind(title="pipe (FIFO)", name="pipe.jpg", make=lambda path: os.mkfifo(path)),
    Kind(title="socket", name="socket.jpg", make=listen),
    # Read
    Kind(title="JPEG named .png", name="wrong.png", make=content(WHOLE), pixels=PICTURE, tolerance=12),
    Kind(
        title="progressive JPEG",
        name="progressive.jpg",
        make=image(PICTURE, "JPEG", quality=95, subsampling=0, progressive=True),
        pixels=PICTURE,
        tolerance=12,
    ),
    Kind(
        title="JPEG with bytes after its end",
        name="trailing.jpg",
        make=content(WHOLE + b"garbage" * 99),
        pixels=PICTURE,
        tolerance=12,
    ),
    Kind(
        title="JPEG in CMYK (Adobe's, inverted)",
        name="cmyk.jpg",
        make=image(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95),
        pixels=PICTURE,
        tolerance=25,
    ),
    Kind(
        title="JPEG with an ICC profile",
        name="profile.jpg",
        make=image(
            PICTURE,
            "JPEG",
            quality=95,
            subsampling=0,
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
        pixels=PICTURE,
        tolerance=12,
    ),
    Kind(
        title="60 kB of EXIF",
        name="exif.jpg",
        make=image(PICTURE, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(60000)),
        pixels=PICTURE,
        tolerance=12,
    ),
    *(
        Kind(title="EXIF orientations 2 to 8", name=f"exif{orientation}.png", make=oriented(orientation), pixels=wanted)
        for orientation, wanted in enumerate(UPRIGHT, start=2)
    ),
    Kind(title="16-bit grey PNG", name="deep.png", make=image(GREY.astype(np.uint16) * 257, "PNG"), pixels=GREY3),
    Kind(
        title="grey of one bit",
        name="one.png",
        make=image(Image.fromarray(BILEVEL).convert("1"), "PNG"),
        pixels=np.dstack([BILEVEL] * 3),
    ),
    Kind(title="transparency (RGBA)", name="clear.png", make=image(rgba(), "PNG"), pixels=OVER_WHITE),
    Kind(
        title="palette with a transparent colour",
        name="palette.gif",
        make=image(Image.fromarray(rgba()).quantize(256), "PNG"),
        pixels=OVER_WHITE,
        tolerance=1,
    ),
    Kind(
        title="grey with transparency (LA)",
        name="la.png",
        make=image(Image.fromarray(rgba()).convert("LA"), "PNG"),
        pixels=np.where(
            rgba()[..., 3:] == 255, np.asarray(Image.fromarray(PICTURE).convert("L"))[..., None], 255
        ).repeat(3, 2),
    ),
    Kind(
        title="animated GIF",
        name="moving.gif",
        make=image(
            Image.fromarray(PICTURE).quantize(256),
            "GIF",
            save_all=True,
            append_images=[Image.fromarray(255 - PICTURE).quantize(256)],
        ),
        pixels=PICTURE,
        tolerance=1,
    ),
    Kind(
        title="animated WebP",
        name="moving.webp",
        make=image(frames()[0], "WEBP", lossless=True, **MORE),
        pixels=PICTURE,
    ),
    Kind(title="animated PNG", name="moving.png", make=image(frames()[0], "PNG", **MORE), pixels=PICTURE),
    Kind(title="TIFF of many pages", name="pages.tif", make=image(frames()[0], "TIFF", **MORE), pixels=PICTURE),
    Kind(
        title="TIFF of floats",
        name="float.tiff",
        make=image(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        pixels=GREY3,
    ),
    Kind(title="BMP", name="plain.bmp", make=image(PICTURE, "BMP"), pixels=PICTURE),
    Kind(
        title="header of more rows than the data has",
        name="lies.png",
        make=content(png(32, 48, b"".join(b"\0" + row.tobytes() for row in PICTURE))),
        pixels=np.concatenate([PICTURE, np.zeros_like(PICTURE)]),
    ),
    Kind(title="1×1 pixel", name="dot.png", make=image(PICTURE[:1, :1], "PNG"), pixels=PICTURE[:1, :1]),
    Kind(
        title="1×20,000 pixels",
        name="line.png",
        make=image(np.resize(PICTURE, (20000, 1, 3)), "PNG"),
        pixels=np.resize(PICTURE, (20000, 1, 3)),
    ),
    Kind(title="name that is no UTF-8", name=os.fsdecode(b"caf\xe9.png"), make=image(PICTURE, "PNG"), pixels=PICTURE),
    Kind(title="link to an image", name="link.bmp", make=lambda path: path.symlink_to("plain.bmp"), pixels=PICTURE),
]
