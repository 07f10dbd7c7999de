import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alter.data import mixture_rates
from alter.errors import AlterError


@pytest.mark.parametrize(
    ("sizes", "temperature", "cap", "expected"),
    [
        ([100, 300], 1, None, [0.25, 0.75]),
        ([100, 400], 2, None, [1 / 3, 2 / 3]),  # square roots 10 and 20
        ([100, 400], 1, 100, [0.5, 0.5]),
        ([1, 16, 81], 4, None, [1 / 6, 2 / 6, 3 / 6]),
        ([1000, 8000], 3, 1000, [0.5, 0.5]),
    ],
)
def test_rates_computed_by_hand(sizes, temperature, cap, expected):
    np.testing.assert_allclose(mixture_rates(sizes, temperature, cap), expected)


def test_weights_multiply_the_rates():
    np.testing.assert_allclose(mixture_rates([100, 100], 1, weights=[3, 1]), [0.75, 0.25])


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(0.5, 100))
def test_rates_are_a_distribution_that_keeps_the_order_of_the_sizes(sizes, temperature):
    rates = mixture_rates(sizes, temperature)
    assert rates.sum() == pytest.approx(1)
    for i, a in enumerate(sizes):
        for j, b in enumerate(sizes):
            assert a >= b or rates[i] <= rates[j] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], 0), "data.temperature"),
        (([1, 2], 1, 0), "data.cap"),
        (([10, 20_000], 0.01), "data.temperature: 0.01 is too near to 0"),
        (([0, 2], 1), "no training rows"),
        (([], 1), "no training"),
    ],
)
def test_bad_settings_name_the_key(arguments, message):
    with pytest.raises(AlterError, match=message):
        mixture_rates(*arguments)
