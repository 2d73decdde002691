"""Importance of the columns of weights: files as llama.cpp's `imatrix` makes and reads them.

For each matrix such a file holds the sum, over the tokens of a text, of the squares of what each
column was multiplied with, and the number of tokens. Their quotient says how much a squared error
in the column adds to the squared error of the product.
Source: llama.cpp's `tools/imatrix/imatrix.cpp`; the older format, .dat, is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError
from smolrun.files.gguf import GgufFile
from smolrun.files.gguf_writer import GgufWriter, TensorInfo, TypedValue
from smolrun.quant.blocks import dequantize
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a text showed of the inputs of a model's products. Names are GGUF's."""

    sums: Mapping[str, Floats]  # [columns], of squares, by weight: "blk.0.attn_q.weight"
    counts: Mapping[str, int]  # tokens that were summed over
    datasets: tuple[str, ...] = ()  # names of the texts
    chunk_count: int = 0  # pieces that the text was cut into
    chunk_size: int = 0  # tokens of a piece

    def importance(self, name: str) -> Floats | None:
        """Of each column of a weight, [columns]; None for one that the text did not reach.

        A column that saw next to nothing keeps a ten-thousandth of the mean, so that a text that
        never used it does not declare its weights worthless.
        """
        if not self.counts.get(name):
            return None
        means = self.sums[name] / np.float32(self.counts[name])
        floor = np.float32(1e-4) * means.mean()
        return np.maximum(means, floor) if floor > 0 else None


def write_imatrix(path: str | Path, matrix: ImportanceMatrix) -> None:
    """Write the file, whole or not at all; OutputError where that can not be done."""
    metadata = {
        "general.type": TypedValue("string", "imatrix"),
        "imatrix.datasets": TypedValue("string[]", list(matrix.datasets)),
        "imatrix.chunk_count": TypedValue("u32", matrix.chunk_count),
        "imatrix.chunk_size": TypedValue("u32", matrix.chunk_size),
    }
    infos, data = [], []
    for name in sorted(matrix.sums):
        sums = np.ascontiguousarray(matrix.sums[name], np.float32)
        infos.append(TensorInfo(name + _SUMS, WeightType.F32, (1, len(sums))))
        infos.append(TensorInfo(name + _COUNTS, WeightType.F32, (1, 1)))
        data += [sums, np.array([matrix.counts[name]], np.float32)]
    with GgufWriter(path, metadata, infos) as writer:
        for values in data:
            writer.write(values)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read such a file: ModelNotFoundError, ModelFormatError."""
    file = GgufFile.open(path)
    try:
        if file.metadata.get("general.type") != "imatrix":
            raise ModelFormatError(
                f"{path}: general.type: expected 'imatrix', found "
                f"{file.metadata.get('general.type')!r}; make one with `smolrun imatrix`"
            )
        sums, counts = {}, {}
        for name, tensor in file.tensors.items():
            if not name.endswith(_SUMS):
                continue
            weight = name.removesuffix(_SUMS)
            counted = file.tensors.get(weight + _COUNTS)
            if counted is None:
                raise ModelFormatError(f"{tensor.origin}: has no {weight + _COUNTS} beside it")
            sums[weight] = _values(tensor)
            count = _values(counted)
            if count.size != 1:
                raise ModelFormatError(f"{counted.origin}: expected 1 number, found {count.size}")
            counts[weight] = int(count[0])
        if not sums:
            raise ModelFormatError(f"{path}: holds no {_SUMS} tensors")
        datasets = file.metadata.get("imatrix.datasets", [])
        return ImportanceMatrix(
            sums,
            counts,
            tuple(map(str, datasets)) if isinstance(datasets, list) else (),
            _whole(file.metadata.get("imatrix.chunk_count")),
            _whole(file.metadata.get("imatrix.chunk_size")),
        )
    finally:
        file.close()


def _values(tensor: Tensor) -> Floats:
    """Finite numbers, none negative, flat."""
    if tensor.type is not WeightType.F32:
        raise ModelFormatError(f"{tensor.origin}: expected F32, found {tensor.type.value}")
    values = dequantize(tensor.data, tensor.type, tensor.columns).reshape(-1)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ModelFormatError(f"{tensor.origin}: a value is negative or not finite")
    return values


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
