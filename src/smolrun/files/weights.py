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

    Float matrices are used where they lie in the file. Quantized ones are packed into memory of the
    same size, and the file's pages are given back as they are packed, so that memory never holds
    two copies: the peak is the size of the files and a few megabytes. The checkpoint may be closed
    afterwards. `threads` share the packing of one matrix.
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
    aligned = not tensor.type.is_float or data.ctypes.data % tensor.type.block_bytes == 0
    if not aligned:  # the header of a safetensors file may have any length
        data = data.copy()
    weight = Weight(
        tensor.type.value,
        tensor.rows,
        tensor.columns,
        data,
        interleaved_head_dim=tensor.interleaved_head_dim,
        threads=threads,
        drop_source=aligned and file is not None,
    )
    if file is not None and not aligned:
        file.drop(tensor.data)
    return weight
