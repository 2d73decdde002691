"""What the kernel tests share: instruction sets, weights, and the calls into the native core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from smolrun import _core
from smolrun.quant.blocks import dequantize
from smolrun.quant.types import WeightType
from tests.models import SCALE_OFFSETS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

kernels = _core.kernels

# Every instruction set there is; those that this machine or build lacks are reported as skipped.
each_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(
            isa,
            marks=pytest.mark.skipif(
                isa not in _core.isas(), reason=f"this CPU or build has no {isa} kernels"
            ),
        )
        for isa in ("scalar", "avx2", "avx512")
    ],
)

TYPES = list(WeightType)
QUANTIZED_TYPES = [t for t in TYPES if not t.is_float]
FLOAT_TYPES = [t for t in TYPES if t.is_float]
each_type = pytest.mark.parametrize("weight_type", TYPES, ids=lambda t: t.value)
each_quantized_type = pytest.mark.parametrize("weight_type", QUANTIZED_TYPES, ids=lambda t: t.value)

# Row lengths worth trying: one block, odd numbers of blocks, the widths of real models.
SHORT_BLOCK_COLUMNS = (32, 64, 96, 256, 512, 576, 960)
LONG_BLOCK_COLUMNS = (256, 512, 768)
FLOAT_COLUMNS = (1, 7, 31, 33, 50, *SHORT_BLOCK_COLUMNS)


def columns_of(weight_type: WeightType) -> Sequence[int]:
    if weight_type.is_float:
        return FLOAT_COLUMNS
    return SHORT_BLOCK_COLUMNS if weight_type.block_weights == 32 else LONG_BLOCK_COLUMNS


def aligned(size: int, offset: int = 0) -> Bytes:
    """Zeroed bytes that start `offset` bytes behind a multiple of 64."""
    whole = np.zeros(size + 128, dtype=np.uint8)
    start = -whole.ctypes.data % 64 + offset
    return whole[start : start + size]


def unaligned_floats(values: Floats) -> Floats:
    """A copy that is aligned for a float, but for nothing wider."""
    copy = aligned(values.nbytes, offset=4).view(np.float32).reshape(values.shape)
    copy[...] = values
    return copy


def set_scales(
    data: Bytes, weight_type: WeightType, values: npt.NDArray[np.float16], field: int | None = None
) -> None:
    """Overwrites the scales of [rows, row bytes] in place; `values` are one per block of a row.

    `field` 0 is the scale only, 1 the minimum only, None both.
    """
    blocks = data.reshape(data.shape[0], -1, weight_type.block_bytes)
    for i, offset in enumerate(SCALE_OFFSETS[weight_type]):
        if field in (None, i):
            shape = (blocks.shape[0], blocks.shape[1])
            as_bytes = np.broadcast_to(values, shape).astype("<f2").view(np.uint8)
            blocks[:, :, offset : offset + 2] = as_bytes.reshape(*shape, 2)


def random_weights(weight_type: WeightType, rows: int, columns: int, seed: int = 0) -> Bytes:
    """Rows as a file has them, [rows, row bytes]: random codes, moderate scales of both signs."""
    random = np.random.default_rng([seed, weight_type.ggml_id, rows, columns])
    if weight_type.is_float:
        values = random.standard_normal((rows, columns)).astype(np.float32)
        if weight_type is WeightType.F32:
            return values.view(np.uint8)
        if weight_type is WeightType.F16:
            return values.astype(np.float16).view(np.uint8)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    data = random.integers(0, 256, (rows, weight_type.row_bytes(columns)), dtype=np.uint8)
    shape = (rows, columns // weight_type.block_weights)
    for field in range(len(SCALE_OFFSETS[weight_type])):
        scales = random.uniform(0.005, 0.02, shape) * random.choice([-1, 1], shape)
        set_scales(data, weight_type, scales.astype(np.float16), field)
    return data


def pack(
    weight_type: WeightType,
    columns: int,
    data: Bytes,
    interleaved_head_dim: int = 0,
    *,
    as_codes: bool = False,
) -> Bytes:
    """The layout of the kernels, at an address as it has in a model."""
    name = weight_type.value
    rows = data.size // weight_type.row_bytes(columns)
    out = aligned(kernels.packed_bytes("I16" if as_codes else name, rows, columns))
    out[:] = 0xAA
    kernels.pack(name, rows, columns, data.reshape(-1), interleaved_head_dim, out, as_codes)
    return out


class Weights:
    """A weight in both forms: packed, and the float64 values that it stands for."""

    def __init__(self, weight_type: WeightType, columns: int, data: Bytes) -> None:
        self.type = weight_type
        self.name = weight_type.value  # to the kernels
        self.columns = columns
        self.rows = data.size // weight_type.row_bytes(columns)
        self.packed = pack(weight_type, columns, data)
        self.values: Doubles = dequantize(data, weight_type, columns).astype(np.float64)

    @classmethod
    def random(cls, weight_type: WeightType, rows: int, columns: int, seed: int = 0) -> Weights:
        return cls(weight_type, columns, random_weights(weight_type, rows, columns, seed))

    def linear(
        self,
        isa: str,
        x: Floats,
        row_begin: int = 0,
        row_end: int | None = None,
        *,
        fast: bool = False,
    ) -> Floats:
        """x [tokens, columns] times the rows: [tokens, rows]."""
        row_end = self.rows if row_end is None else row_end
        # What a kernel forgets to write shows.
        out = np.full((x.shape[0], row_end - row_begin), np.nan, dtype=np.float32)
        kernels.linear(
            isa,
            self.name,
            self.rows,
            self.columns,
            self.packed,
            x,
            row_begin,
            row_end,
            out,
            fast,
        )
        return out


def check_counts_of_tokens(
    weights: Weights, isa: str, x: Floats, counts: Iterable[int], *, fast: bool = False
) -> None:
    """Every token has the bits that it has alone."""
    alone = np.concatenate([weights.linear(isa, row[None], fast=fast) for row in x])
    for tokens in counts:
        found = weights.linear(isa, x[:tokens], fast=fast)
        assert_same_bits(found, alone[:tokens], f"{tokens} tokens")
    assert_same_bits(weights.linear(isa, x[3:40], fast=fast), alone[3:40])


def check_cut_rows(weights: Weights, isa: str, *, fast: bool = False) -> None:
    """Rows, cut at any sixteenth, have the bits that they have together."""
    cuts = [*range(0, weights.rows, 16), weights.rows]
    for tokens in (1, 2, 13):
        x = random_inputs(tokens, weights.columns)
        whole = weights.linear(isa, x, fast=fast)
        for i, begin in enumerate(cuts):
            for end in cuts[i + 1 :]:
                part = weights.linear(isa, x, begin, end, fast=fast)
                assert_same_bits(part, whole[:, begin:end].copy(), f"{begin}..{end}")


def check_long_stretch(weight_type: WeightType, isa: str, *, fast: bool = False) -> None:
    """One token asks for weights ahead in another way where there are many: with the same bits."""
    weights = Weights.random(weight_type, 16 * 9 + 5, 2048)  # 100 KB at least
    x = random_inputs(1, weights.columns)
    whole = weights.linear(isa, x, fast=fast)
    for begin in range(0, weights.rows, 16):
        end = min(begin + 16, weights.rows)
        part = weights.linear(isa, x, begin, end, fast=fast)
        assert_same_bits(part, whole[:, begin:end].copy(), f"{begin}..{end}")
    both = weights.linear(isa, np.concatenate([x, x]), fast=fast)
    assert_same_bits(both[1:].copy(), whole, "beside another token")


def random_inputs(tokens: int, columns: int, seed: int = 0) -> Floats:
    random = np.random.default_rng([seed, tokens, columns])
    return random.standard_normal((tokens, columns)).astype(np.float32)


def nmse(found: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """Mean squared error over the mean square of what was expected."""
    error = found.astype(np.float64) - expected
    return float((error**2).mean() / (np.asarray(expected, dtype=np.float64) ** 2).mean())


def assert_same_bits(found: Floats, expected: Floats, what: str = "") -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), what)
