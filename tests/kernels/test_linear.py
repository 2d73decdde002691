"""Products of weights, against float64 and against themselves."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    FLOAT_TYPES,
    Floats,
    Weights,
    assert_same_bits,
    check_counts_of_tokens,
    check_cut_rows,
    check_long_stretch,
    columns_of,
    each_isa,
    each_quantized_type,
    each_type,
    kernels,
    nmse,
    random_inputs,
    random_weights,
    set_scales,
    unaligned_floats,
)
from tests.models import SCALE_OFFSETS

# Rounding 32 normal inputs to 16 bits leaves (2.1/32767)^2/12 = 3.4e-10; float sums leave 1e-14.
QUANTIZED_NMSE = 1.5e-9
FLOAT_NMSE = 1e-12


def check(weights: Weights, isa: str, x: Floats, what: str = "") -> None:
    """Products within what the rounding of the inputs allows, as a whole and one by one."""
    found = weights.linear(isa, x)
    x64 = x.astype(np.float64)
    expected = x64 @ weights.values.T
    limit = FLOAT_NMSE if weights.type.is_float else QUANTIZED_NMSE
    if found.size >= 64:  # of fewer, one that is small by chance weighs too much
        assert nmse(found, expected) <= limit, what
    # An input is off by half a step at most, a step being max|x|/32767 of its 32 neighbours.
    steps = np.full_like(x64, 2e-6 * np.abs(x64).max())
    if not weights.type.is_float:
        blocks = np.abs(x64).reshape(x64.shape[0], -1, 32)
        steps = np.repeat(blocks.max(axis=2), 32, axis=1) / 32767
    deviation = np.sqrt((steps**2 / 12) @ (weights.values**2).T)
    magnitude = np.abs(x64) @ np.abs(weights.values).T
    assert (np.abs(found - expected) <= 7 * deviation + 1e-6 * magnitude).all(), what


@each_isa
@each_type
def test_products(isa: str, weight_type: WeightType) -> None:
    for columns in columns_of(weight_type):
        for rows in (1, 15, 16, 17, 33):
            weights = Weights.random(weight_type, rows, columns)
            check(weights, isa, random_inputs(9, columns), f"{rows} rows of {columns}")


@each_isa
@each_type
def test_products_of_a_long_row(isa: str, weight_type: WeightType) -> None:
    check(Weights.random(weight_type, 48, 8192), isa, random_inputs(5, 8192))


@each_isa
@each_type
def test_the_number_of_tokens_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    columns = 512 if weight_type.block_weights == 256 else 288
    weights = Weights.random(weight_type, 33, columns)
    counts = (*range(1, 34), 63, 64, 65, 128, 150)
    check_counts_of_tokens(weights, isa, random_inputs(150, columns), counts)


@each_isa
@pytest.mark.parametrize("weight_type", [t for t in WeightType if t.is_float])
def test_many_tokens_of_long_rows_of_floats(isa: str, weight_type: WeightType) -> None:
    # Weights are converted in blocks of 128 rows and 512 columns, for all tokens at once.
    weights = Weights.random(weight_type, 149, 1101)
    x = random_inputs(133, 1101)
    check(weights, isa, x)
    found = weights.linear(isa, x)
    for token in (0, 11, 12, 132):
        assert_same_bits(found[token : token + 1], weights.linear(isa, x[token : token + 1]))


@each_isa
@each_type
def test_cutting_the_rows_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    weights = Weights.random(weight_type, 16 * 9 + 5, 256)
    check_cut_rows(weights, isa)
    assert weights.linear(isa, random_inputs(13, 256), 16, 16).shape == (13, 0)


@each_isa
@each_type
def test_the_length_of_a_call_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    check_long_stretch(weight_type, isa)


@each_isa
@each_type
def test_inputs_and_outputs_at_any_address(isa: str, weight_type: WeightType) -> None:
    rows, columns = 17, 256
    weights = Weights.random(weight_type, rows, columns)
    x = random_inputs(6, columns)
    expected = weights.linear(isa, x)
    assert_same_bits(weights.linear(isa, unaligned_floats(x)), expected)
    out = unaligned_floats(np.zeros_like(expected))
    kernels.linear(isa, weight_type.value, rows, columns, weights.packed, x, 0, rows, out)
    assert_same_bits(out, expected)


@each_isa
@each_quantized_type
@pytest.mark.parametrize("scale", [0.0, -0.0, 2.0**-24, -(2.0**-24), 6.0e-5, 65504.0, -65504.0])
def test_extreme_scales(isa: str, weight_type: WeightType, scale: float) -> None:
    columns = 512
    for field in range(len(SCALE_OFFSETS[weight_type])):
        data = random_weights(weight_type, 17, columns)
        set_scales(data, weight_type, np.full(1, scale, dtype=np.float16), field)
        weights = Weights(weight_type, columns, data)
        if weights.values.any():
            check(weights, isa, random_inputs(4, columns))
        else:
            assert not weights.linear(isa, random_inputs(4, columns)).any()


@each_isa
@each_quantized_type
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x7F])
def test_extreme_codes(isa: str, weight_type: WeightType, fill: int) -> None:
    # The largest codes, integer scales and inputs there can be, all of one sign: the integer sums
    # come as near to overflow as they ever do.
    columns = 512
    data = np.full((17, weight_type.row_bytes(columns)), fill, dtype=np.uint8)
    set_scales(data, weight_type, np.full(1, 0.01, dtype=np.float16))
    weights = Weights(weight_type, columns, data)
    for sign in (1, -1):
        x = np.full((3, columns), sign * 1.7, dtype=np.float32)
        x[1, ::2] *= -1
        x[2] = 0
        found = weights.linear(isa, x)
        expected = x.astype(np.float64) @ weights.values.T
        limit = 1e-6 * np.abs(x) @ np.abs(weights.values.T)
        assert (np.abs(found - expected) <= limit).all()


@each_isa
@each_type
def test_extreme_inputs(isa: str, weight_type: WeightType) -> None:
    columns = 512
    weights = Weights.random(weight_type, 33, columns)
    x = random_inputs(4, columns)
    for factor in (1e-25, 1e-12, 1e12, 1e25):
        check(weights, isa, (x * np.float32(factor)).astype(np.float32), f"times {factor}")
    # Neighbouring blocks of very different size: each block has its own scale.
    uneven = x * np.float32(10) ** np.repeat(np.arange(16) % 5 - 2, 32).astype(np.float32)
    check(weights, isa, uneven.astype(np.float32))
    # One number alone, in every place: out comes one weight after the other.
    one_hot = np.eye(columns, dtype=np.float32) * np.float32(3)
    found = weights.linear(isa, one_hot) / 3
    np.testing.assert_allclose(found, weights.values.T, rtol=0, atol=1e-6 * weights.values.max())
    assert not weights.linear(isa, np.zeros((2, columns), dtype=np.float32)).any()


@each_isa
@each_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite(isa: str, weight_type: WeightType, value: float) -> None:
    columns = 512
    weights = Weights.random(weight_type, 33, columns)
    x = random_inputs(7, columns)
    expected = weights.linear(isa, x)
    for column in (0, 31, 32, 250, 511):
        broken = x.copy()
        broken[3, column] = value
        found = weights.linear(isa, broken)
        assert not np.isfinite(found[3]).any()
        neighbours = [0, 1, 2, 4, 5, 6]
        assert_same_bits(found[neighbours], expected[neighbours])


@each_isa
@each_quantized_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scale_that_is_not_finite(isa: str, weight_type: WeightType, value: float) -> None:
    columns = 512
    blocks = columns // weight_type.block_weights
    for field in range(len(SCALE_OFFSETS[weight_type])):
        data = random_weights(weight_type, 33, columns)
        x = random_inputs(5, columns)
        expected = Weights(weight_type, columns, data).linear(isa, x)
        set_scales(data[20:21], weight_type, np.full(blocks, value, dtype=np.float16), field)
        found = Weights(weight_type, columns, data).linear(isa, x)
        assert not np.isfinite(found[:, 20]).any()
        others = np.delete(np.arange(33), 20)
        assert_same_bits(found[:, others], expected[:, others])


@each_isa
@pytest.mark.parametrize("weight_type", FLOAT_TYPES, ids=lambda t: t.value)
def test_float_weight_that_is_not_finite(isa: str, weight_type: WeightType) -> None:
    columns = 96
    for value in (np.nan, np.inf):
        data = random_weights(weight_type, 17, columns)
        x = random_inputs(5, columns)
        expected = Weights(weight_type, columns, data).linear(isa, x)
        pattern = np.array([value], dtype=np.float16 if weight_type is WeightType.F16 else "<f4")
        size = weight_type.block_bytes
        data[3, size * 77 : size * 78] = pattern.view(np.uint8)[-size:]
        found = Weights(weight_type, columns, data).linear(isa, x)
        assert not np.isfinite(found[:, 3]).any()
        others = np.delete(np.arange(17), 3)
        assert_same_bits(found[:, others], expected[:, others])
