"""What strangers may send, and how much of it is kept."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epsanet.data.images import ImageError
from epsanet.web.uploads import MAX_BYTES, Room, check_upload

KB = 1024

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def animation(kind: str) -> bytes:
    return encoded(kind, save_all=True, append_images=[Image.fromarray(255 - PIXELS)])


def huge_png(width: int, height: int) -> bytes:
    """A header that promises more than any memory holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ["picture.png", "picture.exe"])
def test_a_picture_is_known_by_its_content(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(encoded(kind))
    check_upload(tmp_path / name)


def test_a_telephones_jpeg_with_a_second_picture_behind_it_is_a_still_one(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(animation("MPO"))
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    check_upload(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JPEG, PNG or WebP"),
        (b"no picture", "no JPEG, PNG or WebP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no JPEG, PNG or WebP"),
        (encoded("GIF"), "no JPEG, PNG or WebP"),
        (encoded("BMP"), "no JPEG, PNG or WebP"),
        (encoded("TIFF"), "no JPEG, PNG or WebP"),
        (encoded("EPS"), "no JPEG, PNG or WebP"),
        (encoded("PNG")[:-200], "damaged"),
        (encoded("JPEG")[:-300], "damaged"),
        (encoded("WEBP")[:40], "no JPEG, PNG or WebP"),
        (animation("WEBP"), "an animation of 2 frames"),
        (animation("PNG"), "an animation of 2 frames"),
        (huge_png(9000, 9000), "9000×9000 pixels"),
        (huge_png(2**20, 2**20), "more than 64,000,000 pixels"),
        (huge_png(7, 701), "7×701 pixels, more than 100 times as long as wide"),
        (b"\0" * (MAX_BYTES + 1), "larger than 20 MB"),
    ],
    ids=range(16),
)
def test_anything_else_is_refused_with_a_reason(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        check_upload(tmp_path / "a.png")


def test_a_long_picture_is_one(tmp_path: Path) -> None:
    Image.new("RGB", (700, 7)).save(tmp_path / "a.png")
    check_upload(tmp_path / "a.png")


def aged(path: Path, seconds: float, size: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that looks so old; only the clock can be turned, not the time of a file's last change."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    look = Path.lstat

    def lstat(file: Path) -> os.stat_result:
        values = list(look(file))
        values[9] -= seconds if file == path else 0
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", lstat)
    return path


def test_old_files_go_and_young_and_permanent_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(tmp_path, most=1000 * KB)
    old = aged(tmp_path / "a" / "old", 700, 10, monkeypatch)
    young = aged(tmp_path / "b" / "young", 500, 10, monkeypatch)
    page = aged(tmp_path / "c" / "page", 10_000, 10, monkeypatch)
    room.permanent = {str(page)}
    room.sweep()
    assert (old.exists(), young.exists(), page.exists()) == (False, True, True)
    assert not old.parent.exists()


def test_the_oldest_makes_way_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(tmp_path, most=100_000 * KB)
    first = aged(tmp_path / "a" / "first", 300, 40_000 * KB, monkeypatch)
    second = aged(tmp_path / "b" / "second", 200, 40_000 * KB, monkeypatch)
    room.sweep()
    promised = room.admit(1000 * KB)
    assert promised > 1000 * KB
    assert first.exists()
    assert not room.admit(100_001 * KB), "nothing makes way for what would not fit even then"
    room.release(promised)
    assert room.admit(11_000 * KB), "20 MB are free; what was promised never came"
    assert first.exists()
    assert room.admit(30_000 * KB)
    assert (first.exists(), second.exists()) == (False, True)


def test_a_file_that_was_just_sent_never_makes_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(tmp_path, most=20_000 * KB)
    fresh = aged(tmp_path / "a" / "fresh", 30, 15_000 * KB, monkeypatch)
    room.sweep()
    assert not room.admit(200 * KB)
    assert fresh.exists()


def test_what_is_under_way_is_not_promised_again_after_a_sweep(tmp_path: Path) -> None:
    room = Room(tmp_path, most=100_000 * KB)
    under_way = room.admit(60_000 * KB)
    room.sweep()
    assert not room.admit(40_000 * KB)
    room.release(under_way)
    assert room.admit(40_000 * KB)


def test_what_comes_while_a_sweep_looks_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, walk = Room(tmp_path, most=100_000 * KB), os.walk

    def and_then_a_request_ends(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        yield from list(walk(folder))
        room.release(room.admit(60_000 * KB))

    monkeypatch.setattr(os, "walk", and_then_a_request_ends)
    room.sweep()
    assert room._taken() > 60_000 * KB


def test_many_small_files_take_no_more_than_their_room(tmp_path: Path) -> None:
    """A request of a thousand empty files, each of which the page puts into a folder of its own."""

    def on_disk() -> int:
        return sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*"))

    room, requests = Room(tmp_path, most=20_000 * KB), 0
    while kept := room.admit(80 * KB):
        for number in range(1000):
            folder = tmp_path / f"{requests}-{number}"
            folder.mkdir()
            (folder / "a.png").write_bytes(b"x")
        requests += 1
        room.release(kept)
    assert requests == 2
    assert on_disk() <= room.most


def test_many_sweeps_at_once_disturb_neither_each_other_nor_who_comes(tmp_path: Path) -> None:
    room, uploads = Room(tmp_path, keep_seconds=-1, guard_seconds=-1), 200
    for number in range(uploads):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.png").write_bytes(b"x")
    with ThreadPoolExecutor(8) as visitors:
        swept = [visitors.submit(room.sweep) for _ in range(16)]
        admitted = [visitors.submit(room.admit, room.most * 2 // 3) for _ in range(16)]
    assert [job.exception() for job in (*swept, *admitted)] == [None] * 32
    assert sum(job.result() > 0 for job in admitted) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_deletes_does_not_end_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [aged(tmp_path / name / "old", 700, 10, monkeypatch) for name in ("a", "b")]
    unlink = Path.unlink

    def unlink_with_folder(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        path.parent.rmdir()

    monkeypatch.setattr(Path, "unlink", unlink_with_folder)
    Room(tmp_path).sweep()
    assert [path.parent.exists() for path in old] == [False, False]


def test_the_latest_sweep_says_how_much_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, walk, go_on = Room(tmp_path, most=20_000 * KB), os.walk, threading.Event()

    def slow_first_walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        places = list(walk(folder))
        monkeypatch.setattr(os, "walk", walk)
        assert go_on.wait(60)
        yield from places

    monkeypatch.setattr(os, "walk", slow_first_walk)
    with ThreadPoolExecutor(2) as sweeps:
        first = sweeps.submit(room.sweep)
        while os.walk is slow_first_walk:
            time.sleep(0.001)
        (tmp_path / "later.png").write_bytes(b"x" * 15_000 * KB)
        second = sweeps.submit(room.sweep)
        wait([second], timeout=0.2)
        go_on.set()
    assert first.result() is second.result() is None
    assert not room.admit(200 * KB), "15 of 20 MB are taken"


def test_a_room_holds_what_is_inside_it_and_nothing_that_a_link_leads_out_to(tmp_path: Path) -> None:
    room = Room(tmp_path / "room")
    room.folder.mkdir()
    (tmp_path / "secret.png").write_text("secret")
    (room.folder / "mine.png").write_text("mine")
    (room.folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert room.holds(str(room.folder / "mine.png"))
    for outside in ("../secret.png", "link.png", "", "mine.png\0", "/etc/passwd"):
        assert not room.holds(str(room.folder / outside) if not outside.startswith("/") else outside), outside
    assert not room.holds("mine.png")
