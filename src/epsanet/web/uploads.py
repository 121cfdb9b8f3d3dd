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
        self._used, self._sweeping = 0, threading.Lock()

    def holds(self, path: str) -> bool:
        """Whether a path leads to a file inside the folder, with links followed."""
        if "\0" in path:
            return False
        place = Path(os.path.realpath(path))
        return place.is_relative_to(self.folder) and place.is_file()

    def admit(self, size: int) -> bool:
        """Whether there is room for so many bytes; old files make way."""
        if size <= self.most < self._used + size:
            self.sweep(size)
        if self._used + size > self.most:
            return False
        self._used += size  # until the next sweep looks
        return True

    def sweep(self, size: int = 0) -> None:
        """Delete what is old, and what is oldest where there is no room for so many bytes; one sweep at a time."""
        with self._sweeping:
            self._used = self._swept(size)

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
                found.append((status.st_ctime, status.st_size, path))
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
