"""Weights made ready for the native kernels, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from smolrun._core import Weight
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.mapping import MappedFile
from smolrun.model.program import Program
from smolrun.quant.blocks import tensor_values
from smolrun.quant.tensor import Tensor

NativeWeights = dict[str, Weight | npt.NDArray[np.float32]]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def native_weights(
    checkpoint: Checkpoint, program: Program, threads: int, progress: Progress | None = None
) -> NativeWeights:
    """The weights of a listing by canonical name: matrices as Weight, vectors as float32 arrays.

    Matrices are packed, or copied where they are float, into huge pages, from which they are read
    up to a third faster than from the file's own. The file's pages are given back meanwhile, so
    that memory never holds two copies: the peak is the size of the files and a few megabytes. The
    checkpoint may be closed afterwards. `threads` share the packing of one matrix.
    """
    return _native(checkpoint.tensors, program, threads, checkpoint.file_of, progress)


def native_weights_from_memory(
    tensors: Mapping[str, Tensor], program: Program, threads: int
) -> NativeWeights:
    """As native_weights, for tensors that lie in no file, such as random ones."""
    return _native(tensors, program, threads, lambda tensor: None, None)


def _native(
    tensors: Mapping[str, Tensor],
    program: Program,
    threads: int,
    file_of: Callable[[Tensor], MappedFile | None],
    progress: Progress | None,
) -> NativeWeights:
    total = sum(tensors[name].data.nbytes for name in program.weights)
    done = 0
    weights: NativeWeights = {}
    for name, shape in program.weights.items():
        tensor = tensors[name]
        if len(shape) == 1:
            weights[name] = tensor_values(tensor)
        else:
            weights[name] = _matrix(tensor, threads, file_of(tensor))
        done += tensor.data.nbytes
        if progress is not None:
            progress(done, total)
    return weights


def _matrix(tensor: Tensor, threads: int, file: MappedFile | None) -> Weight:
    data = tensor.data
    if file is None and tensor.type.is_float and data.ctypes.data % tensor.type.block_bytes:
        data = data.copy()  # used where it lies, which may be anywhere
    return Weight(
        tensor.type.value,
        tensor.rows,
        tensor.columns,
        data,
        interleaved_head_dim=tensor.interleaved_head_dim,
        threads=threads,
        drop_source=file is not None,
        copy=file is not None,
    )
