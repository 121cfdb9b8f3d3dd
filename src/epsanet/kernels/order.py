"""The order in which lanes hold channels.

A vector's lanes are groups, so channel ``i`` of every group of a branch must lie side by side: position
``i * G + g``. All branches read the same input, hence one order has to serve all their group counts at once. It
exists when each count divides the next: write a channel's number in the mixed radix of those counts and store its
digits the other way round. For groups 1, 4, 8, 16 and ``c = g16 * (C / 16) + j`` with ``g16 = 4 g4 + 2 b1 + b0``, that
is the order ``(j, b0, b1, g4)``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

__all__ = ["input_order", "nests", "output_order"]


def nests(groups: Sequence[int]) -> bool:
    """Whether one order serves all these group counts: each divides the next larger one."""
    return all(larger % smaller == 0 for smaller, larger in pairwise(sorted(groups)))


@functools.cache
def _group_order(groups: tuple[int, ...]) -> tuple[int, ...]:
    """The group of the finest grouping in each of its lanes."""
    order: tuple[int, ...] = (0,)
    coarse = 1
    for count in sorted(set(groups)):
        parts = count // coarse
        order = tuple(group * parts + part for part in range(parts) for group in order)
        coarse = count
    return order


@functools.cache
def _nested_order(channels: int, groups: tuple[int, ...]) -> tuple[int, ...]:
    lanes = _group_order(groups)
    size = channels // len(lanes)
    return tuple(group * size + index for index in range(size) for group in lanes)


@functools.cache
def input_order(channels: int, groups: tuple[int, ...], split: bool) -> tuple[int, ...]:
    """The natural channel of each position of a layer's input.

    Args:
        channels: of the input.
        groups: of each branch; each must divide the next larger one unless ``split``.
        split: whether branch ``i`` sees only its own share of the channels.
    """
    if not split:
        return _nested_order(channels, groups)
    share = channels // len(groups)
    return tuple(
        branch * share + channel for branch, count in enumerate(groups) for channel in _nested_order(share, (count,))
    )


@functools.cache
def output_order(channels: int, groups: tuple[int, ...], split: bool) -> tuple[int, ...]:
    """The natural channel of each position of a layer's output: for each branch, its groups as the input holds them."""
    share = channels // len(groups)
    order: list[int] = []
    for branch, count in enumerate(groups):
        # The coarser grouping's order is part of the finest one's: its first lanes.
        held = tuple(g for g in groups if g <= count)
        lanes = range(count) if split else _group_order(held)
        size = share // count
        order.extend(branch * share + group * size + index for index in range(size) for group in lanes)
    return tuple(order)
