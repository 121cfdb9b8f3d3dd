"""Look at every image before the first epoch, so that hours later nothing stumbles over a damaged one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image

from epsanet._processes import agree, cores, gather, rank, world_size
from epsanet.data.images import ImageError, image_size, read_image
from epsanet.data.samples import Samples, Subset

__all__ = ["CheckReport", "check_images", "look_at", "map_in_blocks"]

_BLOCK = 4096
"""Images that wait for a thread at a time."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a split holds."""

    title: str
    """Name of the split."""
    images: int
    """Readable ones."""
    per_class: dict[str, int]
    """Readable images of each class name."""
    sizes: np.ndarray
    """Width and height in pixels of each readable image, shape ``images, 2``."""
    bad: dict[str, str]
    """Unreadable images by name, and why."""

    def __str__(self) -> str:
        counts = np.array(list(self.per_class.values()))
        spread = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        (w0, h0), (w1, h1) = self.sizes.min(axis=0), self.sizes.max(axis=0)
        size = f"{w0}×{h0}" if (w0, h0) == (w1, h1) else f"{w0}×{h0} to {w1}×{h1}"
        text = f"{self.images:,} images of {len(counts):,} classes, {spread} a class, {size} pixels"
        empty = [name for name, count in self.per_class.items() if count == 0]
        if empty:
            text += f"; none of {', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}"
        return text + (f"; {len(self.bad):,} damaged" if self.bad else "")


def look_at(
    opened: Callable[[], Path | BinaryIO | Image.Image], depth: Literal["full", "headers"]
) -> tuple[int, int] | str:
    """Width and height of an image, or why it cannot be read.

    Args:
        opened: gives what ``read_image`` takes.
        depth: decode the whole image, or look at its header only.
    """
    try:
        source = opened()
        return image_size(source) if depth == "headers" else read_image(source).size
    except ImageError as error:
        return str(error)
    except (OSError, SyntaxError, ValueError) as error:
        return f"damaged: {error}"


def map_in_blocks(pool: ThreadPoolExecutor, function: Callable[[int], T], positions: range) -> Iterator[T]:
    """Results in order, like those of ``pool.map``, which takes a kilobyte for each position from the first on.

    Args:
        pool: of threads.
        function: of a position.
        positions: any number of them.
    """
    for first in range(0, len(positions), _BLOCK):
        yield from pool.map(function, positions[first : first + _BLOCK])


def check_images(
    samples: Samples,
    title: str,
    *,
    on_bad_image: Literal["skip", "raise"] = "skip",
    depth: Literal["full", "headers"] = "full",
    progress: Callable[[Iterable[tuple[int, int] | str], int], Iterable[tuple[int, int] | str]] = lambda items, _: (
        items
    ),
) -> tuple[Samples, CheckReport]:
    """Read all images of a split, in threads, and leave the damaged ones out; several processes share the work.

    Args:
        samples: the split.
        title: what to call it.
        on_bad_image: leave damaged images out, or stop at the first.
        depth: decode whole images, or look at their headers only.
        progress: wraps the results as they come, with their number, to show how far it is.

    Returns:
        The readable samples, and the report.

    Raises:
        ValueError: at a damaged image with ``on_bad_image="raise"``, and when none is readable.
    """

    def look(position: int) -> tuple[int, int] | str:
        return look_at(lambda: samples.open(position), depth)

    def look_at_share() -> dict[int, tuple[int, int] | str]:
        share, found = range(rank(), len(samples), world_size()), {}
        with ThreadPoolExecutor(max_workers=len(cores())) as pool:
            for position, result in zip(share, progress(map_in_blocks(pool, look, share), len(share)), strict=True):
                found[position] = result
                if isinstance(result, str) and on_bad_image == "raise":
                    pool.shutdown(cancel_futures=True)
                    break
        return found

    results = {position: result for part in gather(agree(look_at_share)) for position, result in part.items()}
    good, sizes, bad = [], [], {}
    for position, result in sorted(results.items()):
        if not isinstance(result, str):
            good.append(position)
            sizes.append(result)
            continue
        if on_bad_image == "raise":
            raise ValueError(f"{samples.name(position)}: {result}; mend or remove it, or use --data.on_bad_image=skip")
        bad[samples.name(position)] = result
    if not good:
        raise ValueError(
            f"the {title} split has no readable image; the first: {next(iter(bad.items()), 'it is empty')}"
        )
    kept = Subset(samples, good) if bad else samples
    counts = np.bincount(kept.labels, minlength=len(kept.class_names))
    return kept, CheckReport(
        title=title,
        images=len(kept),
        per_class=dict(zip(kept.class_names, counts.tolist(), strict=True)),
        sizes=np.array(sizes),
        bad=bad,
    )
