"""How much of a mapping this process holds in memory, from /proc/self/smaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt


def _mappings() -> Iterator[tuple[int, int, int]]:
    """(begin, end, bytes in memory) of every mapping."""
    begin = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
        elif first == "Rss:":
            yield begin, end, 1024 * int(line.split()[1])


def resident_around(data: npt.NDArray[np.uint8]) -> int:
    """Bytes in memory of the mapping that holds an array."""
    address = data.ctypes.data
    return next(resident for begin, end, resident in _mappings() if begin <= address < end)


def resident_of_size(size: int) -> int:
    """Bytes in memory of the smallest mapping that has at least `size`."""
    return min(
        (end - begin, resident) for begin, end, resident in _mappings() if end - begin >= size
    )[1]
