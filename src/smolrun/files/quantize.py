"""Models into smaller weight types: any model that can be opened, to a GGUF file.

Weights are read, quantized by several threads and written in pieces, so that memory holds a few
megabytes of them at a time. Nothing appears under the target's name before it is whole.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError, OutputError, RequestError, UnsupportedError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.convert import Progress, gguf_order
from smolrun.files.gguf_metadata import QUANTIZATION_VERSION, gguf_metadata
from smolrun.files.gguf_names import gguf_name
from smolrun.files.gguf_writer import GgufWriter, TensorInfo, TypedValue
from smolrun.files.imatrix import ImportanceMatrix
from smolrun.model.llama import build
from smolrun.quant.blocks import Bytes, Floats, dequantize
from smolrun.quant.mixes import MIXES, Mix, choose_types
from smolrun.quant.native import quantize
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

# Keys of our own in the file.
_OWN = "smolrun.quantize."

_TYPE_NAMES = {*MIXES, *(weight_type.value for weight_type in WeightType)}

# Weights that a thread takes at a time: some 10 MB with everything that is made of them.
_CHUNK = 1 << 19


@dataclass(frozen=True)
class Substitution:
    """A weight that could not be stored as it should have been. The name is GGUF's."""

    name: str
    columns: int  # which the blocks of `wanted` do not fill
    wanted: WeightType
    type: WeightType


@dataclass(frozen=True)
class Quantized:
    """What was made, or would be."""

    path: Path
    mix: str
    nbytes: int  # of the file
    weights: int
    bits_per_weight: float  # of all weights, scales and vectors included
    types: Mapping[str, int]  # weights by type, the most first
    substitutions: tuple[Substitution, ...]
    requantized: int  # matrices whose source had been quantized already
    without_importance: tuple[str, ...]  # matrices that an importance matrix says nothing of


def quantize_files(
    source: str | Path,
    target: str | Path | None,
    mix: Mix,
    *,
    overrides: Sequence[tuple[str, WeightType]] = (),
    importance: ImportanceMatrix | None = None,
    importance_name: str = "",
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = 1,
    progress: Progress | None = None,
) -> Quantized:
    """Write a model as a GGUF file of smaller weights.

    Args:
        source: a model as `open_checkpoint` takes it; one that is quantized is dequantized first.
        target: the .gguf file to write; None: NAME.MIX.gguf in the working folder.
        mix: which weight gets which type.
        overrides: regular expressions of GGUF names, and types that come before the mix.
        importance: of columns; errors count by it.
        importance_name: what the file says it came from.
        strict: refuse where a weight can not take its type.
        overwrite: replace what is there.
        dry_run: write nothing.
        threads: how many quantize at a time.
        progress: told how far the writing is.

    Raises:
        ModelFormatError, UnsupportedError: the source is damaged, has a weight that is not finite
            or too large, or `strict` refuses.
        RequestError: importance of another model; an override that is found in no name.
        OutputError: the target is there already, or can not be written.
    """
    checkpoint = open_checkpoint(source)
    try:
        path = default_target(checkpoint, mix) if target is None else Path(target)
        if path.exists() and not (overwrite or dry_run):
            raise OutputError(f"{path}: is there already; --force replaces it")
        job = _Job(checkpoint, mix, overrides, importance)
        if strict and job.substitutions:
            first = job.substitutions[0]
            raise UnsupportedError(
                f"{checkpoint.path}: {len(job.substitutions)} weights can not be stored as "
                f"{mix.name} would have it, {first.name} for one: rows of {first.columns} are not "
                f"whole blocks of {first.wanted.value}; without --strict it becomes "
                f"{first.type.value}"
            )
        writer = GgufWriter(path, job.metadata(importance_name), job.infos)
        if not dry_run:
            with writer, ThreadPoolExecutor(threads) as pool:
                done, total = 0, sum(info.nbytes for info in job.infos)
                for piece in job.pieces(pool, 2 * threads):
                    writer.write(piece)
                    done += piece.nbytes
                    if progress is not None:
                        progress(done, total)
        return job.report(path, writer.file_bytes)
    finally:
        checkpoint.close()


def default_target(checkpoint: Checkpoint, mix: Mix) -> Path:
    """NAME.MIX.gguf in the working folder; a type at the end of the source's name goes."""
    name = checkpoint.path.name.removesuffix(".gguf").removesuffix(".safetensors")
    if name == "model" and checkpoint.format == "safetensors":
        name = checkpoint.path.resolve().parent.name
    stem, dot, ending = name.rpartition(".")
    if dot and ending.upper() in _TYPE_NAMES:
        name = stem
    return Path(f"{name or 'model'}.{mix.name}.gguf")


class _Job:
    """A model, and what becomes of each of its tensors."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        mix: Mix,
        overrides: Sequence[tuple[str, WeightType]],
        importance: ImportanceMatrix | None,
    ) -> None:
        self.checkpoint, self.mix = checkpoint, mix
        self.matrix = importance
        config = checkpoint.config
        # In the order of the listing, in which a model is read.
        self.tensors = [checkpoint.tensors[name] for name in build(config).weights]
        self.choices = choose_types(
            mix,
            {tensor.name: tensor.shape for tensor in self.tensors},
            config.num_attention_heads // config.num_key_value_heads,
            importance=importance is not None,
            overrides=overrides,
            names={tensor.name: gguf_name(tensor.name) for tensor in self.tensors},
        )
        self._check_found(overrides)
        self.infos = [
            TensorInfo(gguf_name(t.name), self.choices[t.name].type, t.shape) for t in self.tensors
        ]
        self.importance = self._importance()
        self.substitutions = tuple(
            Substitution(info.name, tensor.columns, choice.wanted, choice.type)
            for info, tensor, choice in zip(
                self.infos, self.tensors, self.choices.values(), strict=True
            )
            if choice.wanted is not choice.type
        )

    def _check_found(self, overrides: Sequence[tuple[str, WeightType]]) -> None:
        """Raise RequestError for a pattern that stands for no matrix, as a misspelt one does."""
        names = [gguf_name(tensor.name) for tensor in self.tensors if tensor.shape[1:]]
        for pattern, _ in overrides:
            if not any(re.search(pattern, name) for name in names):
                raise RequestError(
                    f"tensor type: {pattern!r} is found in no name of a matrix; they are named "
                    f"{names[1]} and the like"
                )

    def _importance(self) -> dict[str, Floats]:
        """Of the columns of matrices that it is known of, by GGUF name."""
        found = {}
        for info in self.infos:
            values = self.matrix.importance(info.name) if self.matrix is not None else None
            if values is None or len(info.shape) == 1:
                continue
            if values.size != info.shape[-1]:
                raise RequestError(
                    f"importance of {info.name}: {values.size} columns, the weight has "
                    f"{info.shape[-1]}; it was made for another model"
                )
            found[info.name] = values
        if self.matrix is not None and not found:
            raise RequestError("importance: names no weight of this model")
        return found

    def metadata(self, importance_name: str) -> dict[str, TypedValue]:
        """The source's, and what was done."""
        metadata = gguf_metadata(self.checkpoint, self.mix.file_type)
        metadata["general.quantization_version"] = TypedValue("u32", QUANTIZATION_VERSION)
        for key in [key for key in metadata if key.startswith(("quantize.", _OWN))]:
            del metadata[key]  # of an earlier quantization
        metadata[_OWN + "type"] = TypedValue("string", self.mix.name)
        metadata[_OWN + "bits_per_weight"] = TypedValue("f32", self._bits_per_weight())
        metadata[_OWN + "substitutions"] = TypedValue(
            "string[]",
            [f"{s.name}: {s.wanted.value} -> {s.type.value}" for s in self.substitutions],
        )
        if self.matrix is not None:
            metadata["quantize.imatrix.file"] = TypedValue("string", importance_name)
            metadata["quantize.imatrix.dataset"] = TypedValue(
                "string", ", ".join(self.matrix.datasets)
            )
            metadata["quantize.imatrix.entries_count"] = TypedValue("u32", len(self.matrix.sums))
            metadata["quantize.imatrix.chunks_count"] = TypedValue("u32", self.matrix.chunk_count)
        return metadata

    def _bits_per_weight(self) -> float:
        weights = sum(tensor.rows * tensor.columns for tensor in self.tensors)
        return 8 * sum(info.nbytes for info in self.infos) / weights

    def report(self, path: Path, nbytes: int) -> Quantized:
        """What was made."""
        types: Counter[str] = Counter()
        for tensor, info in zip(self.tensors, self.infos, strict=True):
            types[info.type.value] += tensor.rows * tensor.columns
        matrices = [(t, i) for t, i in zip(self.tensors, self.infos, strict=True) if i.shape[1:]]
        return Quantized(
            path,
            self.mix.name,
            nbytes,
            sum(types.values()),
            self._bits_per_weight(),
            dict(types.most_common()),
            self.substitutions,
            sum(not t.type.is_float and t.type is not i.type for t, i in matrices),
            tuple(
                info.name
                for _, info in matrices
                if self.matrix is not None and info.name not in self.importance
            ),
        )

    def pieces(self, pool: ThreadPoolExecutor, ahead: int) -> Iterator[Bytes]:
        """The bytes of all tensors in order, made by the pool, at most `ahead` of them waiting."""
        waiting: deque[Future[Bytes]] = deque()
        try:
            for tensor, info in zip(self.tensors, self.infos, strict=True):
                for work in self._chunks(tensor, info):
                    waiting.append(pool.submit(work))
                    if len(waiting) >= ahead:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _chunks(self, tensor: Tensor, info: TensorInfo) -> Iterator[_Chunk]:
        order = gguf_order(self.checkpoint, tensor)
        # A vector whose elements change places is a matrix of one column.
        moved = order is not None and len(tensor.shape) == 1
        rows, columns = (tensor.shape[0], 1) if moved else (tensor.rows, tensor.columns)
        step = max(1, _CHUNK // columns)
        importance = self.importance.get(info.name)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield _Chunk(
                self.checkpoint, tensor, info.type, rows, columns, begin, end, order, importance
            )


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a tensor, and what is to become of them."""

    checkpoint: Checkpoint
    tensor: Tensor
    type: WeightType
    rows: int  # of the whole tensor
    columns: int
    begin: int
    end: int
    order: npt.NDArray[np.intp] | None  # for each row to be stored, the row of the source
    importance: Floats | None

    def __call__(self) -> Bytes:
        """Their bytes in the new type; ModelFormatError names the tensor."""
        data = self.tensor.data.reshape(self.rows, -1)
        chosen = (
            slice(self.begin, self.end) if self.order is None else self.order[self.begin : self.end]
        )
        block = np.ascontiguousarray(data[chosen])
        try:
            if self.type is self.tensor.type and not self.type.is_float:
                self._check(dequantize(block, self.type, self.columns))
                made: Bytes = block.copy()
                return made
            made = quantize(block, self.tensor.type, self.columns, self.type, self.importance)
        except ValueError as error:
            self._check(dequantize(block, self.tensor.type, self.columns))
            raise ModelFormatError(f"{self.tensor.origin}: {error}") from error
        file = self.checkpoint.file_of(self.tensor)
        if file is not None and self.order is None:
            file.drop(block.reshape(-1))  # its pages have been read
        return made

    def _check(self, values: Floats) -> None:
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise ModelFormatError(
                f"{self.tensor.origin}: {len(bad)} of {values.size} weights looked at are not "
                f"finite (row {self.begin + row}, column {column}: {values[row, column]}); the "
                "file is damaged, or its training failed: fetch it again, or take another"
            )
