"""Files that appear under their names only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from smolrun.errors import OutputError

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]
"""Contiguous bytes, whatever they are the bytes of."""


def bytes_of(data: Buffer) -> memoryview:
    """The bytes of a contiguous buffer, not copied."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view.cast("B")


class OutputFile:
    """What `atomic_output` hands out: a file that only grows. Its errors name its path."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.written = 0  # bytes
        self._file = file

    def write(self, data: Buffer) -> None:
        """Append the bytes of a contiguous buffer; OutputError where the disk takes no more."""
        view = bytes_of(data)
        try:
            done = 0
            while done < len(view):  # the system may take only a part at a time
                done += self._file.write(view[done:])
        except OSError as error:
            raise output_error(self.path, error) from error
        self.written += len(view)

    def sync(self) -> None:
        """Have everything on the disk; some file systems report a full disk only here."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise output_error(self.path, error) from error


@contextlib.contextmanager
def atomic_output(path: Path, nbytes: int | None = None) -> Iterator[OutputFile]:
    """A new file that takes the place of `path` when the block ends, and leaves no trace otherwise.

    It grows beside `path`, as NAME.PROCESS.partial, and is renamed once it is on the disk. A link
    is followed. With `nbytes`, the bytes to come, a disk without room is found before any work.
    OutputError says what could not be written and why.
    """
    check_output(path, nbytes or 0)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        # Buffers are large; a second one would only copy them.
        opened = partial.open("wb", buffering=0)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        with opened:
            output = OutputFile(path, opened)
            yield output
            output.sync()
        try:
            os.replace(partial, target)
        except OSError as error:
            raise output_error(path, error) from error
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, nbytes: int, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to write files into, which take their place in `path` when the block ends.

    They grow in a folder beside `path`, NAME.PROCESS.partial, which leaves no trace where the block
    fails. A new folder appears whole, by one renaming. In a folder that exists, file after file is
    replaced once all are written, and others whose names `is_replaced` are removed; the rest stays.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise OutputError(f"{path}: is no folder; name another")
    check_room(target, nbytes)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        try:
            yield partial
            sync_folder(partial)
            if not target.exists():
                os.rename(partial, target)
            else:
                written = os.listdir(partial)
                for name in os.listdir(target):
                    if name not in written and is_replaced(name):
                        (target / name).unlink()
                for name in written:
                    os.replace(partial / name, target / name)
                sync_folder(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise output_error(path, error) from error
    sync_folder(target.parent)


def check_output(path: Path, nbytes: int = 0) -> None:
    """OutputError where `path` can not become a file of so many bytes, as far as can be known."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise OutputError(f"{path}: is no regular file, so it can not be replaced; name another")
    check_room(target, nbytes)


def check_room(path: Path, nbytes: int) -> None:
    """OutputError where the disk of a file, yet to be made, has less than `nbytes` left."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise output_error(path, error) from error
    if nbytes > free:
        raise OutputError(
            f"{path}: needs {nbytes / 1e6:.1f} MB, its disk has {free / 1e6:.1f} MB left; "
            "make room, or write to another disk"
        )


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_ADVICE = {
    errno.ENOSPC: "make room, or write to another disk",
    errno.EDQUOT: "make room, or write to another disk",
    errno.EFBIG: "write to a disk whose file system takes larger files",
    errno.ENOENT: "make the folder first",
    errno.ENOTDIR: "name a file in a folder",
    errno.EACCES: "write to a folder that you may write to",
    errno.EPERM: "write to a folder that you may write to",
    errno.EROFS: "write to another disk",
}


def output_error(path: Path, error: OSError) -> OutputError:
    """What to raise where the system refused to write: the path, the reason, and what to do."""
    advice = _ADVICE.get(error.errno or 0, "write it somewhere else")
    return OutputError(f"{path}: can not be written: {error.strerror or error}; {advice}")
