"""Means, intervals and tests against scipy and definitions written out, and what they promise, by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from epsanet.study.statistics import holm, mean, paired_difference

ONE = [70.1, 71.4, 69.8, 70.9, 71.7]
OTHER = [69.9, 70.2, 69.1, 70.8, 70.3]


def test_the_interval_of_a_mean_is_scipys() -> None:
    found = mean(ONE)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(ONE), scale=stats.sem(ONE))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.value == pytest.approx(sum(ONE) / 5)
    assert found.deviation == pytest.approx(math.sqrt(sum((x - sum(ONE) / 5) ** 2 for x in ONE) / 4))
    assert found.runs == 5


def test_the_interval_of_a_textbook_example_is_the_textbooks() -> None:
    """Student's table has 2.776 for four degrees of freedom; mean 3, deviation √2.5."""
    found = mean([1, 2, 3, 4, 5])
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(2.5 / 5), abs=1e-3)


def test_one_run_has_no_interval() -> None:
    found = mean([70.0])
    assert (found.value, found.low, found.high) == (70.0, -math.inf, math.inf)
    assert math.isnan(paired_difference([70.0], [69.0]).p)


def test_a_paired_difference_is_the_one_sample_test_of_the_differences() -> None:
    found = paired_difference(ONE, OTHER)
    assert found.p == pytest.approx(stats.ttest_rel(ONE, OTHER).pvalue)
    differences = np.subtract(ONE, OTHER)
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert found.mean.value == pytest.approx(differences.mean())
    assert paired_difference(OTHER, ONE).mean.value == pytest.approx(-differences.mean())
    unpaired = stats.ttest_ind(ONE, OTHER).pvalue
    assert found.p < unpaired / 2, "the pairing is lost"


def test_runs_that_differ_by_the_same_everywhere_prove_nothing() -> None:
    """Scores are on a grid: two runs that are both one image apart have no deviation, and are no evidence."""
    for one in ([1, 2, 3], [2, 3, 4]):
        found = paired_difference(one, [1, 2, 3])
        assert found.mean.value == one[0] - 1
        assert math.isnan(found.p)
    one, other = ([100 * right / 450 for right in rights] for rights in ([400, 406], [398, 404]))
    found = paired_difference(one, other)
    assert 0 < found.mean.deviation < 1e-12, "not equal to the last bit"
    assert math.isnan(found.p)
    assert paired_difference([50.0, 50.2], [50.0, 50.0]).p < 1, "one image of 500 is a difference"


def test_holm_rejects_what_its_step_down_procedure_rejects() -> None:
    """The procedure as it was published: go on from the smallest while p ≤ 0.05 / (m - rank)."""
    random = np.random.default_rng(0)
    for _ in range(200):
        p_values = list(random.uniform(0, 0.1, 6) ** random.integers(1, 3))
        ranked = enumerate(sorted((p, place) for place, p in enumerate(p_values)))
        rejected = {place for _, (_, place) in itertools.takewhile(lambda x: x[1][0] <= 0.05 / (6 - x[0]), ranked)}
        assert {place for place, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([0.01, math.nan, 0.04])
    assert math.isnan(adjusted[1])
    assert adjusted[::2] == pytest.approx([0.02, 0.04])


def test_the_interval_of_a_null_comparison_covers_zero_in_95_percent_of_simulations() -> None:
    """5,000 comparisons of 5 seeds between equal networks; 0.95 ± 0.013 is four standard errors."""
    random = np.random.default_rng(1)
    covered = wrong = 0
    for _ in range(5000):
        seeds = random.normal(70, 1, 5)  # what both networks share
        found = paired_difference(list(seeds + random.normal(0, 0.5, 5)), list(seeds + random.normal(0, 0.5, 5)))
        covered += found.mean.low <= 0 <= found.mean.high
        wrong += found.p < 0.05
        assert (found.mean.low <= 0 <= found.mean.high) == (found.p >= 0.05)
    assert covered / 5000 == pytest.approx(0.95, abs=0.013)
    assert wrong == 5000 - covered


def test_of_families_of_null_comparisons_holm_lets_at_most_5_percent_err() -> None:
    random = np.random.default_rng(2)
    families = 1500
    errs = 0
    for _ in range(families):
        p_values = [paired_difference(list(random.normal(0, 1, 5)), [0.0] * 5).p for _ in range(8)]
        errs += min(holm(p_values)) < 0.05
    assert errs / families < 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)
    assert errs / families > 0.02, "corrected until nothing can be found"
