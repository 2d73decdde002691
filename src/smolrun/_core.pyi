"""Types of the native core (src/core)."""

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
_Int16 = npt.NDArray[np.int16]
_Int32 = npt.NDArray[np.int32]
_Halves = npt.NDArray[np.uint16]  # float16, as bits

def isas() -> list[str]:
    """Instruction sets that this CPU and system run, slowest first."""

def default_isa() -> str:
    """The fastest of them."""

class kernels:
    """The submodule of single kernels, for tests and benchmarks.

    `isa` is one of `isas()`, `type` the name of a weight type. Results go into the arrays passed
    in. Every array must have the type and shape given here and be C-contiguous; anything else is a
    ValueError. What the kernels compute is said in src/core/kernels.h.
    """

    @staticmethod
    def packed_bytes(type: str, rows: int, columns: int) -> int:
        """Bytes of a weight in the layout of the kernels."""

    @staticmethod
    def pack(
        type: str, rows: int, columns: int, data: _Bytes, interleaved_head_dim: int, out: _Bytes
    ) -> None:
        """Repacks the rows of a file, data [rows * row bytes], to out [packed_bytes]."""

    @staticmethod
    def linear(
        isa: str,
        type: str,
        rows: int,
        columns: int,
        packed: _Bytes,
        x: _Floats,
        row_begin: int,
        row_end: int,
        out: _Floats,
    ) -> None:
        """x [tokens, columns] times rows row_begin..row_end of the weight: out [tokens, those].

        row_begin is a multiple of 16; row_end too, or the number of rows.
        """

    @staticmethod
    def dequantize(
        isa: str, type: str, rows: int, columns: int, packed: _Bytes, row: int, out: _Floats
    ) -> None:
        """One row of a weight: out [columns]."""

    @staticmethod
    def quantize(isa: str, x: _Floats, codes: _Int16, scales: _Floats, sums: _Int32) -> None:
        """x [n] rounded to codes [n], scales [n/32], sums [n/16]; n a multiple of 32."""

    @staticmethod
    def rms_norm(isa: str, x: _Floats, weight: _Floats, epsilon: float, out: _Floats) -> None:
        """RMS norm of x [n], times weight [n]: out [n]."""

    @staticmethod
    def rope(isa: str, heads: _Floats, cosine: _Floats, sine: _Floats) -> None:
        """Rotates heads [h, d] in place; cosine and sine [d/2]."""

    @staticmethod
    def swiglu(isa: str, gate: _Floats, up: _Floats, out: _Floats) -> None:
        """silu(gate) * up, all [n]."""

    @staticmethod
    def add(isa: str, x: _Floats, out: _Floats) -> None:
        """out += x, both [n]."""

    @staticmethod
    def store_kv(
        isa: str, k: _Floats, v: _Floats, slot: int, k_block: _Halves, v_block: _Halves
    ) -> None:
        """k [d] and v [d] into slot 0..31 of k_block [d, 32] and v_block [32, d]."""

    @staticmethod
    def attention(
        isa: str,
        q: _Floats,
        out: _Floats,
        length: int,
        scale: float,
        pool: _Halves,
        block_table: _Int32,
        block_stride: int,
        k_offset: int,
        v_offset: int,
    ) -> None:
        """One token and KV head: q [group, d] over `length` tokens of the pool: out [group, d].

        Block b of the pool starts at element b * block_stride; K [d, 32] and V [32, d] of the head
        stand k_offset and v_offset behind it.
        """
