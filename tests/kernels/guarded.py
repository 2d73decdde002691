"""Runs every kernel with each of its arrays flush against memory that must not be touched.

A process of its own, started by test_guard_pages.py: a kernel that reads or writes past an end dies
by a signal, and the last line printed says which. `python -m tests.kernels.guarded ISA`
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.quant.types import WeightType
from tests.kernels.helpers import (
    Weights,
    columns_of,
    kernels,
    pack,
    random_inputs,
    random_weights,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """Arrays between two inaccessible pages, flush with the first or with the second."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.mappings: list[tuple[int, int]] = []

    def like(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A guarded copy."""
        page = mmap.PAGESIZE
        inner = -(-max(values.nbytes, 1) // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = _libc.mmap(None, inner + 2 * page, 0, flags, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("mmap failed")
        if _libc.mprotect(start + page, inner, mmap.PROT_READ | mmap.PROT_WRITE):
            raise MemoryError("mprotect failed")
        self.mappings.append((start, inner + 2 * page))
        first = start + page + (inner - values.nbytes if self.at_end else 0)
        memory = (ctypes.c_uint8 * values.nbytes).from_address(first)
        array = np.ctypeslib.as_array(memory).view(values.dtype).reshape(values.shape)
        array[...] = values
        return array

    def free(self) -> None:
        for start, size in self.mappings:
            _libc.munmap(start, size)
        self.mappings.clear()


def same(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    if found.tobytes() != expected.tobytes():
        raise AssertionError("other bits between guard pages than elsewhere")


def run_weights(isa: str, weight_type: WeightType, guard: Guarded) -> None:
    name = weight_type.value
    for columns in columns_of(weight_type):
        for rows in (1, 16, 17):
            data = random_weights(weight_type, rows, columns)
            weights = Weights(weight_type, columns, data)
            source = guard.like(data.reshape(-1))
            packed = guard.like(np.zeros_like(weights.packed))
            kernels.pack(name, rows, columns, source, 0, packed)
            same(packed, weights.packed)
            for row in range(rows):
                values = guard.like(np.zeros(columns, dtype=np.float32))
                kernels.dequantize(isa, name, rows, columns, packed, row, values)
                same(values, weights.values[row].astype(np.float32))
            for tokens in (1, 2, 3, 4, 5, 7, 8, 13, 17):
                x = random_inputs(tokens, columns)
                out = guard.like(np.zeros((tokens, rows), dtype=np.float32))
                kernels.linear(isa, name, rows, columns, packed, guard.like(x), 0, rows, out)
                same(out, weights.linear(isa, x))
                if kernels.has_fast(isa, name):
                    kernels.linear(
                        isa, name, rows, columns, packed, guard.like(x), 0, rows, out, True
                    )
                    same(out, weights.linear(isa, x, fast=True))
            guard.free()


def run_codes(isa: str, guard: Guarded) -> None:
    for weight_type in (WeightType.F16, WeightType.BF16):
        for columns in (1, 7, 31, 130, 513, 700):
            for rows in (1, 16, 17):
                name, x = weight_type.value, random_inputs(13, columns)
                source = random_weights(weight_type, rows, columns).reshape(-1)
                plain = pack(weight_type, columns, source, as_codes=True)
                packed = guard.like(np.zeros_like(plain))
                kernels.pack(name, rows, columns, guard.like(source), 0, packed, True)
                same(packed, plain)
                values = guard.like(np.zeros(columns, dtype=np.float32))
                kernels.dequantize(isa, "I16", rows, columns, packed, rows - 1, values)
                for tokens in (1, 2, 3, 5, 13):
                    out = guard.like(np.zeros((tokens, rows), dtype=np.float32))
                    some = guard.like(x[:tokens])
                    kernels.linear(isa, "I16", rows, columns, packed, some, 0, rows, out)
                    expected = np.zeros_like(out)
                    kernels.linear(isa, "I16", rows, columns, plain, x[:tokens], 0, rows, expected)
                    same(out, expected)
                count = min(columns, 512)
                codes = guard.like(np.zeros(count + count % 2, dtype=np.int16))
                kernels.encode(isa, name, guard.like(source[: 2 * count]), codes)
                guard.free()


def run_vectors(isa: str, guard: Guarded) -> None:
    for columns in (1, 3, 8, 15, 17, 32, 33, 96, 100, 576):
        a, b = random_inputs(2, columns)
        out = guard.like(np.zeros_like(a))
        kernels.rms_norm(isa, guard.like(a), guard.like(b), 1e-5, out)
        kernels.swiglu(isa, guard.like(a), guard.like(b), out)
        kernels.add(isa, guard.like(a), out)
        kernels.weigh(isa, guard.like(a), float(a.max()), 1.0, out)
        if columns % 32 == 0:
            codes = guard.like(np.zeros(columns, dtype=np.int16))
            scales = guard.like(np.zeros(columns // 32, dtype=np.float32))
            sums = guard.like(np.zeros(columns // 16, dtype=np.int32))
            kernels.quantize(isa, guard.like(a), codes, scales, sums)
            small = guard.like(np.zeros(columns, dtype=np.int8))
            scales = guard.like(np.zeros(columns // 16, dtype=np.float32))
            kernels.quantize_bytes(isa, guard.like(a), small, scales, sums)
        guard.free()


def run_heads(isa: str, guard: Guarded) -> None:
    for head_dim in (2, 6, 32, 48, 64, 80, 96, 128):
        x = random_inputs(3, head_dim)
        half = guard.like(np.ones(head_dim // 2, dtype=np.float32))
        kernels.rope(isa, guard.like(x), half, guard.like(half))
        # Two blocks that hold nothing but this head: K, then V.
        size = 32 * (head_dim + 2)
        pool = guard.like(np.zeros(4 * size, dtype=np.int16))
        k_block, v_block = pool[:size], pool[size : 2 * size]
        for slot in (0, 31):
            k, v = guard.like(x[0]), guard.like(x[1])
            kernels.store_kv(isa, k, v, slot, k_block, v_block)
            k_alone, v_alone = (guard.like(np.zeros(size, dtype=np.int16)) for _ in range(2))
            kernels.store_kv(isa, k, v, slot, k_alone, v_alone)
        for group in (1, 2, 3, 4, 5, 8):
            for tokens, length in ((1, 1), (1, 7), (1, 32), (1, 33), (1, 63), (1, 64), (9, 28)):
                blocks = 1 + (length + tokens - 1 > 32)
                table = guard.like(np.array([1, 0][:blocks], dtype=np.int32))
                q = guard.like(random_inputs(tokens * group, head_dim).reshape(tokens, group, -1))
                out = guard.like(np.zeros_like(q))
                kernels.attention(isa, q, out, length, 0.1, pool, table, 2 * size, 0, size)
        guard.free()


def fault() -> None:
    """Shows that the guard is one."""
    array = Guarded(at_end=True).like(np.zeros(5, dtype=np.float32))
    ctypes.c_uint8.from_address(array.ctypes.data + array.nbytes).value = 1


def main(isa: str) -> None:
    for at_end in (False, True):
        guard = Guarded(at_end)
        for weight_type in WeightType:
            print(f"{weight_type.value}, at_end={at_end}", flush=True)
            run_weights(isa, weight_type, guard)
        print(f"codes, at_end={at_end}", flush=True)
        run_codes(isa, guard)
        print(f"vectors, at_end={at_end}", flush=True)
        run_vectors(isa, guard)
        print(f"heads, at_end={at_end}", flush=True)
        run_heads(isa, guard)


if __name__ == "__main__":
    fault() if sys.argv[1] == "fault" else main(sys.argv[1])
    print("done", flush=True)
