"""What strangers may send: how much of it, and of which kind. Importable without Gradio."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from epsanet.data.images import ImageError, read_image

__all__ = ["MAX_BYTES", "Room", "check_upload"]

MAX_BYTES = 20 * 2**20
"""Of one file."""
_MAX_PIXELS = 64_000_000
"""More than today's telephones take."""
_MAX_RATIO = 100
"""Of the longer side to the shorter: networks enlarge the shorter one to hundreds of pixels, and the longer with it."""
_FORMATS = ("JPEG", "PNG", "WEBP")
_BESIDE = 8192
"""Bytes that a file may take beside its content: its folder, and the rest of a block."""
_MOST_FILES = 1000
"""Of one request, as Gradio takes; each is put into a folder of its own."""
_LEAST_PART = 40
"""Bytes that a file takes in a request, even an empty one."""


def check_upload(path: Path) -> None:
    """Look at the content of a file; its name and what the browser calls it say nothing.

    Args:
        path: of the file.

    Raises:
        ImageError: when it is too large or narrow, no JPEG, PNG or WebP, damaged, or has several frames.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES // 2**20} MB; send a smaller picture")
    try:
        image = Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {_MAX_PIXELS:,} pixels; send a smaller picture") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("no JPEG, PNG or WebP picture; convert it") from error
    with image:
        width, height = image.size
        if width * height > _MAX_PIXELS:
            raise ImageError(f"{width}×{height} pixels, more than {_MAX_PIXELS:,}; send a smaller picture")
        if max(width, height) > _MAX_RATIO * min(width, height):
            raise ImageError(
                f"{width}×{height} pixels, more than {_MAX_RATIO} times as long as wide; send a part of it"
            )
        # What telephones call MPO is a JPEG with a preview or a depth map behind it.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"an animation of {frames} frames; send a still picture")
        read_image(image)


class Room:
    """A bounded folder of files that are needed for a short while.

    Args:
        folder: that is bounded.
        most: bytes in it.
        keep_seconds: after which a file is deleted.
        guard_seconds: for which a file is kept even when there is no room for another.
    """

    def __init__(
        self, folder: Path, *, most: int = 512 * 2**20, keep_seconds: float = 600, guard_seconds: float = 60
    ) -> None:
        self.folder, self.most, self.keep_seconds, self.guard_seconds = folder, most, keep_seconds, guard_seconds
        self.permanent: Collection[str] = frozenset()
        """Paths of files that stay: those of the page itself."""
        self._used = self._promised = self._left = 0
        """Bytes that the last sweep found, of requests that are under way, and of those that ended since that sweep."""
        self._sweeping, self._counting = threading.Lock(), threading.Lock()

    def holds(self, path: str) -> bool:
        """Whether a path leads to a file inside the folder, with links followed."""
        if "\0" in path:
            return False
        place = Path(os.path.realpath(path))
        return place.is_relative_to(self.folder) and place.is_file()

    def admit(self, size: int) -> int:
        """Keep room for a request of so many bytes until ``release``; old files make way.

        Returns:
            Bytes that are kept, as it may consist of many small files; 0 where there is no room.
        """
        kept = size + _BESIDE * (1 + min(size // _LEAST_PART, _MOST_FILES))
        if kept <= self.most < self._taken() + kept:
            self.sweep(kept)
        with self._counting:
            if self._taken() + kept > self.most:
                return 0
            self._promised += kept
        return kept

    def release(self, kept: int) -> None:
        """The request is over; until the next sweep looks, what it left counts as what was kept for it."""
        with self._counting:
            self._promised -= kept
            self._left += kept

    def _taken(self) -> int:
        return self._used + self._promised + self._left

    def sweep(self, size: int = 0) -> None:
        """Delete what is old, and what is oldest where there is no room for so many bytes; one sweep at a time."""
        with self._sweeping:
            left = self._left  # what ends from now on may not be seen
            used = self._swept(size + self._promised)
            with self._counting:
                self._used, self._left = used, self._left - left

    def _swept(self, size: int) -> int:
        """Bytes that are left."""
        now, found = time.time(), []
        for place, _, names in os.walk(self.folder):
            for name in names:
                path = Path(place, name)
                if str(path) in self.permanent:
                    continue
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                found.append((status.st_ctime, _on_disk(status), path))
        used = sum(bytes_ for _, bytes_, _ in found)
        for changed, bytes_, path in sorted(found):
            crowded = used + size > self.most and now - changed > self.guard_seconds
            if not crowded and now - changed <= self.keep_seconds:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
            if path.parent != self.folder:
                with contextlib.suppress(OSError):  # other files are in it, or come this moment
                    path.parent.rmdir()
        return used


def _on_disk(status: os.stat_result) -> int:
    """Bytes that a file takes, which are more than it holds."""
    blocks: int | None = getattr(status, "st_blocks", None)  # Windows has none
    return max(status.st_size, 512 * (blocks or 0)) + _BESIDE
