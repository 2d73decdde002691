"""Weights made ready for the native kernels, beside whatever else a load has to do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import numpy as np
import numpy.typing as npt

from smolrun._core import Packing, Weight
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.mapping import MappedFile
from smolrun.model.program import Program
from smolrun.quant.blocks import tensor_values
from smolrun.quant.tensor import Tensor

NativeWeights = dict[str, Weight | npt.NDArray[np.float32]]
Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_ALL = 1 << 62  # chunks
_CHUNKS_BETWEEN_REPORTS = 16  # of about 1 MiB


class WeightLoading:
    """The weights of a listing on their way: matrices become Weight, vectors float32 arrays.

    Matrices are packed into huge pages, from which they are read up to a third faster than from the
    file's own. The memory of what is packed is given back meanwhile, so that there are never two
    copies: the peak is the size of the weights and a few megabytes.

    With `as_codes`, F16 and BF16 are rounded to integers, as products with fast activations want
    them: within 2^-12 of the largest of 512 neighbours in a row.

    All but one of `threads` begin at once, and the caller's thread joins them in `finish`: between
    the two, it can build a tokenizer. Leaving the `with` block ends what is still under way; the
    checkpoint may be closed afterwards.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        program: Program,
        threads: int,
        file_of: Callable[[Tensor], MappedFile | None],
        consumed: Mapping[str, Tensor],
        as_codes: bool,
    ) -> None:
        tensors = {**tensors, **consumed}
        self._matrices = [name for name, shape in program.weights.items() if len(shape) > 1]
        self._vectors = {
            name: tensor_values(tensors[name])
            for name, shape in program.weights.items()
            if len(shape) == 1
        }
        self._total = sum(tensors[name].data.nbytes for name in program.weights)
        self._packing = Packing(
            [
                _source(tensors[name], file_of(tensors[name]), name in consumed)
                for name in self._matrices
            ],
            as_codes,
        )
        self._helpers: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError):  # of helpers that the system refuses: do without
            for _ in range(min(threads, len(self._matrices)) - 1):
                helper = threading.Thread(target=self._packing.work, args=(_ALL,), daemon=True)
                helper.start()
                self._helpers.append(helper)

    @classmethod
    def from_file(
        cls, checkpoint: Checkpoint, program: Program, threads: int, *, as_codes: bool = False
    ) -> WeightLoading:
        """Begin with the weights of a checkpoint. Converted matrices are taken out of it."""
        converted = {
            name: checkpoint.tensors.pop(name)
            for name, shape in program.weights.items()
            if len(shape) > 1 and checkpoint.file_of(checkpoint.tensors[name]) is None
        }
        return cls(checkpoint.tensors, program, threads, checkpoint.file_of, converted, as_codes)

    @classmethod
    def from_memory(
        cls,
        tensors: Mapping[str, Tensor],
        program: Program,
        threads: int,
        *,
        as_codes: bool = False,
    ) -> WeightLoading:
        """Begin with tensors that lie in no file, such as random ones."""
        return cls(tensors, program, threads, lambda tensor: None, {}, as_codes)

    def finish(self, progress: Progress | None = None) -> NativeWeights:
        """Pack what is left, and return the weights by canonical name."""
        ended = False
        while not ended:
            ended = self._packing.work(_CHUNKS_BETWEEN_REPORTS)
            if progress is not None and not ended:
                progress(self._packing.bytes_done, self._total)
        self._join()
        if progress is not None:
            progress(self._total, self._total)
        return {**dict(zip(self._matrices, self._packing.weights(), strict=True)), **self._vectors}

    def __enter__(self) -> WeightLoading:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._packing.stop()
        self._join()

    def _join(self) -> None:
        for helper in self._helpers:
            helper.join()


def weight_of(tensor: Tensor) -> Weight:
    """One matrix that lies in no file, packed on this thread."""
    return Weight(*_source(tensor, None, consumed=False))


def _source(
    tensor: Tensor, file: MappedFile | None, consumed: bool
) -> tuple[str, int, int, npt.NDArray[np.uint8], int, bool, bool]:
    """The arguments of a Weight."""
    return (
        tensor.type.value,
        tensor.rows,
        tensor.columns,
        tensor.data,
        tensor.interleaved_head_dim,
        file is not None,
        consumed,
    )
