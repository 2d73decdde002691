"""What the bytes of a weight mean: the NumPy definition of every weight type.

Everything that reads weights, native kernels included, is tested against this page. A block is
read as the GGUF specification lays it out; the arithmetic is float32, in the order
(scale x sub-block scale) x code - (minimum scale x sub-block minimum).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# The sixteen values that a code of IQ4_NL and IQ4_XS stands for.
NONLINEAR_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)


def dequantize(data: Bytes, weight_type: WeightType, columns: int) -> Floats:
    """The float32 values, [rows, columns], of rows stored one after the other.

    `data` holds whole rows of `columns` weights, in any shape. Raises ValueError where it does not,
    or where the blocks of the type do not fill a row.
    """
    row_bytes = weight_type.row_bytes(columns)
    flat = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1)
    if row_bytes == 0 or flat.size % row_bytes:
        raise ValueError(
            f"{flat.size} bytes are not whole rows of {columns} {weight_type.value} weights "
            f"({row_bytes} bytes each)"
        )
    if weight_type is WeightType.F32:
        values = flat.view("<f4").astype(np.float32)
    elif weight_type is WeightType.F16:
        values = flat.view("<f2").astype(np.float32)
    elif weight_type is WeightType.BF16:
        values = (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        # A scale that is not finite is the file's business; the values say so.
        with np.errstate(invalid="ignore", over="ignore"):
            values = _DEQUANTIZE[weight_type](flat.reshape(-1, weight_type.block_bytes))
    return values.reshape(-1, columns)


def tensor_values(tensor: Tensor) -> Floats:
    """The float32 values of a tensor, in its shape, rows in the order of Hugging Face files."""
    values = dequantize(tensor.data, tensor.type, tensor.columns)
    if tensor.interleaved_head_dim:
        values = values[source_rows(tensor.rows, tensor.interleaved_head_dim)]
    return values.reshape(tensor.shape)


def source_rows(rows: int, interleaved_head_dim: int) -> npt.NDArray[np.intp]:
    """For each row in Hugging Face's order, the row of the file that holds it.

    GGUF stores row j*head_dim/2+i of a head (i < head_dim/2) as row 2i+j. ValueError if heads of
    this size do not fill the rows.
    """
    if interleaved_head_dim <= 0 or interleaved_head_dim % 2 or rows % interleaved_head_dim:
        raise ValueError(f"{rows} rows are not whole heads of {interleaved_head_dim} (even) rows")
    half = interleaved_head_dim // 2
    stored = np.arange(rows, dtype=np.intp).reshape(-1, half, 2)
    order: npt.NDArray[np.intp] = stored.swapaxes(1, 2).reshape(-1)
    return order


def _float16(blocks: Bytes, offset: int) -> Floats:
    """The float16 at a byte offset of every block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """[..., n] bytes -> [..., 2n]: all low nibbles, then all high nibbles."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, offset: int) -> Bytes:
    """A 32-bit little-endian word of bits, one per weight, [blocks, 32]."""
    return np.unpackbits(blocks[:, offset : offset + 4], axis=1, bitorder="little")


def _q4_0(blocks: Bytes) -> Floats:
    return _float16(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 4:]).astype(np.float32)
    return _float16(blocks, 0) * codes + _float16(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2) << 4
    return _float16(blocks, 0) * (codes.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4) << 4
    return _float16(blocks, 0) * codes.astype(np.float32) + _float16(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _float16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _two_bit_codes(data: Bytes) -> Bytes:
    """64 bytes of each block -> [blocks, 256].

    A half of 128 weights owns 32 bytes; the pair of bits s of byte l is weight 32s+l of the half.
    """
    halves = data.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    codes: Bytes = halves >> shifts & np.uint8(3)
    return codes.reshape(-1, 256)


def _bit_planes(data: Bytes) -> Bytes:
    """32 bytes of each block -> [blocks, 256]: bit j of byte l is weight 32j+l."""
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    bits: Bytes = data.reshape(-1, 1, 32) >> shifts & np.uint8(1)
    return bits.reshape(-1, 256)


def _scale_codes(
    codes: npt.NDArray[np.float32], scales: Floats, minimums: Floats | None = None
) -> Floats:
    """codes [blocks, 256] x scales [blocks, sub-blocks] - minimums [blocks, sub-blocks]."""
    parts = codes.reshape(*scales.shape, -1) * scales[:, :, None]
    if minimums is not None:
        parts -= minimums[:, :, None]
    return parts.reshape(codes.shape)


def _q2_k(blocks: Bytes) -> Floats:
    scales, codes = blocks[:, :16], _two_bit_codes(blocks[:, 16:80])
    return _scale_codes(
        codes.astype(np.float32),
        _float16(blocks, 80) * (scales & 15).astype(np.float32),
        _float16(blocks, 82) * (scales >> 4).astype(np.float32),
    )


def _q3_k_scales(data: Bytes) -> Floats:
    """12 bytes of each block -> sixteen 6-bit scales less 32."""
    low = _nibbles(data[:, :8])
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
    high = (data[:, None, 8:] >> shifts & 3).reshape(-1, 16)
    return (low | high << 4).astype(np.float32) - 32


def _q3_k(blocks: Bytes) -> Floats:
    codes = _two_bit_codes(blocks[:, 32:96]) | _bit_planes(blocks[:, :32]) << 2
    return _scale_codes(
        codes.astype(np.float32) - 4, _float16(blocks, 108) * _q3_k_scales(blocks[:, 96:108])
    )


def _q4_k_scales(data: Bytes) -> tuple[Floats, Floats]:
    """12 bytes of each block -> eight 6-bit scales and eight 6-bit minimums."""
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    minimums = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minimums = _q4_k_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return _scale_codes(
        codes.astype(np.float32), _float16(blocks, 0) * scales, _float16(blocks, 2) * minimums
    )


def _q5_k(blocks: Bytes) -> Floats:
    scales, minimums = _q4_k_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    codes |= _bit_planes(blocks[:, 16:48]) << 4
    return _scale_codes(
        codes.astype(np.float32), _float16(blocks, 0) * scales, _float16(blocks, 2) * minimums
    )


def _q6_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    codes |= _two_bit_codes(blocks[:, 128:192]) << 4
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _scale_codes(codes.astype(np.float32) - 32, _float16(blocks, 208) * scales)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _float16(blocks, 0) * NONLINEAR_VALUES[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 256)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    high_bits = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    high = high_bits >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    return _scale_codes(NONLINEAR_VALUES[codes], _float16(blocks, 0) * scales)


_DEQUANTIZE: dict[WeightType, Callable[[Bytes], Floats]] = {
    WeightType.Q4_0: _q4_0,
    WeightType.Q4_1: _q4_1,
    WeightType.Q5_0: _q5_0,
    WeightType.Q5_1: _q5_1,
    WeightType.Q8_0: _q8_0,
    WeightType.Q2_K: _q2_k,
    WeightType.Q3_K: _q3_k,
    WeightType.Q4_K: _q4_k,
    WeightType.Q5_K: _q5_k,
    WeightType.Q6_K: _q6_k,
    WeightType.IQ4_NL: _iq4_nl,
    WeightType.IQ4_XS: _iq4_xs,
}
