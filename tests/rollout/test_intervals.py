"""Intervals against scipy, against sums worked out by hand, and against what they promise: to hold the truth."""

import math
import random

import pytest
from scipy import stats

from rlvr.rollout.evaluation import pass_at_k
from rlvr.rollout.intervals import interval, mean_interval, share_interval, t_quantile

pytestmark = pytest.mark.both


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 200, 5000])
def test_quantiles_of_students_distribution(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize(("passed", "attempts"), [(0, 7), (1, 2), (8, 10), (50, 50), (37, 120)])
def test_one_attempt_at_each_example_is_wilsons_interval(passed, attempts):
    expected = stats.binomtest(passed, attempts).proportion_ci(0.95, method="wilson")
    clusters = [[1.0]] * passed + [[0.0]] * (attempts - passed)
    assert interval(clusters) == pytest.approx((expected.low, expected.high))


def test_one_value_of_each_example_is_students_interval():
    values = [3.0, 1.5, -2.0, 8.0, 0.25]
    expected = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert interval([[value] for value in values]) == pytest.approx(expected, rel=2e-3)


def test_the_spread_between_clusters_is_that_of_their_sums_by_hand():
    """Values 1, 3 | 5 | 2, 2, 5: n = 6, m = 3. Sums of differences -2, 2, 0: SE² = 3/2 · (4 + 4 + 0) / 36 = 1/3."""
    half = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert mean_interval([[1.0, 3.0], [5.0], [2.0, 2.0, 5.0]]) == pytest.approx((3 - half, 3 + half))


def test_repeating_an_attempt_at_the_same_examples_adds_nothing():
    values = [0.5, 1.5, 4.0, 2.0]
    assert mean_interval([[value] * 8 for value in values]) == pytest.approx(mean_interval([[v] for v in values]))


def test_the_effective_number_of_attempts_by_hand():
    """Two of four, none, all, two of four: m = 1/2; sums of differences 0, -2, 2, 0; SE² = 8/256 = 1/32.

    Effective n = (1/4) / (1/32) = 8 of the 16 attempts, times (z/t)² with three degrees of freedom.
    """
    clusters = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]]
    z, t = stats.norm.ppf(0.975), stats.t.ppf(0.975, 3)
    size = 8 * (z / t) ** 2
    half = z / (1 + z * z / size) * math.sqrt(0.25 / size + z * z / (4 * size**2))
    assert share_interval(clusters) == pytest.approx((0.5 - half, 0.5 + half), rel=2e-3)


def test_attempts_never_count_more_than_once():
    """Every example is solved half the time: no spread at all between examples, and 8 attempts all the same."""
    low, high = share_interval([[1, 0]] * 4)
    wilson = stats.binomtest(4, 8).proportion_ci(0.95, method="wilson")
    assert (low, high) != (0.5, 0.5)
    assert low < wilson.low < wilson.high < high


def test_all_or_nothing_has_a_width_and_attempts_at_one_example_do_not_narrow_it():
    expected = stats.binomtest(0, 5).proportion_ci(0.95, method="wilson")
    assert share_interval([[0.0] * 20] * 5) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("clusters", [[[1.0, 0.0, 1.0]], [[0.3]]])
def test_one_example_says_nothing_about_others(clusters):
    assert interval(clusters) is None


@pytest.mark.parametrize(("examples", "attempts", "k"), [(10, 1, 1), (10, 8, 1), (30, 8, 4), (30, 8, 8), (60, 4, 1)])
def test_about_95_of_100_intervals_hold_the_truth(examples, attempts, k):
    """Examples are solved with a chance drawn from Beta(2, 1.2); 95 ± 4 in 100 over 600 evaluations."""
    draw = random.Random(examples * 100 + attempts * 10 + k)
    truth = sum(1 - (1 - draw.betavariate(2, 1.2)) ** k for _ in range(100_000)) / 100_000
    held = 0
    for _ in range(600):
        chances = [draw.betavariate(2, 1.2) for _ in range(examples)]
        passed = [sum(draw.random() < chance for _ in range(attempts)) for chance in chances]
        estimates = [[pass_at_k(attempts, count, k)] for count in passed]
        low, high = share_interval(estimates, attempts=examples * attempts)
        held += low <= truth <= high
    assert 0.91 <= held / 600 <= 0.99
