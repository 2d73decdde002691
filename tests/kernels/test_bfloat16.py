"""Products of BF16 weights with inputs of bfloat16, against float64 on inputs rounded by NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun import _core
from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    FLOAT_COLUMNS,
    Doubles,
    Floats,
    Weights,
    assert_same_bits,
    check_counts_of_tokens,
    check_cut_rows,
    random_inputs,
    random_weights,
    unaligned_floats,
)

BF16 = WeightType.BF16
ISA = "avx512"
pytestmark = pytest.mark.skipif(
    ISA not in _core.isas(), reason=f"this CPU or build has no {ISA} kernels"
)


def rounded(x: Floats) -> Doubles:
    """The definition: to nearest, ties to even, subnormal numbers to zero."""
    bits = x.view(np.uint32).astype(np.int64)
    cut = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    values = cut.astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(np.abs(x) < 2.0**-126, 0.0, values)


def check(weights: Weights, x: Floats, what: str = "") -> None:
    """Nothing but float sums stands between a product and its definition."""
    found = weights.linear(ISA, x, fast=True)
    inputs = rounded(x)
    expected = inputs @ weights.values.T
    # What the instruction takes for zero: products and sums below the smallest normal float.
    lost = weights.columns * 2.0**-125
    magnitude = np.abs(inputs) @ np.abs(weights.values).T
    assert (np.abs(found - expected) <= 1e-6 * magnitude + lost).all(), what


def test_products() -> None:
    for columns in (*FLOAT_COLUMNS, 511, 513, 1025, 8192):
        for rows in (1, 15, 16, 17, 33, 150):
            weights = Weights.random(BF16, rows, columns)
            check(weights, random_inputs(9, columns), f"{rows} rows of {columns}")


def test_inputs_are_rounded_and_weights_are_not() -> None:
    weights = Weights.random(BF16, 20, 96)
    x = random_inputs(5, 96)
    exact = x.astype(np.float64) @ weights.values.T
    found = weights.linear(ISA, x, fast=True)
    error = np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean())
    assert 1e-4 < error < 2.0**-8
    one_hot = np.eye(96, dtype=np.float32)
    assert_same_bits(
        weights.linear(ISA, one_hot, fast=True), weights.values.T.astype(np.float32).copy()
    )
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    diagonal = np.diag(ties)
    ones = Weights(BF16, 4, np.full((1, 4), 0x3F80, dtype="<u2").view(np.uint8))
    found = ones.linear(ISA, diagonal, fast=True)[:, 0]
    np.testing.assert_array_equal(found, [1, 1 + 2**-6, -1, 1 + 2**-7])


def test_the_number_of_tokens_changes_no_bit() -> None:
    columns = 1537
    weights = Weights.random(BF16, 150, columns)
    counts = (*range(1, 27), 31, 64, 70)
    check_counts_of_tokens(weights, ISA, random_inputs(70, columns), counts, fast=True)


def test_cutting_the_rows_changes_no_bit() -> None:
    check_cut_rows(Weights.random(BF16, 16 * 9 + 5, 77), ISA, fast=True)


def test_inputs_at_any_address() -> None:
    weights = Weights.random(BF16, 17, 99)
    x = random_inputs(6, 99)
    found = weights.linear(ISA, unaligned_floats(x), fast=True)
    assert_same_bits(found, weights.linear(ISA, x, fast=True))


def test_extreme_inputs() -> None:
    weights = Weights.random(BF16, 33, 512)
    x = random_inputs(10, 512)
    for factor in (1e-40, 1e-37, 1e-25, 1e25):
        with np.errstate(under="ignore"):
            check(weights, (x * np.float32(factor)).astype(np.float32), f"times {factor}")
    assert not weights.linear(ISA, np.zeros((2, 512), dtype=np.float32), fast=True).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_input_that_is_not_finite(value: float) -> None:
    # The largest float is beyond the largest bfloat16, and rounds to infinity.
    weights = Weights.random(BF16, 33, 99)
    x = random_inputs(7, 99)
    expected = weights.linear(ISA, x, fast=True)
    for column in (0, 1, 31, 32, 97, 98):
        broken = x.copy()
        broken[3, column] = value
        found = weights.linear(ISA, broken, fast=True)
        assert not np.isfinite(found[3]).any()
        neighbours = [0, 1, 2, 4, 5, 6]
        assert_same_bits(found[neighbours], expected[neighbours])


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])  # infinities and NaN
def test_weight_that_is_not_finite(bits: int) -> None:
    columns = 99
    x = random_inputs(13, columns)
    for column in (0, 1, 97, 98):
        data = random_weights(BF16, 33, columns)
        expected = Weights(BF16, columns, data).linear(ISA, x, fast=True)
        data.view("<u2")[20, column] = bits
        found = Weights(BF16, columns, data).linear(ISA, x, fast=True)
        assert not np.isfinite(found[:, 20]).any()
        others = np.delete(np.arange(33), 20)
        assert_same_bits(found[:, others], expected[:, others])
