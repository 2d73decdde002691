"""Models from one kind of file to the other: safetensors folders to GGUF, GGUF to folders.

Tensors are read, turned and written in pieces, so that memory holds a few megabytes of them at a
time, whatever the model's size. Nothing appears under the target's name before it is whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError, OutputError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.dtypes import rounded
from smolrun.files.folder_files import dtype_name, folder_files
from smolrun.files.gguf_metadata import gguf_metadata
from smolrun.files.gguf_names import gguf_name, interleaved_rows, is_interleaved
from smolrun.files.gguf_writer import GgufWriter, TensorInfo
from smolrun.files.mapping import read_small_file
from smolrun.files.output import atomic_folder, atomic_output
from smolrun.files.safetensors_writer import (
    MAX_SHARD_BYTES,
    SafetensorsInfo,
    safetensors_header,
    shards,
)
from smolrun.files.tokenizer_data import MAX_TOKENIZER_JSON_BYTES
from smolrun.model.llama import build
from smolrun.quant.blocks import dequantize, source_rows
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

logger = logging.getLogger("smolrun")

Progress = Callable[[int, int], None]
"""Called with the bytes of weights written and the bytes in all."""

# general.file_type of GGUF.
_FILE_TYPES = {WeightType.F32: 0, WeightType.F16: 1, WeightType.BF16: 32}

# Weights turned at a time: bounds the memory for them to some 20 MB.
_CHUNK = 1 << 20

# What a model's folder may hold of its small files, besides weights.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_COPIED = (*_SMALL_FILES, "README.md", "LICENSE")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: Path  # a .gguf, or a folder
    dtype: WeightType  # of the matrices; where they differ, of most weights
    nbytes: int  # of the GGUF file, or of the safetensors


def convert_files(
    source: str | Path,
    target: str | Path,
    weight_type: WeightType | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Checkpoint], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Converted:
    """Write a model as a GGUF file (a target that ends in .gguf) or as a safetensors folder.

    Weights are float in either. Norms and biases of a GGUF file are F32, as every program expects;
    in a folder they take the type of the matrices where it holds them exactly.

    Args:
        source: a model as `open_checkpoint` takes it.
        target: the .gguf file or the folder to write.
        weight_type: F32, F16 or BF16, of matrices; None: as stored, and F32 for quantized ones,
            which it holds exactly.
        overwrite: replace what is there: the file, or the model's files in the folder.
        progress: told how far the writing is.
        check: called with the open model before anything is written; raises to refuse it.
        max_shard_bytes: of a safetensors file; a larger model is cut into several.

    Raises:
        ModelFormatError, UnsupportedError: the source is damaged, has a weight that is not finite
            or too large for the type, or asks for what the target's format can not say.
        OutputError: the target is there already, or can not be written.
        ValueError: a type that is not float.
    """
    if weight_type is not None and not weight_type.is_float:
        raise ValueError(f"weight_type: expected F32, F16 or BF16, found {weight_type.value}")
    target = Path(target)
    if target.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth"):
        raise OutputError(f"{target}: name a folder for safetensors, or a file that ends in .gguf")
    if target.exists() and not overwrite and not _is_empty_folder(target):
        raise OutputError(f"{target}: is there already; --force replaces it")
    checkpoint = open_checkpoint(source)
    try:
        if check is not None:
            check(checkpoint)
        to_gguf = target.suffix.lower() == ".gguf"
        write = _write_gguf if to_gguf else _write_folder
        return write(checkpoint, target, weight_type, progress, max_shard_bytes)
    finally:
        checkpoint.close()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _matrix_type(tensor: Tensor, weight_type: WeightType | None) -> WeightType:
    """What a matrix is written as."""
    if weight_type is not None:
        return weight_type
    return tensor.type if tensor.type.is_float else WeightType.F32


def _main_type(checkpoint: Checkpoint, weight_type: WeightType | None) -> WeightType:
    """What most weights are written as."""
    weights = dict.fromkeys(_FILE_TYPES, 0)
    for tensor in checkpoint.tensors.values():
        weights[_matrix_type(tensor, weight_type)] += tensor.rows * tensor.columns
    return max(weights, key=lambda kind: weights[kind])


def _write_gguf(
    checkpoint: Checkpoint,
    target: Path,
    weight_type: WeightType | None,
    progress: Progress | None,
    _: int,
) -> Converted:
    main_type = _main_type(checkpoint, weight_type)
    # In the order of the listing, in which a model is read.
    tensors = [checkpoint.tensors[name] for name in build(checkpoint.config).weights]
    infos = [
        TensorInfo(
            gguf_name(tensor.name),
            WeightType.F32 if len(tensor.shape) == 1 else _matrix_type(tensor, weight_type),
            tensor.shape,
        )
        for tensor in tensors
    ]
    metadata = gguf_metadata(checkpoint, _FILE_TYPES[main_type])
    with GgufWriter(target, metadata, infos) as writer:
        done = _Done(sum(info.nbytes for info in infos), progress)
        for tensor, info in zip(tensors, infos, strict=True):
            for piece in _pieces(checkpoint, tensor, info.type, gguf_order(checkpoint, tensor)):
                writer.write(piece)
                done.add(piece.nbytes)
    return Converted(target, main_type, writer.file_bytes)


def gguf_order(checkpoint: Checkpoint, tensor: Tensor) -> npt.NDArray[np.intp] | None:
    """For each row to be stored, the row of the source; None where they stand as they are."""
    if not is_interleaved(tensor.name) or tensor.interleaved_head_dim:
        return None
    return interleaved_rows(tensor.shape[0], checkpoint.config.head_dim)


def _write_folder(
    checkpoint: Checkpoint,
    target: Path,
    weight_type: WeightType | None,
    progress: Progress | None,
    max_shard_bytes: int,
) -> Converted:
    main_type = _main_type(checkpoint, weight_type)
    infos = [
        SafetensorsInfo(name, _folder_type(tensor, weight_type, main_type), tensor.shape)
        for name, tensor in sorted(checkpoint.tensors.items())
    ]
    if checkpoint.format == "gguf":
        small_files = folder_files(checkpoint, main_type)
    else:
        small_files = _copied_files(checkpoint, main_type)
    if (target / "README.md").exists():
        small_files.pop("README.md", None)  # someone's own words
    files = shards(infos, max_shard_bytes)
    nbytes = sum(info.nbytes for info in infos)
    done = _Done(nbytes, progress)
    if len(files) > 1:
        weight_map = {info.name: file for file, held in files.items() for info in held}
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        small_files["model.safetensors.index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    room = nbytes + sum(map(len, small_files.values())) + (1 << 20)
    with atomic_folder(target, room, _belongs_to_a_model) as folder:
        for name, content in small_files.items():
            with atomic_output(folder / name) as output:
                output.write(content)
        for file, held in files.items():
            with atomic_output(folder / file) as output:
                output.write(safetensors_header(held))
                for info in held:
                    tensor = checkpoint.tensors[info.name]
                    for piece in _pieces(checkpoint, tensor, info.type, _folder_order(tensor)):
                        output.write(piece)
                        done.add(piece.nbytes)
    return Converted(target, main_type, nbytes)


def _belongs_to_a_model(name: str) -> bool:
    """Whether a file of this name, left behind, would be taken for a part of the new model."""
    return name in _SMALL_FILES or name.endswith((".safetensors", ".safetensors.index.json"))


def _folder_type(
    tensor: Tensor, weight_type: WeightType | None, main_type: WeightType
) -> WeightType:
    if len(tensor.shape) > 1:
        return _matrix_type(tensor, weight_type)
    return main_type if _holds_exactly(tensor, main_type) else WeightType.F32


def _holds_exactly(tensor: Tensor, target: WeightType) -> bool:
    """Whether a float type has every value of a vector."""
    values = dequantize(tensor.data, tensor.type, tensor.columns).reshape(-1)
    try:
        stored = rounded(values, target, tensor.origin)
    except ModelFormatError:
        return False
    back = dequantize(stored, target, tensor.columns).reshape(-1)
    return np.array_equal(back, values)


def _folder_order(tensor: Tensor) -> npt.NDArray[np.intp] | None:
    if not tensor.interleaved_head_dim:
        return None
    return source_rows(tensor.rows, tensor.interleaved_head_dim)


def _copied_files(checkpoint: Checkpoint, dtype: WeightType) -> dict[str, bytes]:
    """The small files of a folder, which stay as they are but for the type in config.json."""
    files = {}
    for name in _COPIED:
        content = read_small_file(checkpoint.folder / name, MAX_TOKENIZER_JSON_BYTES)
        if content is not None:
            files[name] = content
    config = {**checkpoint.metadata}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _pieces(
    checkpoint: Checkpoint,
    tensor: Tensor,
    target: WeightType,
    order: npt.NDArray[np.intp] | None,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor in another type and order of rows, some rows at a time.

    The file's pages are given back as they have been read. ModelFormatError where a weight is not
    finite, or too large for the type.
    """
    # A vector whose elements change places is a matrix of one column.
    moved = order is not None and len(tensor.shape) == 1
    rows, columns = (tensor.shape[0], 1) if moved else (tensor.rows, tensor.columns)
    file = checkpoint.file_of(tensor)
    data = tensor.data.reshape(rows, -1)
    step = max(1, _CHUNK // columns)
    for begin in range(0, rows, step):
        chosen = slice(begin, begin + step) if order is None else order[begin : begin + step]
        block = np.ascontiguousarray(data[chosen]).reshape(-1)
        yield _recoded(block, tensor, columns, target)
        if file is not None and order is None:
            file.drop(block)
    if file is not None:
        file.drop(tensor.data)


def _recoded(
    block: npt.NDArray[np.uint8], tensor: Tensor, columns: int, target: WeightType
) -> npt.NDArray[np.uint8]:
    values = dequantize(block, tensor.type, columns).reshape(-1)
    finite = np.isfinite(values)
    if not finite.all():
        raise ModelFormatError(
            f"{tensor.origin}: {np.count_nonzero(~finite)} of {values.size} weights looked at are "
            f"not finite (the first is {values[~finite][0]}); the file is damaged, or its training "
            "failed: fetch it again, or take another"
        )
    return block if tensor.type is target else rounded(values, target, tensor.origin)


class _Done:
    """Counts what is written and tells."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
