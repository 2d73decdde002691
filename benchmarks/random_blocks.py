"""Random weights made directly in their stored form, fast and with little memory.

The weights have mean 0 and a standard deviation of about 0.02. In quantized types the codes are
uniform, and every field of a block (sub-block scales, minima) varies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from smolrun.quant.types import WeightType

Bytes = npt.NDArray[np.uint8]

DEVIATION = 0.02


def random_blocks(weight_type: WeightType, blocks: int, random: np.random.Generator) -> Bytes:
    """The bytes, [blocks * block bytes], of that many blocks."""
    if weight_type.is_float:
        return _floats(weight_type, blocks, random)
    raw = random.bytes(blocks * weight_type.block_bytes)
    data: Bytes = np.frombuffer(raw, np.uint8).reshape(blocks, weight_type.block_bytes).copy()
    _SCALES[weight_type](data, random)
    return data.reshape(-1)


@cache
def _normal_values(weight_type: WeightType) -> npt.NDArray[np.generic]:
    """65536 equally likely values of a normal distribution, as stored."""
    quantile = NormalDist(0.0, DEVIATION).inv_cdf
    values = np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)
    if weight_type is WeightType.F32:
        return values
    if weight_type is WeightType.F16:
        return values.astype(np.float16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _floats(weight_type: WeightType, count: int, random: np.random.Generator) -> Bytes:
    indices = np.frombuffer(random.bytes(2 * count), np.uint16)
    values: Bytes = _normal_values(weight_type)[indices].view(np.uint8)
    return values


def _half(
    data: Bytes, offset: int, mean: float, random: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Set the float16 at `offset` of every block to the mean, give or take a quarter."""
    values = (mean * random.uniform(0.75, 1.25, len(data))).astype(np.float16)
    data[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
    return values.astype(np.float32)


def _copy_half(data: Bytes, offset: int, values: npt.NDArray[np.float32]) -> None:
    data[:, offset : offset + 2] = values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _plain(code_deviation: float) -> Callable[[Bytes, np.random.Generator], None]:
    def set_scale(data: Bytes, random: np.random.Generator) -> None:
        _half(data, 0, DEVIATION / code_deviation, random)

    return set_scale


def _with_minimum(
    code_mean: float, code_deviation: float
) -> Callable[[Bytes, np.random.Generator], None]:
    def set_scales(data: Bytes, random: np.random.Generator) -> None:
        scale = _half(data, 0, DEVIATION / code_deviation, random)
        _copy_half(data, 2, -code_mean * scale)

    return set_scales


def _q2_k(data: Bytes, random: np.random.Generator) -> None:
    # Scale and minimum of a sub-block share their code, so that the values centre on 0.
    codes = random.integers(6, 16, (len(data), 16), np.uint8)
    data[:, :16] = codes | codes << 4
    scale = _half(data, 80, DEVIATION / (1.118 * 10.5), random)
    _copy_half(data, 82, 1.5 * scale)


def _q3_k(data: Bytes, random: np.random.Generator) -> None:
    _half(data, 108, DEVIATION / (18.5 * 2.35), random)


def _with_six_bit_scales(
    code_mean: float, code_deviation: float
) -> Callable[[Bytes, np.random.Generator], None]:
    def set_scales(data: Bytes, random: np.random.Generator) -> None:
        codes = random.integers(24, 64, (len(data), 8), np.uint8)
        first, second = codes[:, :4], codes[:, 4:]
        high = second >> 4 << 6
        data[:, 4:8] = first | high
        data[:, 8:12] = first | high
        data[:, 12:16] = (second & 15) | second << 4
        scale = _half(data, 0, DEVIATION / (code_deviation * 43.5), random)
        _copy_half(data, 2, code_mean * scale)

    return set_scales


def _q6_k(data: Bytes, random: np.random.Generator) -> None:
    scales = random.integers(32, 128, (len(data), 16), np.int8)
    data[:, 192:208] = scales.view(np.uint8)
    _half(data, 208, DEVIATION / (18.5 * 80), random)


_SCALES: dict[WeightType, Callable[[Bytes, np.random.Generator], None]] = {
    WeightType.Q4_0: _plain(4.61),
    WeightType.Q4_1: _with_minimum(7.5, 4.61),
    WeightType.Q5_0: _plain(9.23),
    WeightType.Q5_1: _with_minimum(15.5, 9.23),
    WeightType.Q8_0: _plain(73.9),
    WeightType.Q2_K: _q2_k,
    WeightType.Q3_K: _q3_k,
    WeightType.Q4_K: _with_six_bit_scales(7.5, 4.61),
    WeightType.Q5_K: _with_six_bit_scales(15.5, 9.23),
    WeightType.Q6_K: _q6_k,
    WeightType.IQ4_NL: _plain(69.0),
    WeightType.IQ4_XS: _plain(69.0 * 18.5),
}
