"""What the kernels take for granted is checked where Python calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.kernels.helpers import kernels

F = np.float32


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=F)


def raw(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


def shorts(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.int16)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# A sound call of each kernel.
SOUND: dict[str, list[Any]] = {
    "packed_bytes": ["Q4_0", 3, 64],
    "pack": ["Q4_0", 3, 64, raw(3 * 36), 0, raw(16 * 36)],
    "linear": ["scalar", "Q4_0", 3, 64, raw(16 * 36), floats(2, 64), 0, 3, floats(2, 3)],
    "dequantize": ["scalar", "Q4_0", 3, 64, raw(16 * 36), 2, floats(64)],
    "quantize": [
        "scalar",
        floats(64),
        np.zeros(64, np.int16),
        floats(2),
        np.zeros(4, np.int32),
    ],
    "quantize_bytes": [
        "scalar",
        floats(64),
        np.zeros(64, np.int8),
        floats(4),
        np.zeros(4, np.int32),
    ],
    "rms_norm": ["scalar", floats(6), floats(6), 1e-5, floats(6)],
    "rope": ["scalar", floats(2, 8), floats(4), floats(4)],
    "swiglu": ["scalar", floats(6), floats(6), floats(6)],
    "weigh": ["scalar", floats(6), 1.0, 1.0, floats(6)],
    "add": ["scalar", floats(6), floats(6)],
    "store_kv": ["scalar", floats(8), floats(8), 5, shorts(320), shorts(320)],
    "attention": [
        "scalar",
        floats(1, 2, 8),
        floats(1, 2, 8),
        33,
        0.1,
        shorts(4 * 640),
        ints(3, 0),
        640,
        0,
        320,
    ],
}
ARRAYS = [
    (name, i)
    for name, arguments in SOUND.items()
    for i, argument in enumerate(arguments)
    if isinstance(argument, np.ndarray)
]


def call(name: str, place: int | None = None, value: Any = None) -> None:
    arguments = list(SOUND[name])
    if place is not None:
        arguments[place] = value
    function: Callable[..., object] = getattr(kernels, name)
    function(*arguments)


@pytest.mark.parametrize("name", SOUND)
def test_sound_calls_pass(name: str) -> None:
    call(name)


@pytest.mark.parametrize(("name", "place"), ARRAYS)
def test_wrong_arrays(name: str, place: int) -> None:
    array = SOUND[name][place]
    size = array.dtype.itemsize
    with pytest.raises(TypeError, match=f"{array.dtype} array"):
        call(name, place, array.astype(np.float64))
    with pytest.raises(TypeError, match=f"{array.dtype} array"):
        call(name, place, array.view(f"S{size}"))
    apart = np.zeros((*array.shape, 2), dtype=array.dtype)[..., 0]
    with pytest.raises(TypeError, match="contiguous"):
        call(name, place, apart)
    if size > 1:
        with pytest.raises(TypeError, match=f"{array.dtype} array"):
            call(name, place, array.astype(array.dtype.newbyteorder()))
        shifted = raw(array.nbytes + 1)[1:].view(array.dtype).reshape(array.shape)
        with pytest.raises(TypeError, match="aligned"):
            call(name, place, shifted)
    with pytest.raises(ValueError, match="dimensions"):
        call(name, place, array[None])


@pytest.mark.parametrize(("name", "place"), ARRAYS)
def test_wrong_lengths(name: str, place: int) -> None:
    array = SOUND[name][place]
    for axis in range(array.ndim):
        short = np.ascontiguousarray(np.take(array, range(array.shape[axis] - 1), axis=axis))
        if (name, place, axis) == ("rope", 1, 0):
            continue  # one head less is as good
        with pytest.raises(ValueError, match=r"expected|multiple|even|short|no such block"):
            call(name, place, short)


@pytest.mark.parametrize(("name", "place"), ARRAYS)
def test_no_array_at_all(name: str, place: int) -> None:
    for value in (None, 3, [1.0, 2.0]):
        with pytest.raises(TypeError):
            call(name, place, value)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("linear", 0, "sse9"),
        ("linear", 1, "Q9_9"),
        ("packed_bytes", 1, 0),
        ("packed_bytes", 1, -1),
        ("packed_bytes", 1, 1 << 62),
        ("packed_bytes", 2, 1 << 62),
        ("packed_bytes", 2, 48),
        ("pack", 4, 3),
        ("pack", 4, 2),
        ("pack", 4, -2),
        ("linear", 6, 1),
        ("linear", 6, -16),
        ("linear", 7, 2),
        ("linear", 7, 4),
        ("dequantize", 5, 3),
        ("dequantize", 5, -1),
        ("store_kv", 3, 32),
        ("store_kv", 3, -1),
        ("attention", 3, 0),
        ("attention", 3, 65),
        ("attention", 3, 1 << 62),
        ("attention", 6, ints(3, 4)),
        ("attention", 6, ints(-1, 0)),
        ("attention", 7, 0),
        ("attention", 7, 1 << 62),
        ("attention", 8, -1),
        ("attention", 8, 321),
        ("attention", 9, 1 << 62),
    ],
)
def test_numbers_out_of_range(name: str, place: int, value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  each message names its argument
        call(name, place, value)


def test_an_output_must_be_writable() -> None:
    out = floats(6)
    out.flags.writeable = False
    with pytest.raises(TypeError):
        call("add", 2, out)
    # An input need not be.
    call("add", 1, out)
