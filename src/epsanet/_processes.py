"""Several processes that work as one: who this one is, what all have, and an error of one that all hear of.

Everything here is over torch's process group, and does nothing much where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = [
    "OtherProcessError",
    "agree",
    "connected",
    "cores",
    "first",
    "gather",
    "in_company",
    "largest",
    "mean",
    "rank",
    "world_size",
]

T = TypeVar("T")

_LOST = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "imed out", "timeout")
"""In messages of Gloo and NCCL."""


class OtherProcessError(ValueError):
    """Another process failed, and says itself why."""


def cores() -> list[int]:
    """Numbers of the cores that this process may use: SLURM, containers and taskset allow fewer than there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def connected() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is, from 0; before they are connected, what torchrun says."""
    return distributed.get_rank() if connected() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes are connected."""
    return distributed.get_world_size() if connected() else 1


def gather(value: T) -> list[T]:
    """The values of all processes, in order; a value is whatever can be pickled."""
    if not connected():
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def agree(function: Callable[[], T]) -> T:
    """Call a function in every process; where one fails, all do, and none waits for it.

    Raises:
        Exception: the function's own, in the first process that it failed in.
        OtherProcessError: in the others.
    """
    if not connected():
        return function()
    failure: Exception | None = None
    try:
        value = function()
    except Exception as error:  # noqa: BLE001 - raised below, when the others have heard of it
        failure = error
    own = failure is not None and not isinstance(failure, OtherProcessError)
    texts = gather((str(failure) or type(failure).__name__) if own else None)
    place = next((place for place, text in enumerate(texts) if text is not None), None)
    if failure is not None and place in (rank(), None):
        raise failure
    if place is not None:
        raise OtherProcessError(f"process {place}: {texts[place]}") from failure
    return value


def first(function: Callable[[], T]) -> T:
    """Call a function in the first process, and have its value, which can be pickled, in all."""
    value = agree(lambda: function() if rank() == 0 else None)
    values = [value]
    if connected():
        distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


@contextmanager
def in_company() -> Iterator[None]:
    """Say so in one line when another process does not answer any more.

    Raises:
        ValueError: instead of the process group's error.
    """
    try:
        yield
    except RuntimeError as error:
        if connected() and any(text in str(error) for text in _LOST):
            raise ValueError("another process has ended, or cannot be reached; what it said tells why") from error
        raise


def mean(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, of the shape that it has."""
    if not connected():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / world_size()


def largest(values: list[int], device: torch.device) -> list[int]:
    """The largest of each number over all processes.

    Args:
        values: of this process.
        device: where processes exchange tensors.
    """
    if not connected():
        return values
    numbers = torch.tensor(values, device=device)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return numbers.tolist()
