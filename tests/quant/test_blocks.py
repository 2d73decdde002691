"""The NumPy definition of the weight types, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize

from smolrun.quant.blocks import dequantize, source_rows, tensor_values
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

TYPES = list(WeightType)


@pytest.mark.parametrize("weight_type", TYPES)
def test_sizes_are_those_of_gguf(weight_type: WeightType) -> None:
    theirs = gguf.GGMLQuantizationType[weight_type.value]
    assert weight_type.ggml_id == theirs.value
    assert (weight_type.block_weights, weight_type.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]


@pytest.mark.parametrize("weight_type", TYPES)
def test_every_bit_as_gguf_has_it(weight_type: WeightType) -> None:
    # Random bytes: every code, scale and minimum occurs, scales that are not finite among them.
    columns, rows = 512, 300
    random = np.random.default_rng(weight_type.ggml_id)
    data = random.integers(0, 256, (rows, weight_type.row_bytes(columns)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf_dequantize(data, gguf.GGMLQuantizationType[weight_type.value])
    found = dequantize(data, weight_type, columns)
    assert found.dtype == np.float32
    assert found.shape == (rows, columns)
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(finite, np.isfinite(found))
    # As integers, so that the sign of a zero counts.
    np.testing.assert_array_equal(
        found.view(np.int32)[finite], expected.astype(np.float32).view(np.int32)[finite]
    )


def test_part_of_a_row_or_of_a_block_is_an_error() -> None:
    data = np.zeros(18 * 3, dtype=np.uint8)
    with pytest.raises(ValueError, match="not whole rows of 64 Q4_0"):
        dequantize(data, WeightType.Q4_0, 64)
    with pytest.raises(ValueError, match="not a multiple of the 32"):
        dequantize(data, WeightType.Q4_0, 48)
    with pytest.raises(ValueError, match="not whole rows"):
        dequantize(data, WeightType.Q4_0, 0)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_interleaved_rows_return_to_their_place(head_dim: int) -> None:
    heads, columns = 3, 4
    values = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(-1, columns)
    # The conversion to GGUF, as converters write it.
    stored = values.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(-1, columns)
    tensor = Tensor(
        "q", WeightType.F32, values.shape, stored.reshape(-1).view(np.uint8), "test", head_dim
    )
    np.testing.assert_array_equal(tensor_values(tensor), values)


def test_interleaved_rows_must_be_whole_heads() -> None:
    for rows, head_dim in [(6, 4), (9, 3), (4, -2)]:
        with pytest.raises(ValueError, match="whole heads"):
            source_rows(rows, head_dim)


def test_vector_keeps_its_shape() -> None:
    tensor = Tensor("norm", WeightType.F16, (3,), np.zeros(6, dtype=np.uint8), "test")
    assert tensor_values(tensor).shape == (3,)
