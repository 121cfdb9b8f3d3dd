"""What a run says: to a person at a terminal, and as plain lines everywhere else."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["console", "counted", "duration", "messages", "progress_bar", "quiet_lightning", "track"]

_PLAIN_WIDTH = 160
"""Characters of a line where there is no terminal to ask."""
_SECONDS_A_LINE = 60
"""Between two lines of progress where there is no terminal for a bar."""

console = Console(soft_wrap=True, highlight=False, markup=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
"""Results."""
messages = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
"""Progress, warnings and errors."""

T = TypeVar("T")


def progress_bar() -> Progress:
    """A bar with counts, elapsed and remaining time that leaves no trace; silent where there is no terminal.

    It shares the console of the results where that is a terminal, so that lines go above the bar and not into it.
    """
    place = console if console.is_terminal else messages
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
        console=place,
        transient=True,
        disable=not place.is_terminal,
    )


def track(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """Iterate under a bar; where there is no terminal, a line a minute says the same."""
    with progress_bar() as bar:
        tracked = bar.track(items, total=total, description=title)
        yield from tracked if not bar.disable else _told(items, total, title)


def _told(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    start = said = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS_A_LINE:
            said, remaining = now, (now - start) / count * (total - count)
            messages.print(f"{title}: {count:,} of {total:,}, remaining {duration(remaining)}")


def counted(number: int, name: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's advice, hidden where it is about choices made on purpose."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # ours are of all processes
            # Of 1×1 filters, whose memory is the same in both layouts.
            warnings.filterwarnings("ignore", message="(?s).*Grad strides do not match bucket view strides.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
