"""Means, intervals and paired t-tests of a few runs each, over scipy's distributions; Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

__all__ = ["Difference", "Mean", "holm", "mean", "paired_difference"]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over runs with Student's 95 % interval; infinite where there is one run only."""

    value: float
    """The mean."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    deviation: float
    """Standard deviation over runs."""
    runs: int
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One network less the other, paired by seed."""

    mean: Mean
    """Of the differences."""
    p: float
    """Two-sided, of the paired t-test; not a number where there is one pair only, or all pairs differ by the same."""


def mean(values: Sequence[float]) -> Mean:
    """The mean of runs, with its interval.

    Args:
        values: one a run, at least one.
    """
    count, middle = len(values), float(np.mean(values))
    if count < 2:
        return Mean(value=middle, low=-math.inf, high=math.inf, deviation=math.nan, runs=count)
    deviation = float(np.std(values, ddof=1))
    half = float(special.stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
    return Mean(value=middle, low=middle - half, high=middle + half, deviation=deviation, runs=count)


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """``one`` less ``other``, run by run.

    Args:
        one: scores by seed.
        other: those of the same seeds.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    found = mean(differences)
    rounding = 1e-9 * max(1.0, *map(abs, (*one, *other)))  # equal differences of shares are not equal to the last bit
    if found.runs < 2 or found.deviation <= rounding:
        return Difference(mean=found, p=math.nan)
    t = found.value / (found.deviation / math.sqrt(found.runs))
    return Difference(mean=found, p=2 * float(special.stdtr(found.runs - 1, -abs(t))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values by which a family of tests errs in no more than 5 % of all cases (Holm, 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none falls below one before it, nor above 1.

    Args:
        p_values: of the tests; one that is not a number stays so and is not counted.
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted
