"""Interval and paired test against scipy, and against all outcomes counted one by one."""

from __future__ import annotations

import itertools

import pytest
from scipy.stats import binomtest

from pipeline.significance import mcnemar, wilson_interval

COUNTS = [(0, 1), (1, 1), (0, 360), (360, 360), (351, 360), (9_917, 10_000), (25_000, 50_000)]


@pytest.mark.parametrize(("hits", "count"), COUNTS)
def test_the_interval_is_that_of_wilson(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(hits, count)
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert 0 <= low <= 100 * hits / count <= high <= 100


@pytest.mark.parametrize(("hits", "count"), [(-1, 5), (6, 5), (0, 0)])
def test_an_interval_of_impossible_counts_is_refused(hits: int, count: int) -> None:
    with pytest.raises(ValueError, match="hits of"):
        wilson_interval(hits, count)


@pytest.mark.parametrize(
    ("wins", "losses"),
    [(0, 0), (1, 0), (0, 3), (7, 7), (9, 2), (40, 21), (520, 480), (2_000, 1_000), (0, 9_000)],
)
def test_the_p_value_is_that_of_an_exact_binomial_test(wins: int, losses: int) -> None:
    expected = 1.0
    if wins + losses:
        expected = binomtest(wins, wins + losses, alternative="greater").pvalue
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("count", range(11))
def test_the_p_value_is_the_share_of_coin_tosses_with_so_many_wins(count: int) -> None:
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=count)]
    for wins in range(count + 1):
        share = sum(toss >= wins for toss in tosses) / len(tosses)
        assert mcnemar(wins, count - wins) == share


def test_a_p_value_of_all_images_of_imagenet_is_exact_too() -> None:
    assert mcnemar(25_300, 24_700) == pytest.approx(
        binomtest(25_300, 50_000, alternative="greater").pvalue, rel=1e-9
    )
