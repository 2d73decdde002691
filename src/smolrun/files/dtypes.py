"""Float weights rounded from one type to another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

# Weights converted at a time: bounds the memory beside the result to some 20 MB.
_CHUNK = 1 << 20


def converted(tensor: Tensor, target: WeightType) -> Tensor:
    """A float tensor in another float type, rounded to nearest, ties to even.

    Infinities and NaN stay what they are. ModelFormatError where a finite weight is too large for
    the target.
    """
    count = tensor.data.nbytes // tensor.type.block_bytes
    data = np.empty(count * target.block_bytes, np.uint8)
    for begin in range(0, count, _CHUNK):
        end = min(count, begin + _CHUNK)
        source = tensor.data[begin * tensor.type.block_bytes : end * tensor.type.block_bytes]
        values = _float32(source, tensor.type)
        stored = rounded(values, target, tensor.origin)
        data[begin * target.block_bytes : end * target.block_bytes] = stored
    return replace(tensor, type=target, data=data)


def rounded(
    values: npt.NDArray[np.float32], target: WeightType, origin: str
) -> npt.NDArray[np.uint8]:
    """The bytes of flat values in a float type, rounded to nearest, ties to even.

    Infinities and NaN stay what they are. ModelFormatError, which begins with `origin`, where a
    finite value is too large for the target.
    """
    stored = _rounded(values, target)
    too_large = np.isfinite(values) & ~np.isfinite(_float32(stored, target))
    if too_large.any():
        raise ModelFormatError(
            f"{origin}: the weight {values[too_large][0]:g} is too large for {target.value}; "
            "use bf16 or f32 for this model"
        )
    return stored


def _float32(data: npt.NDArray[np.uint8], weight_type: WeightType) -> npt.NDArray[np.float32]:
    if weight_type is WeightType.F32:
        return data.view("<f4").astype(np.float32, copy=False)
    if weight_type is WeightType.F16:
        return data.view("<f2").astype(np.float32)
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _rounded(values: npt.NDArray[np.float32], target: WeightType) -> npt.NDArray[np.uint8]:
    if target is WeightType.F32:
        return values.astype("<f4", copy=False).view(np.uint8)
    if target is WeightType.F16:
        with np.errstate(over="ignore", under="ignore"):
            return values.astype("<f2").view(np.uint8)
    bits = values.view(np.uint32)
    upper = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    # Rounding could carry a NaN over into an infinity or a zero.
    upper = np.where(np.isnan(values), (bits >> 16) | 0x40, upper)
    return upper.astype("<u2").view(np.uint8)
