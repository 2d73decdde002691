"""Packing moves bits and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun.quant.blocks import dequantize, source_rows
from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    Bytes,
    Floats,
    columns_of,
    each_isa,
    each_quantized_type,
    each_type,
    kernels,
    pack,
    random_weights,
)


def unpacked(isa: str, weight_type: WeightType, rows: int, columns: int, packed: Bytes) -> Floats:
    values = np.full((rows, columns), np.nan, dtype=np.float32)
    for row in range(rows):
        kernels.dequantize(isa, weight_type.value, rows, columns, packed, row, values[row])
    return values


@each_isa
@each_type
def test_packed_rows_mean_what_the_file_says(isa: str, weight_type: WeightType) -> None:
    for columns in columns_of(weight_type):
        for rows in (1, 15, 16, 17, 33):
            data = random_weights(weight_type, rows, columns)
            found = unpacked(isa, weight_type, rows, columns, pack(weight_type, columns, data))
            expected = dequantize(data, weight_type, columns)
            np.testing.assert_array_equal(found, expected, f"{rows} rows of {columns}")


@each_isa
@each_quantized_type
def test_every_scale_and_code(isa: str, weight_type: WeightType) -> None:
    # Random bytes reach all float16 scales (subnormal, infinite and NaN too), scales and codes.
    rows, columns = 64, 1024
    random = np.random.default_rng(weight_type.ggml_id)
    data = random.integers(0, 256, (rows, weight_type.row_bytes(columns)), dtype=np.uint8)
    found = unpacked(isa, weight_type, rows, columns, pack(weight_type, columns, data))
    expected = dequantize(data, weight_type, columns)
    np.testing.assert_array_equal(found, expected)
    signs = np.isfinite(expected)
    np.testing.assert_array_equal(np.signbit(found[signs]), np.signbit(expected[signs]))


@each_isa
def test_every_float16_and_bfloat16(isa: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for weight_type in (WeightType.F16, WeightType.BF16):
        packed = pack(weight_type, bits.size, bits.view(np.uint8))
        found = unpacked(isa, weight_type, 1, bits.size, packed)
        expected = dequantize(bits.view(np.uint8), weight_type, bits.size)
        np.testing.assert_array_equal(found, expected)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_an_odd_column_of_bfloat16_has_a_zero_beside_it() -> None:
    rows, columns = 16, 3
    bits = np.arange(1, 1 + rows * columns, dtype="<u2").reshape(rows, columns)
    packed = pack(WeightType.BF16, columns, bits.view(np.uint8))
    pairs = packed.view("<u2").reshape(2, rows, 2)
    np.testing.assert_array_equal(pairs[0], bits[:, :2])
    np.testing.assert_array_equal(pairs[1, :, 0], bits[:, 2])
    assert not pairs[1, :, 1].any()


@each_type
@pytest.mark.parametrize("head_dim", [2, 32, 48, 128])
def test_interleaved_rows_are_put_in_order(weight_type: WeightType, head_dim: int) -> None:
    rows, columns = head_dim * 3, 256
    data = random_weights(weight_type, rows, columns)
    found = unpacked(
        "scalar", weight_type, rows, columns, pack(weight_type, columns, data, head_dim)
    )
    expected = dequantize(data, weight_type, columns)[source_rows(rows, head_dim)]
    np.testing.assert_array_equal(found, expected)


@each_type
def test_rows_past_the_end_are_zero(weight_type: WeightType) -> None:
    columns = 256
    data = random_weights(weight_type, 17, columns)
    packed = pack(weight_type, columns, data)
    blank = np.zeros((32, data.shape[1]), dtype=np.uint8)
    blank[:17] = data
    whole = pack(weight_type, columns, blank)
    # A zero block of Q8_0 packs to codes of 128; past the end, only the scale must be zero.
    last = unpacked("scalar", weight_type, 32, columns, packed)[17:]
    np.testing.assert_array_equal(last, np.zeros_like(last))
    assert packed.size == whole.size == 32 * data.shape[1]


@each_type
def test_source_at_any_address(weight_type: WeightType) -> None:
    columns = 256
    data = random_weights(weight_type, 17, columns)
    expected = pack(weight_type, columns, data)
    for offset in (1, 2, 3):
        moved = np.zeros(data.size + offset, dtype=np.uint8)[offset:]
        moved[:] = data.reshape(-1)
        np.testing.assert_array_equal(pack(weight_type, columns, moved), expected)
