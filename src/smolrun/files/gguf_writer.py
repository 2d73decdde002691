"""A writer of GGUF files, version 3: the header at once, then the tensors piece by piece.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import numpy as np

from smolrun.files.gguf import (
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    MIN_ALIGNMENT,
    SCALARS,
    STRING_ID,
    GgufFile,
    padded,
)
from smolrun.files.output import Buffer, OutputFile, atomic_output, bytes_of
from smolrun.quant.types import WeightType

__all__ = ["Buffer", "GgufWriter", "Metadata", "TensorInfo", "TypedValue", "metadata_of"]

_VERSION = 3
_SCALAR_IDS = {name: (type_id, dtype) for type_id, (name, dtype) in SCALARS.items()}


class TypedValue(NamedTuple):
    """A metadata value and how it is stored, in the words of `GgufFile.types`."""

    type: str  # "u32", "f32", "bool", "string", ..., or one of them with "[]"
    value: object


Metadata = Mapping[str, TypedValue]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that is to be written."""

    name: str  # as GGUF spells it: "blk.0.attn_q.weight"
    type: WeightType
    shape: tuple[int, ...]  # (out, in) for a matrix, (width,) for a vector

    @property
    def nbytes(self) -> int:
        """Bytes of its data; ValueError where blocks of the type do not fill a row."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


class GgufWriter:
    """A GGUF file that appears under its name once it is whole.

        with GgufWriter(path, metadata, tensors) as writer:
            for piece in pieces:  # of all tensors, in the order of `tensors`
                writer.write(piece)

    Making the writer touches no disk: `file_bytes` serves a dry run. Entering it finds out whether
    the disk has room. Where the block fails, or ends before all tensors are complete, nothing is
    left and what stood at `path` is unchanged.

    Args:
        path: the file to be.
        metadata: keys in the order to be written; general.alignment, where given, is obeyed.
        tensors: in the order of their data.

    Raises:
        ValueError: something that GGUF can not hold: a name twice or too long, an unknown value
            type, a value outside its type's range, a row that blocks do not fill.
        OutputError: the file can not be written (from entering, `write` and leaving).
    """

    def __init__(self, path: str | Path, metadata: Metadata, tensors: Sequence[TensorInfo]) -> None:
        self.path = Path(path)
        self.alignment = _alignment(metadata)
        self.tensors = list(tensors)
        self._header, offsets_end = _header(metadata, self.tensors, self.alignment)
        self.file_bytes = len(self._header) + offsets_end
        self._sizes = [tensor.nbytes for tensor in self.tensors]
        self._index = 0  # of the tensor that is being written
        self._done = 0  # bytes of it
        self._stack = contextlib.ExitStack()
        self._output: OutputFile | None = None

    def __enter__(self) -> GgufWriter:
        self._output = self._stack.enter_context(atomic_output(self.path, self.file_bytes))
        try:
            self._output.write(self._header)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, data: Buffer) -> None:
        """Append bytes of the tensor whose turn it is; ValueError where they run past its end."""
        view = bytes_of(data)
        if not len(view):
            return
        if self._output is None or self._index == len(self.tensors):
            raise ValueError(f"{self.path}: {len(view)} bytes, but no tensor is to be written")
        size = self._sizes[self._index]
        if self._done + len(view) > size:
            raise ValueError(
                f"{self.path}: {self.tensors[self._index].name} has {size} bytes, "
                f"{self._done + len(view)} were given"
            )
        self._output.write(view)
        self._done += len(view)
        if self._done == size:
            if rest := padded(size, self.alignment) - size:
                self._output.write(bytes(rest))
            self._index, self._done = self._index + 1, 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._index < len(self.tensors):
            error = ValueError(
                f"{self.path}: {self._done} of {self._sizes[self._index]} bytes of "
                f"{self.tensors[self._index].name} were given"
            )
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, traceback)


def metadata_of(file: GgufFile) -> dict[str, TypedValue]:
    """The metadata of a file that was read, ready to be written again."""
    return {key: TypedValue(file.types[key], value) for key, value in file.metadata.items()}


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    kind, value = metadata.get(key, TypedValue("u32", DEFAULT_ALIGNMENT))
    known = isinstance(value, int) and MIN_ALIGNMENT <= value <= MAX_ALIGNMENT
    if kind != "u32" or not known or value & (value - 1):  # type: ignore[operator]
        raise ValueError(
            f"{key}: expected a u32, a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}, "
            f"found {value!r} of type {kind}"
        )
    return cast(int, value)


def _header(metadata: Metadata, tensors: Sequence[TensorInfo], alignment: int) -> tuple[bytes, int]:
    """Everything before the data, padded; bytes of the data."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, typed in metadata.items():
        parts.append(_string(key, f"metadata key {key!r}", MAX_KEY_BYTES))
        parts.append(_value(key, typed))
    names: set[str] = set()
    offset = 0
    for tensor in tensors:
        field = f"tensor {tensor.name!r}"
        if tensor.name in names:
            raise ValueError(f"{field}: the name stands twice")
        names.add(tensor.name)
        if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or min(tensor.shape) < 1:
            raise ValueError(
                f"{field}: expected 1 to {MAX_DIMENSIONS} dimensions, each at least 1, "
                f"found {tensor.shape}"
            )
        parts.append(_string(tensor.name, field, MAX_NAME_BYTES))
        # GGUF lists the length of a row first.
        sizes = tuple(reversed(tensor.shape))
        parts.append(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        parts.append(struct.pack("<IQ", tensor.type.ggml_id, offset))
        offset += padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header)), offset


def _string(text: str, field: str, limit: int) -> bytes:
    data = text.encode()
    if not data or len(data) > limit:
        raise ValueError(f"{field}: expected 1 to {limit} bytes, found {len(data)}")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, typed: TypedValue) -> bytes:
    """Type and value, as they stand after the key."""
    kind, value = typed
    element = kind.removesuffix("[]")
    if element != "string" and element not in _SCALAR_IDS:
        raise ValueError(f"metadata {key!r}: there is no value type {kind!r}")
    element_id = STRING_ID if element == "string" else _SCALAR_IDS[element][0]
    try:
        if element == kind:
            return struct.pack("<I", element_id) + _elements(element, [value])
        values = list(cast("Iterable[object]", value))
        start = struct.pack("<IIQ", ARRAY_ID, element_id, len(values))
        return start + _elements(element, values)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"metadata {key!r}: no {kind}: {error}") from error


def _elements(element: str, values: list[Any]) -> bytes:
    if element == "string":
        encoded = [value.encode() for value in values]
        return b"".join([part for data in encoded for part in (struct.pack("<Q", len(data)), data)])
    dtype = _SCALAR_IDS[element][1]
    exact = element in ("f32", "f64")
    if element == "bool" and any(not isinstance(value, bool) for value in values):
        raise ValueError("expected true or false")
    if not exact and any(not isinstance(value, (int, np.integer)) for value in values):
        raise ValueError("expected whole numbers")
    # Out of range, NumPy 2 raises OverflowError; NumPy 1 wraps, so the result is compared.
    stored = np.array(values, dtype)
    if not exact and stored.tolist() != [int(value) for value in values]:
        raise ValueError("a number is out of range")
    return stored.tobytes()
