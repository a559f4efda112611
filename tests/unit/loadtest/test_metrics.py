import pytest

from loadtest.metrics import Distribution, distribution, jain_index, newcombe_interval, wilson_interval


def test_distribution_of_ten_numbers() -> None:
    found = distribution([10.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0])
    assert found is not None
    # Between the ninth and the tenth value: a tenth, and ninety-one hundredths, of the way.
    assert (found.mean, found.p50) == (5.5, 5.5)
    assert found.p90 == pytest.approx(9.1)
    assert found.p99 == pytest.approx(9.91)


def test_distribution_of_one_number_is_that_number_and_of_none_nothing() -> None:
    assert distribution([3.0]) == Distribution(mean=3.0, p50=3.0, p90=3.0, p99=3.0)
    assert distribution([]) is None


def test_jain_index_when_one_of_four_is_served_is_a_quarter_and_when_all_are_alike_one() -> None:
    assert jain_index([0.0, 0.8, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([0.3, 0.3, 0.3]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.5]) == pytest.approx(2.25 / 2.5)
    assert jain_index([0.0, 0.0]) is None and jain_index([]) is None


def test_wilson_interval_when_compared_with_published_values_is_theirs() -> None:
    """Newcombe 1998 (one proportion), table I, method 3."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_newcombe_interval_when_compared_with_published_values_is_theirs() -> None:
    """Newcombe 1998 (difference of proportions), table II, method 10: 56/70 − 48/80, 9/10 − 3/10, 10/10 − 0/10."""
    assert newcombe_interval((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe_interval((3, 10), (9, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    assert newcombe_interval((0, 10), (10, 10)) == pytest.approx((0.6075, 1.0), abs=5e-5)
