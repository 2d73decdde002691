from __future__ import annotations

import pytest

from smolrun.measure.samples import Samples


def test_median_and_spread() -> None:
    odd = Samples.of([3.0, 1.0, 10.0])
    assert (odd.median, odd.least, odd.greatest) == (3.0, 1.0, 10.0)
    assert Samples.of([4.0, 1.0, 2.0, 100.0]).median == 3.0
    assert Samples.of([7.0]).median == Samples.of([7.0]).high == 7.0


def test_high_leaves_a_hundredth_out() -> None:
    assert Samples.of([1.0, 2.0, 3.0]).high == 3.0
    assert Samples.of(float(i) for i in range(100)).high == 98.0
    assert Samples.of(float(i) for i in range(399, -1, -1)).high == 395.0


def test_rates_turn_the_order_round() -> None:
    rate = Samples.of([0.5, 2.0, 1.0]).rate(10)
    assert rate.values == (20.0, 5.0, 10.0)
    assert (rate.median, rate.least, rate.greatest) == (10.0, 5.0, 20.0)


def test_nothing_measured_is_no_sample() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        Samples.of([])
