"""A reader of GGUF files, versions 2 and 3, that trusts nothing in them.

Every count and size is compared with what is left of the file before anything is allocated, and
the tensors must fill their part of the file without hole or overlap.
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.mapping import MappedFile, shown
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

# Far above any model that smolrun runs (33 keys, 326 tensors, 280,147 merges), low enough that a
# hostile header stays cheap.
MAX_METADATA_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_ARRAY_ELEMENTS = 1 << 20
MAX_STRING_BYTES = 32 << 20  # some files carry a whole tokenizer.json in one string
MAX_ARRAY_STRING_BYTES = 65_536
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4
MIN_ALIGNMENT, DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 8, 32, 65_536

# Least bytes of a metadata entry (key length, 1 byte key, type, 1 byte value) and of a tensor
# entry (name length, 1 byte name, dimensions, one size, type, offset).
_MIN_ENTRY_BYTES = 14
_MIN_TENSOR_ENTRY_BYTES = 33

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
STRING_ID, ARRAY_ID = 8, 9
# Value type id: (name, how it is stored)
SCALARS: dict[int, tuple[str, np.dtype[np.generic]]] = {
    0: ("u8", np.dtype("<u1")),
    1: ("i8", np.dtype("<i1")),
    2: ("u16", np.dtype("<u2")),
    3: ("i16", np.dtype("<i2")),
    4: ("u32", np.dtype("<u4")),
    5: ("i32", np.dtype("<i4")),
    6: ("f32", np.dtype("<f4")),
    7: ("bool", np.dtype("<u1")),
    10: ("u64", np.dtype("<u8")),
    11: ("i64", np.dtype("<i8")),
    12: ("f64", np.dtype("<f8")),
}

# Tensor types of GGUF that smolrun does not run, by id.
_FOREIGN_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}


class GgufFile:
    """A GGUF file: its metadata, and its tensors as views of the mapped bytes."""

    path: Path
    version: int
    metadata: dict[str, object]  # scalars, strings, and lists of them
    types: dict[str, str]  # key: type as stored, e.g. "u32", "string", "string[]"
    tensors: dict[str, Tensor]  # by GGUF name, shapes as (out, in)
    file: MappedFile

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map and check the file: ModelNotFoundError, ModelFormatError or UnsupportedError."""
        opened = cls()
        opened.path = Path(path)
        opened.file = MappedFile(opened.path)
        try:
            _Parser(opened).parse()
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Forget the tensors and unmap once nothing views the file."""
        self.tensors = {}
        self.file.close()


@dataclass(frozen=True)
class _TensorEntry:
    name: str
    type: WeightType
    shape: tuple[int, ...]  # (out, in)
    offset: int  # from the start of the data section
    nbytes: int


class _Parser:
    def __init__(self, opened: GgufFile) -> None:
        self.opened = opened
        self.bytes = opened.file.bytes
        self.buffer = opened.file.bytes.data
        self.size = opened.file.size
        self.position = 0

    def fail(self, field: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.opened.path}: {field}: {problem}")

    # -- primitive values ---------------------------------------------------------------------

    def need(self, nbytes: int, field: str) -> int:
        """Claim the next `nbytes` bytes and return where they start."""
        start = self.position
        if nbytes > self.size - start:
            self.fail(
                field,
                f"needs {nbytes} bytes at byte {start}, the file ends at {self.size}; "
                "the file is cut short or damaged, download it again",
            )
        self.position = start + nbytes
        return start

    def u32(self, field: str) -> int:
        value: int = _U32.unpack_from(self.buffer, self.need(4, field))[0]
        return value

    def u64(self, field: str) -> int:
        value: int = _U64.unpack_from(self.buffer, self.need(8, field))[0]
        return value

    def string(self, field: str, limit: int) -> str:
        length = self.u64(f"length of {field}")
        if length > limit:
            self.fail(field, f"a string of {length} bytes, expected at most {limit}")
        start = self.need(length, field)
        return self.decode(start, start + length, field)

    def decode(self, start: int, end: int, field: str) -> str:
        try:
            return str(self.buffer[start:end], "utf-8")
        except UnicodeDecodeError as error:
            value = bytes(self.buffer[start : min(end, start + 64)])
            self.fail(field, f"byte {error.start} is not UTF-8 in {shown(value)}")

    def check_count(self, field: str, count: int, limit: int, least_bytes: int) -> None:
        """Refuse a count of things of `least_bytes` each that the rest of the file can not hold."""
        left = self.size - self.position
        if count > left // least_bytes:
            self.fail(field, f"{count} do not fit the {left} bytes left of the file")
        if count > limit:
            self.fail(field, f"{count}, expected at most {limit}")

    # -- metadata -----------------------------------------------------------------------------

    def value(self, key: str, type_id: int) -> tuple[str, object]:
        """The type's name and the value."""
        field = f"metadata {shown(key)}"
        if type_id == STRING_ID:
            return "string", self.string(field, MAX_STRING_BYTES)
        if type_id == ARRAY_ID:
            name, values = self.array(field)
            return f"{name}[]", values
        name, values = self.scalars(field, type_id, 1)
        return name, values[0]

    def scalars(self, field: str, type_id: int, count: int) -> tuple[str, list[object]]:
        if type_id not in SCALARS:
            self.fail(field, f"unknown value type {type_id}")
        name, dtype = SCALARS[type_id]
        start = self.need(count * dtype.itemsize, field)
        values: list[object] = np.frombuffer(self.buffer, dtype, count, start).tolist()
        if name == "bool":
            for value in values:
                if value not in (0, 1):
                    self.fail(field, f"expected a bool of 0 or 1, found {value}")
            values = [bool(value) for value in values]
        return name, values

    def array(self, field: str) -> tuple[str, Sequence[object]]:
        type_id = self.u32(f"element type of {field}")
        if type_id == ARRAY_ID:
            self.fail(field, "an array of arrays, which no model uses")
        if type_id != STRING_ID and type_id not in SCALARS:
            self.fail(field, f"unknown element type {type_id}")
        least = 8 if type_id == STRING_ID else SCALARS[type_id][1].itemsize
        count = self.u64(f"length of {field}")
        self.check_count(f"length of {field}", count, MAX_ARRAY_ELEMENTS, least)
        if type_id == STRING_ID:
            return "string", self.strings(field, count)
        return self.scalars(field, type_id, count)

    def strings(self, field: str, count: int) -> list[str]:
        # The hot part of opening a file: 408,403 strings in a SmolLM3. The walk from length to
        # length is a flat loop on purpose; the bytes are then decoded all at once.
        buffer, size, unpack = self.buffer, self.size, _U64.unpack_from
        position = self.position
        starts: list[int] = []  # of the strings' bytes
        append = starts.append
        for index in range(count):
            start = position + 8
            if start > size:
                self.position = position
                self.need(8, f"length of {field}[{index}]")
            length = unpack(buffer, position)[0]
            position = start + length
            if length > MAX_ARRAY_STRING_BYTES or position > size:
                self.position = start
                if length <= MAX_ARRAY_STRING_BYTES:
                    self.need(length, f"{field}[{index}]")
                self.fail(
                    f"{field}[{index}]",
                    f"a string of {length} bytes, expected at most {MAX_ARRAY_STRING_BYTES}",
                )
            append(start)
        self.position = position
        values = _decoded(self.bytes, starts, position)
        if values is None:
            ends = [start - 8 for start in starts[1:]] + [position]
            values = [
                self.decode(start, end, f"{field}[{index}]")
                for index, (start, end) in enumerate(zip(starts, ends, strict=True))
            ]
        return values

    def read_metadata(self, count: int) -> None:
        metadata, types = self.opened.metadata, self.opened.types
        for index in range(count):
            key = self.string(f"metadata key {index}", MAX_KEY_BYTES)
            if not key or "\0" in key:
                self.fail(f"metadata key {index}", f"expected a name, found {shown(key)}")
            if key in metadata:
                self.fail(f"metadata {shown(key)}", "the key stands twice")
            type_id = self.u32(f"type of metadata {shown(key)}")
            types[key], metadata[key] = self.value(key, type_id)

    # -- tensors ------------------------------------------------------------------------------

    def alignment(self) -> int:
        key = "general.alignment"
        alignment = self.opened.metadata.get(key, DEFAULT_ALIGNMENT)
        stored = self.opened.types.get(key, "u32")
        if stored != "u32" or not isinstance(alignment, int):
            self.fail(key, f"expected a u32, found {shown(alignment)} of type {stored}")
        if not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(
                key,
                f"expected a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}, "
                f"found {alignment}",
            )
        return alignment

    def read_tensor_entry(self, index: int) -> _TensorEntry:
        name = self.string(f"name of tensor {index}", MAX_NAME_BYTES)
        if not name or not name.isprintable():
            self.fail(f"name of tensor {index}", f"expected a name, found {shown(name)}")
        field = f"tensor {shown(name)}"
        dimensions = self.u32(f"{field}: number of dimensions")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self.fail(field, f"expected 1 to {MAX_DIMENSIONS} dimensions, found {dimensions}")
        sizes = [self.u64(f"{field}: sizes") for _ in range(dimensions)]
        for size in sizes:
            # No dimension can exceed the file's bits; products below are of unbounded integers.
            if not 1 <= size <= 8 * self.size:
                self.fail(field, f"a dimension of {size} in {sizes} in a file of {self.size} bytes")
        weight_type = self.weight_type(field, self.u32(f"{field}: type"))
        columns = sizes[0]
        rows = 1
        for size in sizes[1:]:
            rows *= size
        try:
            nbytes = rows * weight_type.row_bytes(columns)
        except ValueError as error:
            self.fail(field, str(error))
        offset = self.u64(f"{field}: offset")
        return _TensorEntry(name, weight_type, tuple(reversed(sizes)), offset, nbytes)

    def weight_type(self, field: str, type_id: int) -> WeightType:
        weight_type = WeightType.from_ggml_id(type_id)
        if weight_type is not None:
            return weight_type
        name = _FOREIGN_TYPES.get(type_id)
        if name is None:
            self.fail(field, f"type id {type_id} names no tensor type")
        raise UnsupportedError(
            f"{self.opened.path}: {field}: stored as {name}, which smolrun does not run; "
            "requantize the model (llama-quantize, for example to Q4_K_M) or fetch another file"
        )

    def read_tensors(self, count: int) -> None:
        alignment = self.alignment()
        entries: dict[str, _TensorEntry] = {}
        for index in range(count):
            entry = self.read_tensor_entry(index)
            if entry.name in entries:
                self.fail(f"tensor {shown(entry.name)}", "the name stands twice")
            entries[entry.name] = entry

        data_start = padded(self.position, alignment)
        expected_offset = 0
        for entry in entries.values():
            field = f"tensor {shown(entry.name)}"
            if entry.offset != expected_offset:
                self.fail(
                    field,
                    f"offset {entry.offset}, expected {expected_offset}, "
                    "where the tensor before it ends",
                )
            start = data_start + entry.offset
            if start + entry.nbytes > self.size:
                self.fail(
                    field,
                    f"needs bytes {start} to {start + entry.nbytes}, the file ends at "
                    f"{self.size}; the file is cut short, download it again",
                )
            self.opened.tensors[entry.name] = Tensor(
                name=entry.name,
                type=entry.type,
                shape=entry.shape,
                data=self.bytes[start : start + entry.nbytes],
                origin=f"{self.opened.path.name}: {entry.name}",
            )
            expected_offset = padded(entry.offset + entry.nbytes, alignment)
        end = data_start + expected_offset
        if entries and self.size > end:
            self.fail("end of file", f"{self.size - end} bytes after the last tensor")

    # -- the file -----------------------------------------------------------------------------

    def parse(self) -> None:
        opened = self.opened
        opened.metadata, opened.types, opened.tensors = {}, {}, {}
        magic = bytes(self.buffer[self.need(4, "magic") :][:4])
        if magic != b"GGUF":
            self.fail("magic", f"expected b'GGUF', found {magic!r}; this is not a GGUF file")
        opened.version = self.u32("version")
        if opened.version not in (2, 3):
            big_endian = " (a big-endian file)" if opened.version == 3 << 24 else ""
            self.fail("version", f"expected 2 or 3, found {opened.version}{big_endian}")
        tensor_count = self.u64("tensor count")
        key_count = self.u64("metadata count")
        self.check_count("tensor count", tensor_count, MAX_TENSORS, _MIN_TENSOR_ENTRY_BYTES)
        self.check_count("metadata count", key_count, MAX_METADATA_KEYS, _MIN_ENTRY_BYTES)
        self.read_metadata(key_count)
        split = opened.metadata.get("split.count", 1)
        if split not in (0, 1):
            raise UnsupportedError(
                f"{opened.path}: split.count: one of {shown(split)} parts of a model; "
                "join them first (llama-gguf-split --merge)"
            )
        self.read_tensors(tensor_count)


def _decoded(data: npt.NDArray[np.uint8], starts: list[int], end: int) -> list[str] | None:
    """Strings that follow each other, a length of 8 bytes before each, up to `end`.

    One pass over all of them: lengths become a NUL, the text is decoded and split there. None where
    a string holds a NUL or is not UTF-8.
    """
    if not starts:
        return []
    begin = starts[0] - 8
    text = data[begin:end].copy()
    places = np.array(starts, np.int64) - begin
    kept = np.ones(text.size, np.bool_)
    for byte in range(1, 8):
        kept[places - byte] = False
    text[places - 8] = 0
    try:
        values = str(text[kept].data, "utf-8").split("\0")
    except UnicodeDecodeError:
        return None
    return values[1:] if len(values) == len(starts) + 1 else None


def padded(size: int, alignment: int) -> int:
    """The next multiple of `alignment` from `size` on."""
    return -(-size // alignment) * alignment
