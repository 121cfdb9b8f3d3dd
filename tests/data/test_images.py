"""Every image opens the same way: upright, RGB, over white; what cannot be read says why in one line."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from epsanet.data.images import ImageError, read_image

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)  # not square, and no symmetry


def saved(image: Image.Image, suffix: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def same(image: Image.Image, wanted: np.ndarray, tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    found = np.asarray(image).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance


# What each EXIF orientation says of where the stored rows and columns belong (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    same(read_image(saved(Image.fromarray(PICTURE), "PNG", exif=exif)), UPRIGHT[orientation](PICTURE))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    same(read_image(saved(Image.fromarray(PICTURE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), PICTURE)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def test_transparency_is_laid_over_white() -> None:
    alpha = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
    rgba = Image.fromarray(np.dstack([PICTURE, alpha]))
    same(read_image(saved(rgba, "PNG")), over_white(PICTURE, alpha), tolerance=1)
    grey = PICTURE[..., 0]
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    same(read_image(saved(la, "PNG")), over_white(np.dstack([grey] * 3), alpha), tolerance=1)


def test_a_transparent_colour_of_a_palette_becomes_white() -> None:
    indices = RANDOM.integers(0, 4, (5, 7), dtype=np.uint8)
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 150, 0], [9, 9, 250]], dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    same(read_image(saved(image, "PNG")), colours[indices])
    clear = colours.copy()
    clear[2] = 255
    same(read_image(saved(image, "PNG", transparency=2)), clear[indices])
    same(read_image(saved(image, "GIF", transparency=2)), clear[indices])


def test_a_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    wanted = PICTURE.copy()
    wanted[2, 3] = 255
    same(read_image(saved(Image.fromarray(PICTURE), "PNG", transparency=tuple(map(int, PICTURE[2, 3])))), wanted)


def test_cmyk_becomes_rgb() -> None:
    cmyk = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    wanted = (255 - cmyk[..., :3].astype(float)) * (1 - cmyk[..., 3:] / 255)
    same(read_image(saved(Image.fromarray(cmyk, "CMYK"), "TIFF")), wanted, tolerance=2)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_brightness(suffix: str) -> None:
    values = np.array([[0, 256, 514], [32896, 65278, 65535]], dtype=np.uint16)
    same(read_image(saved(Image.fromarray(values), suffix)), np.dstack([values // 257] * 3))


def test_32_bit_grey_within_8_bits_is_taken_as_it_is() -> None:
    values = np.array([[0, 7, 255]], dtype=np.int32)
    same(read_image(saved(Image.fromarray(values), "TIFF")), np.dstack([values] * 3))


def test_floats_are_taken_as_they_are_and_clipped_each_by_itself() -> None:
    values = np.array([[-3, 0, 7.5], [200, 255, 300]], dtype=np.float32)
    same(read_image(saved(Image.fromarray(values), "TIFF")), np.dstack([[[0, 0, 7], [200, 255, 255]]] * 3))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_bilevel_become_three_equal_channels(mode: str) -> None:
    values = np.where(PICTURE[..., 0] > 127, 255, 0).astype(np.uint8)
    same(read_image(saved(Image.fromarray(values).convert(mode), "PNG")), np.dstack([values] * 3))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "green", "blue")]
    same(read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])), np.full((3, 4, 3), [255, 0, 0]))


def test_a_single_pixel_is_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (3, 5, 7)).save(tmp_path / "dot.png")
    same(read_image(tmp_path / "dot.png"), np.array([[[3, 5, 7]]]))


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60000×60000 pixels."""
    chunks = [b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0", b"IDAT" + zlib.compress(b"\0" * 9), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    )


WHOLE = {name: saved(Image.fromarray(np.tile(PICTURE, (9, 9, 1))), name).getvalue() for name in ("JPEG", "PNG")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image that can be identified"),
        (b"no picture, only words", "not an image that can be identified"),
        (WHOLE["JPEG"][: len(WHOLE["JPEG"]) // 2], "damaged: .*truncated"),
        (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], "damaged: .*truncated"),
        (WHOLE["PNG"][:20], "damaged|identified"),
        (bomb(), "damaged: .*pixels"),
    ],
    ids=["empty", "text", "half a JPEG", "half a PNG", "half a PNG header", "bomb"],
)
def test_a_file_that_is_no_image_says_why_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as raised:
        read_image(path)
    assert "\n" not in str(raised.value)
    assert str(path) not in str(raised.value)
    with pytest.raises(ImageError, match=reason):
        read_image(io.BytesIO(content))


def test_an_image_already_open_has_the_same_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epsanet.data.images.MAX_PIXELS", 34)
    with pytest.raises(ImageError, match="7×5 pixels are more than the limit of 34"):
        read_image(Image.fromarray(PICTURE))


@pytest.mark.parametrize("suffix", ["GIF", "TIFF"])
def test_a_file_is_closed_after_its_first_frame(suffix: str, tmp_path: Path) -> None:
    """Not only when the picture is collected; a check of 10⁶ files would run out of descriptors."""
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"two.{suffix}", save_all=True, append_images=frames[1:])
    descriptors = Path("/proc/self/fd")
    before = set(descriptors.iterdir()) if descriptors.exists() else set()
    kept = read_image(tmp_path / f"two.{suffix}")
    assert not before or set(descriptors.iterdir()) <= before
    same(kept, np.full((3, 4, 3), [255, 0, 0]))


def test_a_folder_and_a_missing_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^a folder, not a file$"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"^no such file$"):
        read_image(tmp_path / "nothing.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(WHOLE["PNG"])
    path.chmod(0)
    with pytest.raises(ImageError, match="rights of this user"):
        read_image(path)


def test_a_permission_error_is_told_apart_from_damage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("PIL.Image.open", refuse)
    (tmp_path / "secret.png").write_bytes(WHOLE["PNG"])
    with pytest.raises(ImageError, match=r"^not readable with the rights of this user$"):
        read_image(tmp_path / "secret.png")


SMALL = [
    saved(Image.fromarray(PICTURE), name).getvalue() for name in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM")
]


@given(
    content=st.sampled_from(SMALL),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    keep=st.floats(0.05, 1),
)
@pytest.mark.filterwarnings("ignore")
def test_whatever_happens_to_a_file_it_is_an_rgb_image_or_an_image_error(
    content: bytes, changes: list[tuple[float, int]], keep: float
) -> None:
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    try:
        outcome = read_image(io.BytesIO(bytes(damaged[: int(keep * len(damaged))]))).mode
    except ImageError as error:
        outcome = str(error)
    assert outcome
    assert "\n" not in outcome
