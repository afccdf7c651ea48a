"""Numbers worked out by hand, and scipy's t distribution."""

import math

import pytest

from evolora.sweep.statistics import (
    paired_difference,
    ranks,
    stream_ranks,
    summarize,
    t_distribution,
    t_quantile,
)

stats = pytest.importorskip("scipy.stats")


def test_mean_and_sample_standard_deviation_by_hand():
    found = summarize([2.0, 4.0, 9.0])  # deviations -3, -1, 4: squares 26, over 2 is 13
    assert found is not None
    assert (found.n, found.mean) == (3, 5.0)
    assert found.std == pytest.approx(math.sqrt(13.0))


def test_one_value_has_no_spread_and_none_no_summary():
    one = summarize([0.5])
    assert one is not None and one.std is None and one.n == 1
    assert summarize([]) is None


def test_paired_difference_by_hand_uses_shared_keys_alone():
    mine = {("default", 0): 0.50, ("default", 1): 0.60, ("default", 2): 0.73, ("default", 3): 0.1}
    other = {("default", 0): 0.40, ("default", 1): 0.55, ("default", 2): 0.55, ("back", 3): 0.9}
    found = paired_difference(mine, other)
    assert found is not None
    # differences 0.10, 0.05, 0.18: mean 0.11, squares 0.0001 + 0.0036 + 0.0049 = 0.0086 over 2
    assert found.n == 3
    assert found.mean == pytest.approx(0.11)
    assert found.std == pytest.approx(math.sqrt(0.0043))
    half = 4.302652729911275 * math.sqrt(0.0043 / 3)  # t table: 2 degrees of freedom, 97.5 %
    assert found.low == pytest.approx(0.11 - half)
    assert found.high == pytest.approx(0.11 + half)


def test_paired_interval_is_that_of_scipy():
    mine = {index: value for index, value in enumerate([0.71, 0.64, 0.69, 0.75, 0.58])}
    other = {index: value for index, value in enumerate([0.66, 0.65, 0.61, 0.70, 0.57])}
    found = paired_difference(mine, other, level=0.9)
    expected = stats.ttest_rel(list(mine.values()), list(other.values())).confidence_interval(0.9)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_pair_has_a_difference_and_no_interval():
    found = paired_difference({0: 0.5}, {0: 0.4, 1: 0.3})
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.std is None and found.low is None and found.high is None
    assert paired_difference({0: 0.5}, {1: 0.4}) is None


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([0.3, 0.9, 0.3, 0.1]) == [2.5, 1.0, 2.5, 4.0]
    assert ranks([0.3, 0.9, 0.3, 0.1], more_is_better=False) == [2.5, 4.0, 2.5, 1.0]


def test_ranks_of_a_stream_are_means_over_keys_that_a_method_has():
    found = stream_ranks({"a": {0: 0.9, 1: 0.5}, "b": {0: 0.8, 1: 0.7}, "c": {0: 0.1}})
    assert [found[name].rank for name in "abc"] == [1.5, 1.5, 3.0]
    assert [found[name].of for name in "abc"] == [3, 3, 3]
    assert [found[name].n for name in "abc"] == [2, 2, 1]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 10, 29, 120])
def test_t_distribution_is_that_of_scipy(freedom):
    for value in (-2.0, 0.0, 0.3, 1.7, 12.0):
        assert t_distribution(value, freedom) == pytest.approx(
            stats.t.cdf(value, freedom), abs=1e-12
        )
    for probability in (0.5, 0.9, 0.975, 0.9995):
        assert t_quantile(probability, freedom) == pytest.approx(
            stats.t.ppf(probability, freedom), rel=1e-8, abs=1e-9
        )


def test_a_quantile_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="freedom at least 1"):
        t_quantile(0.975, 0)
