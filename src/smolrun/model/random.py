"""Weights that come from no file: seeded random ones for tests, zeros for sizing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

# Weights made at a time: bounds the memory beside the weights themselves to some 30 MB.
_CHUNK = 1 << 22


def random_weights(
    config: ModelConfig, seed: int = 0, dtype: WeightType = WeightType.F32
) -> dict[str, Tensor]:
    """Random weights of a float type, by canonical name.

    Each tensor depends on the seed, its name and its shape only, and is the same on every machine.
    Values are uniform, with the spread that keeps activations near 1 and logits near a standard
    deviation of 2, so that neither is degenerate whatever the sizes. ValueError for a quantized
    type or a seed outside 0 to 2**64 - 1.
    """
    _check_float(dtype)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"the seed must lie between 0 and 2**64 - 1, found {seed}")
    tensors = {}
    for name, shape in build(config).weights.items():
        centre, spread = _distribution(name, shape)
        count = int(np.prod(shape))
        data = np.empty(count * dtype.block_bytes, dtype=np.uint8)
        for begin, values in _uniform(seed, name, count):
            values *= np.float32(spread)
            values += np.float32(centre)
            stored = _stored(values, dtype)
            data[begin * dtype.block_bytes :][: stored.nbytes] = stored.view(np.uint8)
        tensors[name] = Tensor(name, dtype, shape, data, f"random weights, seed {seed}: {name}")
    return tensors


def zero_weights(config: ModelConfig, dtype: WeightType = WeightType.F32) -> dict[str, Tensor]:
    """Zeros of a float type, by canonical name; the system backs them by memory on first write."""
    _check_float(dtype)
    return {
        name: Tensor(
            name,
            dtype,
            shape,
            np.zeros(int(np.prod(shape)) * dtype.block_bytes, dtype=np.uint8),
            f"zero weights: {name}",
        )
        for name, shape in build(config).weights.items()
    }


def _check_float(dtype: WeightType) -> None:
    if not dtype.is_float:
        raise ValueError(f"weights are made in F32, F16 or BF16, not in {dtype.value}")


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and half width of a weight's uniform distribution (deviation: width / sqrt(3))."""
    if name.endswith("norm.weight"):
        return 1.0, 0.5
    if name.endswith(".bias"):
        return 0.0, 0.2
    deviation = float(shape[-1]) ** -0.5
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        # The layers add outputs of size 1 to an embedding of size 2 / sqrt(width): a tied head then
        # does not just name the input token again.
        deviation *= 2.0
    return 0.0, deviation * 3.0**0.5


def _uniform(seed: int, name: str, count: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(begin, values in (-1, 1)) in pieces: 16 bits of a counter-based stream per value."""
    digest = hashlib.sha256(name.encode()).digest()
    # As an array: NumPy would take a list with numbers past 2**63 for floats, and round them.
    key = np.array([seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)
    stream = np.random.Philox(key=key)
    for begin in range(0, count, _CHUNK):
        size = min(_CHUNK, count - begin)
        bits = stream.random_raw((size + 3) // 4).astype("<u8", copy=False).view("<u2")[:size]
        yield (
            begin,
            (bits.astype(np.float32) + np.float32(0.5)) / np.float32(1 << 15) - np.float32(1),
        )


def _stored(
    values: npt.NDArray[np.float32], dtype: WeightType
) -> npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]:
    if dtype is WeightType.F32:
        return values
    if dtype is WeightType.F16:
        return values.astype(np.float16)
    # BF16 is the upper half of a float32, rounded to nearest even.
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
