"""Products of F16 and BF16 weights in integer codes of 16 bits, against a definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun.quant.blocks import dequantize, source_rows
from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    FLOAT_COLUMNS,
    Bytes,
    Doubles,
    Floats,
    Weights,
    aligned,
    assert_same_bits,
    check_counts_of_tokens,
    check_cut_rows,
    each_isa,
    kernels,
    nmse,
    pack,
    random_inputs,
    random_weights,
    unaligned_floats,
)

PART, RUN = 512, 128
SHORT_FLOATS = (WeightType.F16, WeightType.BF16)
each_short_float = pytest.mark.parametrize("weight_type", SHORT_FLOATS, ids=lambda t: t.value)


def encoded(part: Floats) -> tuple[np.ndarray, float]:
    """The definition, of up to 512 weights: codes and the power of two that scales them."""
    x = part.astype(np.float64)
    if not np.isfinite(x).all():
        return np.zeros(x.size, np.int16), np.nan
    norms = [np.sqrt((x[i : i + RUN] ** 2).sum()) for i in range(0, x.size, RUN)]
    least = max(np.abs(x).max() / 32767, max(norms) / 46300)
    scale = 2.0 ** max(np.ceil(np.log2(least)), -126) if least else 2.0**-126
    return np.rint(x / scale).astype(np.int16), scale


def rounded(x: Floats) -> tuple[np.ndarray, Floats]:
    """The definition, of one row of inputs: codes, and the scale of each run of 128."""
    codes, scales = [], []
    for i in range(0, x.size, RUN):
        run = x[i : i + RUN].astype(np.float64)
        by_largest = np.abs(run).max() / 32767
        scale = max(by_largest, np.sqrt((run**2).sum()) / 46300)
        if not np.isfinite(run).all() or by_largest < 2.0**-126:
            scale = 0.0 if np.isfinite(run).all() else np.nan
            codes.append(np.zeros(run.size, np.int16))
        else:
            codes.append(np.rint(run / scale).astype(np.int16))
        scales.append(scale)
    return np.concatenate(codes), np.array(scales, np.float32)


def quantize(isa: str, x: Floats) -> tuple[np.ndarray, Floats]:
    codes = np.full(x.size, 77, np.int16)
    scales = np.full(-(-x.size // RUN), 77, np.float32)
    kernels.quantize_runs(isa, x, codes, scales)
    return codes, scales


def inputs_of(isa: str, x: Floats) -> Doubles:
    """What a product takes the inputs [tokens, columns] for."""
    rows = []
    for row in x:
        codes, scales = quantize(isa, row)
        rows.append(codes * np.repeat(scales.astype(np.float64), RUN)[: row.size])
    return np.stack(rows)


def encode(isa: str, weight_type: WeightType, data: Bytes) -> tuple[np.ndarray, float]:
    count = data.size // 2
    codes = np.full(count + count % 2, 77, np.int16)
    scale = kernels.encode(isa, weight_type.value, data, codes)
    assert count % 2 == 0 or codes[count] == 0
    return codes[:count], scale


def stored(weight_type: WeightType, values: Floats) -> Bytes:
    if weight_type is WeightType.F16:
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


class Codes(Weights):
    """A weight in codes; `values` are what these stand for."""

    def __init__(self, weight_type: WeightType, columns: int, data: Bytes) -> None:
        self.type, self.name, self.columns = weight_type, "I16", columns
        self.rows = data.size // weight_type.row_bytes(columns)
        self.packed = pack(weight_type, columns, data, as_codes=True)
        self.exact: Doubles = dequantize(data, weight_type, columns).astype(np.float64)
        self.values = np.empty_like(self.exact)
        for row, exact in zip(self.values, self.exact, strict=True):
            for i in range(0, columns, PART):
                codes, scale = encoded(exact[i : i + PART].astype(np.float32))
                row[i : i + PART] = codes * scale


def check(weights: Codes, isa: str, x: Floats, what: str = "") -> None:
    """Nothing but float sums stands between a product and its definition."""
    found = weights.linear(isa, x)
    inputs = inputs_of(isa, x)
    expected = inputs @ weights.values.T
    magnitude = np.abs(inputs) @ np.abs(weights.values).T
    assert (np.abs(found - expected) <= 1e-6 * magnitude).all(), what


def patterns(count: int) -> list[Floats]:
    random = np.random.default_rng(count)
    normal = random.standard_normal(count).astype(np.float32)
    outlier = normal.copy()
    outlier[count // 2] = 3000
    uneven = normal * np.float32(2) ** random.integers(-8, 8, count).astype(np.float32)
    even = np.full(count, 0.71, np.float32) * np.where(normal < 0, -1, 1).astype(np.float32)
    return [normal, outlier, uneven, even, np.zeros(count, np.float32)]


@each_isa
@each_short_float
def test_weights_are_rounded_as_defined(isa: str, weight_type: WeightType) -> None:
    for count in (1, 2, 7, 16, 31, 127, 128, 129, 300, 511, 512):
        for factor in (1.0, 1e-7, 1e4, 1e-36, 1e-40, 1e34):
            if weight_type is WeightType.F16 and not 1e-8 < factor < 10:
                continue
            for values in patterns(count):
                with np.errstate(under="ignore"):
                    data = stored(weight_type, (values * np.float32(factor)).astype(np.float32))
                expected, scale = encoded(dequantize(data, weight_type, count).reshape(-1))
                codes, found = encode(isa, weight_type, data)
                np.testing.assert_array_equal(codes, expected, f"{count} times {factor}")
                assert found == scale


@each_isa
def test_a_weight_alone_keeps_its_value(isa: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for weight_type, kept in ((WeightType.F16, 0), (WeightType.BF16, 2.0**-119)):
        values = dequantize(bits.view(np.uint8), weight_type, bits.size).reshape(-1)
        for i in range(0, bits.size, 7):
            codes, scale = encode(isa, weight_type, bits[i : i + 1].view(np.uint8))
            if not np.isfinite(values[i]):
                assert np.isnan(scale)
                assert not codes.any()
            elif abs(values[i]) >= kept:
                assert codes[0] * scale == values[i]


@each_isa
@each_short_float
def test_packed_rows_are_what_codes_stand_for(isa: str, weight_type: WeightType) -> None:
    for columns in (*FLOAT_COLUMNS, 511, 513, 1101):
        for rows in (1, 16, 17):
            weights = Codes.random(weight_type, rows, columns)
            assert isinstance(weights, Codes)
            found = np.full((rows, columns), np.nan, np.float32)
            for row in range(rows):
                kernels.dequantize(isa, "I16", rows, columns, weights.packed, row, found[row])
            np.testing.assert_array_equal(found, weights.values, f"{rows} rows of {columns}")
            for i in range(0, columns, PART):
                error = np.abs(found - weights.exact)[:, i : i + PART].max(axis=1)
                largest = np.abs(weights.exact[:, i : i + PART]).max(axis=1)
                assert (error <= 2.0**-12 * largest).all()


@each_short_float
def test_interleaved_rows_are_put_in_order(weight_type: WeightType) -> None:
    rows, columns = 96, 130
    data = random_weights(weight_type, rows, columns)
    ordered = np.ascontiguousarray(data.reshape(rows, -1)[source_rows(rows, 32)])
    found = pack(weight_type, columns, data, 32, as_codes=True)
    np.testing.assert_array_equal(found, pack(weight_type, columns, ordered, as_codes=True))
    moved = aligned(data.size, offset=1)
    moved[:] = data.reshape(-1)
    np.testing.assert_array_equal(pack(weight_type, columns, moved, 32, as_codes=True), found)


@each_isa
def test_inputs_are_rounded_as_defined(isa: str) -> None:
    for columns in (1, 31, 128, 129, 576, 1101):
        for factor in (1.0, 1e-36, 1e-33, 1e30):
            for values in patterns(columns):
                with np.errstate(under="ignore"):
                    x = (values * np.float32(factor)).astype(np.float32)
                codes, scales = quantize(isa, x)
                expected, expected_scales = rounded(x)
                np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
                # A scale that differs in its last bit may round a number to the next code.
                assert np.abs(codes.astype(np.int32) - expected).max() <= 1
                assert (codes != expected).mean() <= 0.02
    x = random_inputs(1, 300)[0]
    x[130], x[299] = np.inf, np.nan
    codes, scales = quantize(isa, x)
    assert np.isfinite(scales[0])
    assert np.isnan(scales[1:]).all()
    assert not codes[128:].any()


@each_isa
@each_short_float
def test_products(isa: str, weight_type: WeightType) -> None:
    for columns in (*FLOAT_COLUMNS, 511, 513, 1025):
        for rows in (1, 15, 16, 17, 33):
            weights = Codes.random(weight_type, rows, columns)
            assert isinstance(weights, Codes)
            check(weights, isa, random_inputs(9, columns), f"{rows} rows of {columns}")
    weights = Codes.random(weight_type, 149, 1101)
    assert isinstance(weights, Codes)
    check(weights, isa, random_inputs(70, 1101))


@each_isa
@each_short_float
def test_rounding_costs_little_and_something(isa: str, weight_type: WeightType) -> None:
    weights = Codes.random(weight_type, 64, 1024)
    assert isinstance(weights, Codes)
    x = random_inputs(20, 1024)
    found = weights.linear(isa, x)
    assert 1e-11 < nmse(found, x.astype(np.float64) @ weights.exact.T) < 3e-8


@each_isa
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(isa: str, sign: int) -> None:
    # 4092 is the largest code of 128 equal weights and of 128 equal inputs: 46296 is their norm.
    columns = 1024
    data = np.full((17, columns), 4092, np.float16).view(np.uint8)
    weights = Codes(WeightType.F16, columns, data)
    assert encode(isa, WeightType.F16, data[0, : 2 * PART])[1] == 1
    x = np.full((13, columns), sign * 4092, np.float32)
    assert np.abs(quantize(isa, x[0])[0]).min() == 4092
    check(weights, isa, x)
    # One number alone in each run has the largest code there is.
    alone = np.zeros((17, columns), np.float16)
    alone[:, ::RUN] = 65504
    weights = Codes(WeightType.F16, columns, alone.view(np.uint8))
    check(weights, isa, alone[:13].astype(np.float32) * np.float32(sign))


@each_isa
def test_the_number_of_tokens_changes_no_bit(isa: str) -> None:
    weights = Codes.random(WeightType.F16, 150, 649)
    counts = (*range(1, 27), 31, 64, 70)
    check_counts_of_tokens(weights, isa, random_inputs(70, 649), counts)


@each_isa
def test_cutting_the_rows_changes_no_bit(isa: str) -> None:
    check_cut_rows(Codes.random(WeightType.BF16, 16 * 9 + 5, 77), isa)
    check_cut_rows(Codes.random(WeightType.F16, 40, 600), isa)


@each_isa
def test_inputs_at_any_address(isa: str) -> None:
    weights = Codes.random(WeightType.BF16, 17, 199)
    x = random_inputs(6, 199)
    assert_same_bits(weights.linear(isa, unaligned_floats(x)), weights.linear(isa, x))


@each_isa
def test_extreme_inputs(isa: str) -> None:
    weights = Codes.random(WeightType.BF16, 33, 600)
    assert isinstance(weights, Codes)
    x = random_inputs(4, 600)
    for factor in (1e-25, 1e-12, 1e12, 1e25):
        check(weights, isa, (x * np.float32(factor)).astype(np.float32), f"times {factor}")
    assert not weights.linear(isa, np.zeros((2, 600), np.float32)).any()


@each_isa
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_reaches_its_row_and_token(isa: str, value: float) -> None:
    rows, columns = 33, 299
    data = random_weights(WeightType.F16, rows, columns)
    x = random_inputs(7, columns)
    expected = Codes(WeightType.F16, columns, data).linear(isa, x)
    for column in (0, 127, 128, 298):
        broken = x.copy()
        broken[3, column] = value
        found = Codes(WeightType.F16, columns, data).linear(isa, broken)
        assert not np.isfinite(found[3]).any()
        neighbours = [0, 1, 2, 4, 5, 6]
        assert_same_bits(found[neighbours], expected[neighbours])
        bad = data.copy()
        bad.view(np.float16)[20, column] = value
        found = Codes(WeightType.F16, columns, bad).linear(isa, x)
        assert not np.isfinite(found[:, 20]).any()
        others = np.delete(np.arange(rows), 20)
        assert_same_bits(found[:, others], expected[:, others])
