"""Tests, intervals and powers against textbooks, other implementations and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from train.study.statistics.inference import (
    difference_beyond_p,
    equivalence_p,
    equivalence_power,
    fisher_p,
    holm,
    paired,
    paired_power,
    seeds_for_effect,
    seeds_for_equivalence,
    sign_flip_p,
    smallest_effect,
)

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Student (1908): hours of sleep gained with one drug over another."""


def test_students_own_example() -> None:
    """The figures that R's t.test prints for the sleep data."""
    found = paired(SLEEP)
    assert (found.value, found.n) == (pytest.approx(1.58), 10)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.value / (found.deviation / math.sqrt(10)) == pytest.approx(4.0621, abs=1e-4)


def test_equal_pairs_have_no_spread() -> None:
    assert paired([0.0, 0.0, 0.0]).p == 1.0
    assert paired([0.5, 0.5]).p == 0.0 and paired([0.5, 0.5]).low == 0.5
    assert equivalence_p([0.5, 0.5], 0.4) == 1.0 and equivalence_p([0.5, 0.5], 0.6) == 0.0


def test_equivalence_is_two_one_sided_tests() -> None:
    """Against scipy's one-sided t-tests on shifted data, and against the interval of level 1 - 2 alpha."""
    draws = np.random.default_rng(1)
    for _ in range(200):
        values, margin = draws.normal(0.3, 1, draws.integers(2, 9)), float(draws.uniform(0.1, 2))
        lower = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        upper = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert equivalence_p(values, margin) == pytest.approx(max(lower, upper))
        inside = paired(values, level=0.9)
        assert (equivalence_p(values, margin) < 0.05) == (-margin < inside.low and inside.high < margin)
        beyond = stats.ttest_1samp(np.sign(values.mean()) * values, margin, alternative="greater").pvalue
        assert difference_beyond_p(values, margin) == pytest.approx(beyond)


def test_single_differences_make_mcnemars_test() -> None:
    """Against the binomial test of the discordant pairs."""
    for worse, better, equal in ((0, 6, 2), (1, 5, 0), (3, 3, 4), (2, 9, 1), (0, 0, 5)):
        differences = [1] * worse + [-1] * better + [0] * equal
        expected = stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
        assert sign_flip_p(differences) == pytest.approx(expected)
    assert sign_flip_p([1]) == 1.0, "one seed tells nothing"


def test_whole_differences_are_permuted_exactly() -> None:
    """Against scipy's permutation test, which enumerates the signs."""
    for differences in ([3, 2, 0, 1, 2, 1], [3, -1, 2, 2], [-2, -2, -1, -3, 1, 0, -1]):
        found = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p(differences) == pytest.approx(found.pvalue)


def test_the_lady_tasting_tea() -> None:
    assert fisher_p((3, 4), (1, 4)) == pytest.approx(34 / 70)
    assert fisher_p((3, 3), (0, 3)) == pytest.approx(0.1)


def test_holms_correction() -> None:
    """The second line is R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_holms_correction_keeps_the_error_of_the_family() -> None:
    draws = np.random.default_rng(2).uniform(size=(20_000, 5))
    share = np.mean([min(holm(list(row))) < 0.05 for row in draws])
    assert share == pytest.approx(0.05, abs=0.006)


def test_powers_of_a_paired_test() -> None:
    """G*Power's table: dz = 0.5 needs 34 pairs for 80% power, dz = 0.8 needs 15, dz = 0.2 needs 199."""
    assert [seeds_for_effect(effect, 1.0) for effect in (0.5, 0.8, 0.2)] == [34, 15, 199]
    assert paired_power(34, 0.5, 1.0) == pytest.approx(0.807778, abs=1e-5)
    assert smallest_effect(34, 0.008) == pytest.approx(0.5 * 0.008, rel=0.02)
    assert paired_power(34, smallest_effect(34, 2.0), 2.0) == pytest.approx(0.8)
    for n, effect in ((2, 3.0), (6, 1.435), (20, 0.3)):  # the noncentral t distribution, exact where n is small
        limit, centre = stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
        exact = stats.nct.sf(limit, n - 1, centre) + stats.nct.cdf(-limit, n - 1, centre)
        assert paired_power(n, effect, 1.0) == pytest.approx(exact, abs=2e-4)
    assert seeds_for_effect(1e-6, 1.0) is None and seeds_for_effect(0.1, 0.0) == 2


def test_powers_are_the_shares_that_simulation_finds() -> None:
    draws = np.random.default_rng(3)
    n, deviation, runs = 6, 0.008, 20_000
    values = draws.normal(0.004, deviation, (runs, n))
    found = stats.ttest_1samp(values, 0.0, axis=1).pvalue < 0.05
    assert paired_power(n, 0.004, deviation) == pytest.approx(found.mean(), abs=0.012)
    mean, error = values.mean(1), values.std(1, ddof=1) / math.sqrt(n)
    half = stats.t.ppf(0.95, n - 1) * error
    for margin in (0.008, 0.015):
        inside = (mean - half > -margin) & (mean + half < margin)
        assert equivalence_power(n, 0.004, margin, deviation) == pytest.approx(inside.mean(), abs=0.012)


def test_seeds_for_equivalence() -> None:
    needed = seeds_for_equivalence(0.0, 0.01, 0.008)
    assert needed is not None
    assert equivalence_power(needed, 0.0, 0.01, 0.008) >= 0.8 > equivalence_power(needed - 1, 0.0, 0.01, 0.008)
    assert seeds_for_equivalence(0.02, 0.01, 0.008) is None, "no number of seeds shows what is not so"
