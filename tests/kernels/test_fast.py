"""Products with inputs of 8 bits, against float64 on inputs rounded by a NumPy definition."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun import _core
from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    FLOAT_TYPES,
    QUANTIZED_TYPES,
    Floats,
    Weights,
    assert_same_bits,
    check_counts_of_tokens,
    check_cut_rows,
    check_long_stretch,
    columns_of,
    each_isa,
    kernels,
    nmse,
    random_inputs,
    random_weights,
    set_scales,
    unaligned_floats,
)
from tests.models import SCALE_OFFSETS

# Pairs of products with codes of 8 bits do not fit the 16 bits of AVX2's instruction.
WITHOUT = {"avx2": {WeightType.Q8_0, WeightType.IQ4_NL, WeightType.IQ4_XS}}

each_fast_product = pytest.mark.parametrize(
    ("isa", "weight_type"),
    [
        pytest.param(
            isa,
            weight_type,
            marks=pytest.mark.skipif(
                isa not in _core.isas(), reason=f"this CPU or build has no {isa} kernels"
            ),
            id=f"{isa}-{weight_type.value}",
        )
        for isa in ("scalar", "avx2", "avx512")
        for weight_type in QUANTIZED_TYPES
        if weight_type not in WITHOUT.get(isa, set())
    ],
)


def quantize(isa: str, x: Floats) -> tuple[np.ndarray, Floats, np.ndarray]:
    """Codes [n / 16, 16], scales and sums."""
    codes = np.full(x.size, 77, dtype=np.int8)
    scales = np.full(x.size // 16, 77, dtype=np.float32)
    sums = np.full(x.size // 16, 77, dtype=np.int32)
    kernels.quantize_bytes(isa, x, codes, scales, sums)
    return codes.reshape(-1, 16), scales, sums


def rounded(x: Floats) -> tuple[np.ndarray, Floats]:
    """The definition, of one row: codes [n / 16, 16] and scales; all in float32, ties to even."""
    blocks, steps = x.reshape(-1, 16), np.float32(1024)
    largest = np.abs(x).max()
    codes = np.zeros(blocks.shape, dtype=np.int8)
    scales = np.zeros(len(blocks), dtype=np.float32)
    if not np.isfinite(largest):
        return codes, np.full_like(scales, np.nan)
    scale = largest / (127 * steps)
    if scale < 2.0**-126:
        return codes, scales
    wanted = (np.abs(blocks).max(axis=1) * (steps / largest)).clip(1, steps).reshape(-1, 2)
    # The factor of each piece of 32, then the power of two of each half.
    factor = np.ceil(np.frexp(wanted.max(axis=1))[0] * 8) / 4
    factor[factor == 2] = 1  # and one power of two more
    factor = np.repeat(factor, 2).astype(np.float32)
    shift = np.ceil(np.log2(wanted.reshape(-1).astype(np.float64) / factor)).clip(0)
    power = np.float32(2) ** shift.astype(np.float32)
    inverse = (127 * steps / largest * (1 / factor)) / power
    return np.rint(blocks * inverse[:, None]).astype(np.int8), scale * factor * power


def values_of(x: Floats) -> np.ndarray:
    """What a product takes the inputs [tokens, columns] for, in float64."""
    rows = [rounded(row) for row in x]
    return np.stack(
        [(codes * scales.astype(np.float64)[:, None]).ravel() for codes, scales in rows]
    )


def check(weights: Weights, isa: str, x: Floats, what: str = "") -> None:
    """Nothing but float sums stands between a product and its definition."""
    found = weights.linear(isa, x, fast=True)
    inputs = values_of(x)
    expected = inputs @ weights.values.T
    if found.size >= 64 and expected.any():  # of fewer, one that is small by chance weighs too much
        assert nmse(found, expected) <= 1e-12, what
    magnitude = np.abs(inputs) @ np.abs(weights.values).T
    assert (np.abs(found - expected) <= 1e-6 * magnitude).all(), what


@each_isa
def test_which_types_have_one(isa: str) -> None:
    for weight_type in WeightType:
        fast = not weight_type.is_float and weight_type not in WITHOUT.get(isa, set())
        assert kernels.has_fast(isa, weight_type.value) == fast
    weights = Weights.random(FLOAT_TYPES[0], 3, 32)
    with pytest.raises(ValueError, match="no such product of F32"):
        weights.linear(isa, random_inputs(1, 32), fast=True)


@each_isa
def test_quantize_bytes(isa: str) -> None:
    inputs = [random_inputs(1, columns)[0] for columns in (32, 64, 96, 576, 2048)]
    whole = random_inputs(1, 960)[0]
    with np.errstate(under="ignore"):
        inputs += [
            (whole * factor).astype(np.float32)
            for factor in (1e-45, 1e-40, 1.5e-36, 1e-34, 1e30, 5e37)
        ]
        inputs.append((whole * 10.0 ** (np.arange(960) // 16 - 30)).astype(np.float32))
    ties = np.zeros(64, dtype=np.float32)
    ties[:8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.49]
    ties[63] = -127
    inputs += [ties, np.zeros(32, dtype=np.float32), np.full(32, -0.0, dtype=np.float32)]
    for x in inputs:
        expected, expected_scales = rounded(x)
        for given in (x, unaligned_floats(x)):
            codes, scales, sums = quantize(isa, given)
            np.testing.assert_array_equal(codes, expected)
            assert_same_bits(scales, expected_scales)
            np.testing.assert_array_equal(sums, expected.astype(np.int32).sum(axis=1))


@each_isa
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_quantize_bytes_marks_a_row_that_is_not_finite(isa: str, value: float) -> None:
    for place in range(96):
        x = random_inputs(1, 96)[0]
        x[place] = value
        codes, scales, sums = quantize(isa, x)
        assert np.isnan(scales).all()
        assert not codes.any()
        assert not sums.any()


@each_fast_product
def test_products(isa: str, weight_type: WeightType) -> None:
    for columns in columns_of(weight_type):
        for rows in (1, 15, 16, 17, 33):
            weights = Weights.random(weight_type, rows, columns)
            check(weights, isa, random_inputs(9, columns), f"{rows} rows of {columns}")
    check(Weights.random(weight_type, 48, 8192), isa, random_inputs(5, 8192))


@each_fast_product
def test_the_number_of_tokens_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    columns = 768  # more pieces than are unpacked at a time
    weights = Weights.random(weight_type, 33, columns)
    counts = (*range(1, 20), 31, 32, 33, 47, 48, 49, 64, 97)
    check_counts_of_tokens(weights, isa, random_inputs(97, columns), counts, fast=True)


@each_fast_product
def test_cutting_the_rows_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    check_cut_rows(Weights.random(weight_type, 16 * 5 + 5, 256), isa, fast=True)


@each_fast_product
def test_the_length_of_a_call_changes_no_bit(isa: str, weight_type: WeightType) -> None:
    check_long_stretch(weight_type, isa, fast=True)


@each_fast_product
@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80, 0x7F])
def test_extreme_codes(isa: str, weight_type: WeightType, fill: int) -> None:
    # The largest codes and inputs there can be, all of one sign: the integer sums come as near to
    # the 16 bits of AVX2's pairs as they ever do.
    columns = 512
    data = np.full((17, weight_type.row_bytes(columns)), fill, dtype=np.uint8)
    set_scales(data, weight_type, np.full(1, 0.01, dtype=np.float16))
    weights = Weights(weight_type, columns, data)
    for sign in (1, -1):
        x = np.full((12, columns), sign * 1.7, dtype=np.float32)
        x[1, ::2] *= -1
        x[2] = 0
        check(weights, isa, x)
        check(weights, isa, x[:1])


@each_fast_product
def test_extreme_inputs(isa: str, weight_type: WeightType) -> None:
    columns = 512
    weights = Weights.random(weight_type, 33, columns)
    x = random_inputs(10, columns)
    for factor in (1e-25, 1e-12, 1e12, 1e25):
        check(weights, isa, (x * np.float32(factor)).astype(np.float32), f"times {factor}")
    # Neighbouring blocks of very different size: each block has its own scale.
    uneven = x * np.float32(10) ** np.repeat(np.arange(32) % 5 - 2, 16).astype(np.float32)
    check(weights, isa, uneven.astype(np.float32))
    # One number alone, in every place: out comes one weight after the other.
    one_hot = np.eye(columns, dtype=np.float32) * np.float32(3)
    found = weights.linear(isa, one_hot, fast=True) / 3
    np.testing.assert_allclose(found, weights.values.T, rtol=0, atol=1e-6 * weights.values.max())
    assert not weights.linear(isa, np.zeros((2, columns), dtype=np.float32), fast=True).any()


@each_fast_product
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_input_that_is_not_finite(isa: str, weight_type: WeightType, value: float) -> None:
    columns = 512
    weights = Weights.random(weight_type, 33, columns)
    x = random_inputs(7, columns)
    expected = weights.linear(isa, x, fast=True)
    for column in (0, 15, 16, 32, 250, 511):
        broken = x.copy()
        broken[3, column] = value
        found = weights.linear(isa, broken, fast=True)
        assert not np.isfinite(found[3]).any()
        neighbours = [0, 1, 2, 4, 5, 6]
        assert_same_bits(found[neighbours], expected[neighbours])


@each_fast_product
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scale_that_is_not_finite(isa: str, weight_type: WeightType, value: float) -> None:
    columns = 512
    blocks = columns // weight_type.block_weights
    for field in range(len(SCALE_OFFSETS[weight_type])):
        data = random_weights(weight_type, 33, columns)
        x = random_inputs(10, columns)
        expected = Weights(weight_type, columns, data).linear(isa, x, fast=True)
        set_scales(data[20:21], weight_type, np.full(blocks, value, dtype=np.float16), field)
        found = Weights(weight_type, columns, data).linear(isa, x, fast=True)
        assert not np.isfinite(found[:, 20]).any()
        others = np.delete(np.arange(33), 20)
        assert_same_bits(found[:, others], expected[:, others])
