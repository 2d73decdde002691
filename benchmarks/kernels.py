"""Speed of the kernels, one thread, beside what the machine can do at most.

    python benchmarks/kernels.py [--isa avx512] [--types Q8_0,Q4_K] [--shapes 135M] [--tokens 1,32]
                                 [--activations fast]

One token: GB/s of weights read, from 192 MB that no cache holds; the ceiling is a plain streaming
read. Many tokens: GOP/s, a multiplication and an addition being two; the ceiling is the peak of the
instruction that multiplies: pairs of 16-bit integers for quantized weights, quads of 8-bit ones
with fast activations, float FMA for the rest. Inputs are quantized inside the time, as they are in
a model.

The machine may be noisy: each figure is the best of several runs; ceilings are measured before
every table, and the best so far counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt

from random_blocks import random_blocks
from smolrun import _core
from smolrun.quant.types import WeightType

# Rows and columns of the down projection: its rows are whole blocks of every type.
SHAPES = {"135M": (576, 1536), "3B": (2048, 11008)}
# Query heads per KV head, and their size.
HEADS = {"135M": (3, 64), "3B": (4, 128)}
CONTEXT = 4096
STREAMED_BYTES = 192 << 20


class Ceilings:
    """What one thread reaches at most, by kind: GB/s of `read`, GOP/s of the others."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.values: dict[str, float] = {}

    def measure(self) -> None:
        """Keeps the best of what was found before and now."""
        for kind, rates in _core.ceilings(self.isa, 1, samples=60).items():
            self.values[kind] = max(*rates, self.values.get(kind, 0.0) * 1e9) / 1e9

    def __str__(self) -> str:
        return ", ".join(f"{kind} {value:.0f}" for kind, value in self.values.items())


def aligned(size: int) -> npt.NDArray[np.uint8]:
    """Bytes at a multiple of 64, as packed weights have them."""
    whole = np.empty(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


def seconds_of(work: Callable[[], None], at_least: float) -> float:
    """Of the fastest call."""
    best, end = float("inf"), time.perf_counter() + at_least
    while (start := time.perf_counter()) < end or best == float("inf"):
        work()
        best = min(best, time.perf_counter() - start)
    return best


class Layers:
    """The same weight many times over, one below the other: more than caches hold."""

    def __init__(self, weight_type: WeightType, rows: int, columns: int) -> None:
        self.type, self.rows, self.columns = weight_type.value, rows, columns
        self.bytes = rows * weight_type.row_bytes(columns)
        self.count = max(2, -(-STREAMED_BYTES // self.bytes))
        blocks = rows * columns // weight_type.block_weights
        data = random_blocks(weight_type, blocks, np.random.default_rng(1)).view(np.uint8)
        one = aligned(_core.kernels.packed_bytes(self.type, rows, columns))
        _core.kernels.pack(self.type, rows, columns, data, 0, one)
        self.packed = aligned(one.size * self.count)
        self.packed.reshape(self.count, -1)[:] = one
        self.next = 0

    def seconds(self, isa: str, tokens: int, fast: bool, at_least: float) -> float:
        """Of one product with `tokens` inputs."""
        # Enough layers in a call that what Python adds does not count.
        together = max(1, min(self.count, (8 << 20) // self.bytes if tokens < 8 else 1))
        x = np.random.default_rng(2).standard_normal((tokens, self.columns)).astype(np.float32)
        out = np.empty((tokens, self.rows * together), np.float32)

        def run() -> None:
            if self.next + together > self.count:
                self.next = 0
            begin, self.next = self.next * self.rows, self.next + together
            _core.kernels.linear(
                isa,
                self.type,
                self.rows * self.count,
                self.columns,
                self.packed,
                x,
                begin,
                begin + self.rows * together,
                out,
                fast=fast,
            )

        return seconds_of(run, at_least) / together


def share(value: float, ceiling: float) -> str:
    return f" {value / ceiling:4.0%}"


def linear_line(
    isa: str,
    layers: Layers,
    tokens: list[int],
    fast: bool,
    ceilings: dict[str, float],
    at_least: float,
) -> str:
    line = f"{layers.type:8}"
    fast = fast and _core.kernels.has_fast(isa, layers.type)
    quantized = "int8" if fast else "int16"
    peak = ceilings["f32" if WeightType(layers.type).is_float else quantized]
    for n in tokens:
        seconds = layers.seconds(isa, n, fast, at_least)
        read = layers.bytes / seconds / 1e9
        if n == 1:
            line += f"{read:8.1f} GB/s{share(read, ceilings['read'])}"
            continue
        rate = 2 * layers.rows * layers.columns * n / seconds / 1e9
        line += f"{rate:8.0f} GOP/s{share(rate, peak)}"
    return line


def attention_line(isa: str, shape: str, ceilings: dict[str, float], at_least: float) -> str:
    group, head_dim = HEADS[shape]
    stride = 2 * 32 * (head_dim + 2)
    random = np.random.default_rng(3)
    blocks = max(CONTEXT // 32, STREAMED_BYTES // (2 * stride))
    pool = np.resize(random.integers(-8000, 8000, 1 << 20, np.int16), blocks * stride)
    scales = pool.reshape(2 * blocks, -1)[:, 32 * head_dim :]
    scales[:] = np.full(32, 1 / 3000, np.float32).view(np.int16)
    order = random.permutation(blocks).astype(np.int32)
    q = random.standard_normal((1, group, head_dim)).astype(np.float32)
    out = np.empty_like(q)
    position = 0

    def run() -> None:
        nonlocal position
        table = order[position : position + CONTEXT // 32]
        position = (position + CONTEXT // 32) % (blocks - CONTEXT // 32 + 1)
        _core.kernels.attention(
            isa, q, out, CONTEXT, head_dim**-0.5, pool, table, stride, 0, stride // 2
        )

    read = CONTEXT / 32 * 2 * stride / seconds_of(run, at_least) / 1e9
    what = f"attention, {group} heads of {head_dim} over {CONTEXT} tokens of one KV head"
    return f"{what}: {read:.1f} GB/s{share(read, ceilings['read'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the kernels beside their ceilings.")
    parser.add_argument("--isa", help="one instruction set (default: all but scalar)")
    parser.add_argument("--types", help="weight types, with commas between (default: all)")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="135M, 3B")
    parser.add_argument("--tokens", default="1,8,32,128", help="tokens in a call")
    parser.add_argument(
        "--activations",
        choices=("exact", "fast"),
        default="exact",
        help="fast: products with inputs of 8 bits, where a type has them",
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="to spend on each figure")
    arguments = parser.parse_args()
    isas = [arguments.isa] if arguments.isa else [isa for isa in _core.isas() if isa != "scalar"]
    types = [WeightType(t) for t in arguments.types.split(",")] if arguments.types else WeightType
    tokens = [int(n) for n in arguments.tokens.split(",")]

    heading = " " * 8 + "".join(f"{n:>12} token{'s' * (n > 1):1}" for n in tokens)
    ceilings = {isa: Ceilings(isa) for isa in isas}
    for shape, isa in product(arguments.shapes.split(","), isas):
        rows, columns = SHAPES[shape]
        ceilings[isa].measure()
        limits = ceilings[isa].values
        print(f"\n{shape}, {isa}: {rows} rows of {columns}; at most {ceilings[isa]}\n{heading}")
        for weight_type in types:
            layers = Layers(weight_type, rows, columns)
            fast = arguments.activations == "fast"
            print(linear_line(isa, layers, tokens, fast, limits, arguments.seconds), flush=True)
        print(attention_line(isa, shape, limits, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
