"""Files from strangers: mapped, and small JSON files read with limits."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from smolrun.errors import ModelFormatError, ModelNotFoundError, ResourceError

MAX_JSON_BYTES = 2 << 20
_MAX_INTEGER_DIGITS = 400


def shown(value: object) -> str:
    """A value from a file, safe and short enough for a message."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:80] + f"... ({len(text)} characters)"


def _open_regular(path: Path) -> tuple[int, int]:
    """File descriptor and size of a regular file; the size belongs to that very descriptor."""
    # O_NONBLOCK: opening a named pipe must not wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL in the path
        raise ModelNotFoundError(f"{shown(str(path))}: not a file name: {error}") from None
    except OSError as error:
        raise ModelNotFoundError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(f"{path}: expected a regular file, found something else")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


class MappedFile:
    """A file mapped read-only. `size` is what the mapped descriptor had when it was mapped.

    Another process that truncates the file in place afterwards breaks any mapping (SIGBUS); replace
    model files by renaming, as downloaders do.
    """

    def __init__(self, path: Path) -> None:
        """ModelNotFoundError, ModelFormatError (empty, not a file), ResourceError (no memory)."""
        self.path = path
        descriptor, self.size = _open_regular(path)
        try:
            if self.size == 0:
                raise ModelFormatError(f"{path}: the file is empty; download it again")
            self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise ResourceError(f"{path}: no memory left to map {self.size} bytes") from error
            raise ModelFormatError(f"{path}: cannot be mapped: {error.strerror}") from error
        except ValueError as error:  # shrank between fstat and mmap
            raise ModelFormatError(f"{path}: changed while it was opened: {error}") from error
        finally:
            os.close(descriptor)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)  # (size,)

    def drop(self, data: npt.NDArray[np.uint8]) -> None:
        """Give back the memory of the whole pages under `data`, a slice of `bytes`.

        They are read from the file again when touched.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = data.ctypes.data - self.bytes.ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmap, or leave that to the last array that still views the file."""
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def read_small_file(path: Path, limit: int) -> bytes | None:
    """The whole file, None if there is none; ModelFormatError above `limit` bytes."""
    if not os.path.lexists(path):
        return None
    descriptor, size = _open_regular(path)
    try:
        opened = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with opened as file:
        if size > limit:
            raise ModelFormatError(f"{path}: {size} bytes, expected at most {limit}")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ModelFormatError(f"{path}: grew past {limit} bytes while it was read")
    return content


def read_json_file(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no such file."""
    content = read_small_file(path, limit)
    return None if content is None else parse_json_object(content, str(path))


def parse_json_object(content: bytes, origin: str) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no duplicate keys, no NaN; else ModelFormatError."""

    def fail(problem: str) -> NoReturn:
        raise ModelFormatError(f"{origin}: not sound JSON: {problem}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    fail(f"the key {shown(key)} stands twice")
                seen.add(key)
        return values

    def integer(digits: str) -> int:
        # Python's int() takes quadratic time in some versions.
        if len(digits) > _MAX_INTEGER_DIGITS:
            fail(f"an integer of {len(digits)} digits")
        return int(digits)

    try:
        values = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=lambda name: fail(f"{name} is no JSON number"),
        )
    except UnicodeDecodeError as error:
        fail(f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        fail(f"{error.msg} at character {error.pos}")
    except RecursionError:
        fail("nested too deeply")
    if not isinstance(values, dict):
        fail(f"expected an object, found {shown(values)}")
    return values


def optional_string(values: Mapping[str, Any], key: str, origin: str) -> str | None:
    """A string member, None when absent or null; ModelFormatError for any other kind."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(f"{origin}: {key}: expected a string, found {shown(value)}")
    return value
