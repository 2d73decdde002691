"""A reader of safetensors files, single or sharded, that trusts nothing in them.

The tensors of a file must fill it from the end of the header to its last byte, without hole or
overlap. Source: the format's description, https://github.com/huggingface/safetensors#format
(duplicate names are refused as it says, although the reference reader lets the last one win).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NoReturn

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.mapping import MappedFile, parse_json_object, read_json_file, shown
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

# The format allows headers of 100 MB; a SmolLM needs 40 kB, and parsed JSON can take thirty times
# its size.
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 65_536
MAX_SHARDS = 1_000
MAX_DIMENSIONS = 8

_WEIGHT_TYPES = {"F32": WeightType.F32, "F16": WeightType.F16, "BF16": WeightType.BF16}
_FOREIGN_TYPES = frozenset(
    ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F64", "C64"]
    + ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"]
)


class SafetensorsFile:
    """One safetensors file: its tensors as views of the mapped bytes."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # the optional __metadata__
    file: MappedFile

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Map and check the file: ModelNotFoundError, ModelFormatError or UnsupportedError."""
        opened = cls()
        opened.path = Path(path)
        opened.file = MappedFile(opened.path)
        try:
            opened._parse()
        except BaseException:
            opened.close()
            raise
        return opened

    def close(self) -> None:
        """Forget the tensors and unmap once nothing views the file."""
        self.tensors = {}
        self.file.close()

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.path}: {field}: {problem}")

    def _parse(self) -> None:
        size = self.file.size
        if size < 8:
            self._fail("header length", f"the file has {size} bytes, expected at least 8")
        header_bytes: int = struct.unpack("<Q", self.file.bytes[:8].tobytes())[0]
        if header_bytes > size - 8:
            self._fail(
                "header length",
                f"{header_bytes} bytes in a file of {size}; "
                "this is not a safetensors file, or it is cut short",
            )
        if header_bytes > MAX_HEADER_BYTES:
            self._fail("header length", f"{header_bytes}, expected at most {MAX_HEADER_BYTES}")
        data_start = 8 + header_bytes
        header = parse_json_object(self.file.bytes[8:data_start].tobytes(), f"{self.path}: header")
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        if len(header) > MAX_TENSORS:
            self._fail("header", f"{len(header)} tensors, expected at most {MAX_TENSORS}")
        entries = [self._entry(name, entry) for name, entry in header.items()]
        entries.sort(key=lambda entry: entry[3])

        self.tensors = {}
        end = 0  # of the tensor before, from the start of the data
        for name, weight_type, shape, begin, until in entries:
            field = f"tensor {shown(name)}: data_offsets"
            if begin != end:
                kind = "a hole before it" if begin > end else "an overlap"
                self._fail(field, f"begins at {begin}, expected {end}: {kind}")
            if data_start + until > size:
                self._fail(
                    field,
                    f"ends at byte {data_start + until}, the file at {size}; "
                    "the file is cut short, download it again",
                )
            self.tensors[name] = Tensor(
                name=name,
                type=weight_type,
                shape=shape,
                data=self.file.bytes[data_start + begin : data_start + until],
                origin=f"{self.path.name}: {name}",
            )
            end = until
        if data_start + end != size:
            self._fail(
                "end of file", f"{size - data_start - end} bytes after the last tensor's data"
            )

    def _metadata(self, values: object) -> dict[str, str]:
        if not isinstance(values, dict):
            self._fail("__metadata__", f"expected an object, found {shown(values)}")
        for key, value in values.items():
            if not isinstance(value, str):
                self._fail(f"__metadata__: {shown(key)}", f"expected text, found {shown(value)}")
        return values

    def _entry(self, name: str, entry: Any) -> tuple[str, WeightType, tuple[int, ...], int, int]:
        """Name, type, shape, first byte and end of one tensor."""
        field = f"tensor {shown(name)}"
        if not name or not name.isprintable():  # a lone surrogate is not printable either
            self._fail(field, "expected a name of printable text")
        if not isinstance(entry, dict):
            self._fail(field, f"expected an object, found {shown(entry)}")
        for key in ("dtype", "shape", "data_offsets"):
            if key not in entry:
                self._fail(field, f"the field {key} is missing")

        dtype = entry["dtype"]
        if isinstance(dtype, str) and dtype in _FOREIGN_TYPES:
            raise UnsupportedError(
                f"{self.path}: {field}: stored as {dtype}, which smolrun does not run; "
                "save the model as F32, F16 or BF16, or fetch a GGUF of it"
            )
        if not isinstance(dtype, str) or dtype not in _WEIGHT_TYPES:
            self._fail(f"{field}: dtype", f"expected F32, F16 or BF16, found {shown(dtype)}")
        weight_type = _WEIGHT_TYPES[dtype]

        shape = self._integers(entry["shape"], f"{field}: shape")
        if not 1 <= len(shape) <= MAX_DIMENSIONS:
            self._fail(f"{field}: shape", f"expected 1 or more dimensions, found {shown(shape)}")
        nbytes = weight_type.block_bytes
        for size in shape:
            if not 1 <= size <= self.file.size:
                self._fail(
                    f"{field}: shape",
                    f"a dimension of {size} in {shown(shape)} in a file of {self.file.size} bytes",
                )
            nbytes *= size  # Python's integers do not wrap

        offsets = self._integers(entry["data_offsets"], f"{field}: data_offsets")
        if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
            self._fail(f"{field}: data_offsets", f"expected [begin, end], found {shown(offsets)}")
        begin, until = offsets
        if until - begin != nbytes:
            self._fail(
                f"{field}: data_offsets",
                f"{shown(offsets)} spans {until - begin} bytes, "
                f"{dtype} {shown(shape)} needs {nbytes}",
            )
        return name, weight_type, tuple(shape), begin, until

    def _integers(self, values: Any, field: str) -> list[int]:
        # bool is an int to isinstance.
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            self._fail(field, f"expected a list of integers, found {shown(values)}")
        return values


def open_shards(index_path: Path) -> list[SafetensorsFile]:
    """Open all files of a sharded model, named by its model.safetensors.index.json.

    The names come from a stranger: only plain file names, in the index's own folder, are opened.
    """
    index = read_json_file(index_path)
    if index is None:
        raise ModelFormatError(f"{index_path}: no such file")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(
            f"{index_path}: weight_map: expected names of tensors, found {shown(weight_map)}"
        )
    tensors_of: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        field = f"{index_path}: weight_map: {shown(name)}"
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise ModelFormatError(
                f"{field}: expected a .safetensors file in the same folder, "
                f"found {shown(file_name)}"
            )
        tensors_of.setdefault(file_name, set()).add(name)
    if len(tensors_of) > MAX_SHARDS:
        raise ModelFormatError(
            f"{index_path}: weight_map: {len(tensors_of)} files, expected at most {MAX_SHARDS}"
        )

    shards: list[SafetensorsFile] = []
    try:
        for file_name, expected in sorted(tensors_of.items()):
            shards.append(_open_shard(index_path, file_name, expected))
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return shards


def _open_shard(index_path: Path, file_name: str, expected: set[str]) -> SafetensorsFile:
    path = index_path.parent / file_name
    if not _stays_inside(path):
        raise ModelFormatError(
            f"{index_path}: weight_map: {shown(file_name)} is a link that leaves the folder"
        )
    if not path.exists():
        raise ModelFormatError(
            f"{index_path}: weight_map: the file {shown(file_name)} is missing; download it"
        )
    shard = SafetensorsFile.open(path)
    difference = shard.tensors.keys() ^ expected
    if difference:
        name = min(difference)
        problem = (
            f"the index maps it to {file_name}, which does not hold it"
            if name in expected
            else f"stands in {file_name}, but the index does not map it there"
        )
        shard.close()
        raise ModelFormatError(f"{index_path}: tensor {shown(name)}: {problem}")
    return shard


def _is_plain_name(name: str) -> bool:
    # A colon would name a drive or a stream on Windows; control characters have no business here.
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name) <= 255
        and name.isprintable()
        and not any(character in name for character in "/\\:")
    )


def _stays_inside(path: Path) -> bool:
    """Whether a file, links followed, lies in its folder, or where the Hub's cache keeps it.

    The cache has repository/snapshots/revision/name as a link to repository/blobs/hash.
    """
    folder = path.parent.resolve()
    target = Path(os.path.realpath(path))
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    return target.parent in allowed
