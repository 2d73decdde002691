"""Rows of weights into the blocks of a type, by the native core.

The codes and scales that a block gets are found by a search for the least squared error
(src/core/kernels/quantize_*.h). What the bytes mean is said in quant/blocks.py.
"""

from __future__ import annotations

import numpy as np

from smolrun import _core
from smolrun.quant.blocks import Bytes, Floats, dequantize
from smolrun.quant.types import WeightType


def quantize(
    data: Bytes,
    source_type: WeightType,
    columns: int,
    weight_type: WeightType,
    importance: Floats | None = None,
    isa: str | None = None,
) -> Bytes:
    """Rows of one weight type in another: [rows, bytes of a row].

    `data` holds whole rows of `columns` weights of `source_type`, in any shape. `importance`
    [columns], at least 0, says how much a squared error in each column counts; without it they
    count alike, and Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 come out as the `gguf` package makes them. Does
    not hold the GIL, so threads may share a weight by its rows; each row is quantized by itself,
    and all instruction sets (`isa`) give the same bytes.

    Raises ValueError for a weight that is not finite or too large for the type, naming its row; for
    an importance that is negative or not finite; and where blocks do not fill a row.
    """
    rows = np.ascontiguousarray(data, dtype=np.uint8).reshape(-1, source_type.row_bytes(columns))
    if not source_type.is_float:
        rows = dequantize(rows, source_type, columns).view(np.uint8)
        source_type = WeightType.F32
    out = np.empty((len(rows), weight_type.row_bytes(columns)), dtype=np.uint8)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
    _core.quantize(
        isa or _core.default_isa(), weight_type.value, source_type.value, rows, importance, out
    )
    return out
