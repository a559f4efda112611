import pytest

from loadtest.metrics import Distribution, distribution


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
