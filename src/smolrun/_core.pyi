"""Types of the native core (src/core)."""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
_Int8 = npt.NDArray[np.int8]
_Int16 = npt.NDArray[np.int16]
_Int32 = npt.NDArray[np.int32]

def isas() -> list[str]:
    """Instruction sets that this CPU and system run, slowest first."""

def default_isa() -> str:
    """The fastest of them."""

class _Machine(TypedDict):
    cpu_name: str  # "" where the system does not say
    flags: list[str]
    physical_cores: int  # among the CPUs this process may run on
    affinity: int  # logical CPUs this process may run on

def machine() -> _Machine:
    """The processor, as the system describes it."""

def all_finite(logits: _Floats) -> bool:
    """Whether no number of logits [n] is NaN or infinite."""

def draw(
    isa: str,
    logits: _Floats,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    random: float,
) -> int:
    """A token of logits [n], of which none is NaN or infinity; -infinity may be.

    Kept are the likeliest top_k (0: all), of these the fewest that together reach top_p of their
    mass, and of these those at least min_p times as likely as the likeliest; of equal ones the
    first. `random`, in [0, 1), is where the draw falls on the running sum of these by rising
    token. ValueError for numbers out of range, and where every logit is -infinity.
    """

def ceilings(
    isa: str, threads: int, samples: int = 5, read_bytes: int = 1 << 28
) -> dict[str, list[float]]:
    """What this machine reaches at most with so many threads: one figure per sample.

    `read`: bytes a second of a streaming read over read_bytes of memory. `f32`, `int16`, `int8`:
    operations a second of multiply-and-add instructions, two each; those that the
    instruction set lacks are left out. ValueError for a number out of range.
    """

def quantize(
    isa: str,
    type: str,
    source_type: str,
    source: _Bytes,
    importance: _Floats | None,
    out: _Bytes,
) -> None:
    """Float rows into blocks: source [rows, bytes of a row], out [rows, bytes of a row of blocks].

    importance [columns] says how much an error in each column counts. ValueError for a source that
    is not finite or too large for the type, naming its row, and for shapes that do not agree.
    """

class _Profile(TypedDict):
    nanoseconds: int  # of the whole step
    ends: list[list[int]]  # [thread][operation], after the step's start; -1: it had no part in it

class Weight:
    """A weight matrix, repacked for the kernels into memory of its own."""

    def __init__(
        self,
        type: str,
        rows: int,
        columns: int,
        data: _Bytes,
        interleaved_head_dim: int = 0,
        drop_source: bool = False,
        consume_source: bool = False,
        as_codes: bool = False,
    ) -> None:
        """`data` [rows * row bytes], as in the file.

        drop_source: `data` is a read-only view of a mapped file; its pages are given back as they
        are packed (and would be read again if touched). Memory that is no file's is left alone.
        consume_source: `data` is writable memory that nobody else reads; its pages are given back
        as they are packed, and its content is lost.
        as_codes: F16 and BF16 are rounded to integer codes (src/core/blocks.h, I16).
        ValueError where `data` does not fit the shape, or blocks do not fill the columns.
        """

    @property
    def type(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Memory of the packed weight: its rows are filled up to a multiple of 16."""

class Packing:
    """Many weights, made ready by as many threads as call `work`."""

    def __init__(
        self, sources: list[tuple[str, int, int, _Bytes, int, bool, bool]], as_codes: bool = False
    ) -> None:
        """The arguments of each Weight, and its errors."""

    def work(self, chunks: int) -> bool:
        """Pack at most `chunks` pieces, of about 1 MiB each, that no other thread has taken.

        True once none is left to take; others may still be at theirs.
        """

    def stop(self) -> None:
        """Have every thread return from `work` after the piece it is at; no weights come of it."""

    def weights(self) -> list[Weight]:
        """All of them, in their order, once; RuntimeError while not all are packed."""

    @property
    def bytes_done(self) -> int:
        """Bytes of the sources that are packed."""

class Runner:
    """A linked program with its KV cache and its threads; runs one step at a time.

    A second call while a step runs, and any call in a forked child, is a RuntimeError.
    """

    def __init__(
        self,
        operations: list[dict[str, object]],
        weights: dict[str, Weight | _Floats],
        buffers: dict[str, int],
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        num_hidden_layers: int,
        vocab_size: int,
        inverse_frequencies: _Floats,
        attention_factor: float,
        kv_blocks: int,
        max_step_tokens: int = 256,
        threads: int,
        isa: str,
        activations: str = "exact",
    ) -> None:
        """Links the listing of a `Program`; inverse_frequencies [head_dim / 2].

        activations: "exact", or "fast": inputs of most products with quantized weights in 8 bits.

        ValueError naming the operation and the field, buffer or weight that does not fit;
        MemoryError where the system refuses the cache.
        """

    def step(
        self,
        tokens: _Int32,
        positions: _Int32,
        sequences: _Int32,
        block_tables: _Int32,
        logit_rows: _Int32,
        logits: _Floats | None,
        hidden: _Floats | None = None,
    ) -> None:
        """Runs tokens [n] at positions [n] of sequences [n], without the GIL.

        A sequence is a row of block_tables [s, m]: the blocks, 32 tokens each, of its KV cache. Its
        tokens stand in consecutive positions. K and V of all n tokens are stored before any token
        looks at them; each sees the positions up to its own. Writes, where given, logits
        [r, vocab_size] of the tokens logit_rows [r], and hidden [r, hidden_size], what the last
        norm returned for them.

        ValueError naming the array and the index that is out of range, before anything is written.
        """

    def zero_blocks(self, blocks: _Int32) -> None:
        """Wipes blocks of the KV cache."""

    def release_blocks(self, blocks: _Int32) -> None:
        """Wipes blocks of the KV cache and gives their memory back to the system."""

    def set_threads(self, threads: int) -> None:
        """From now on computes with so many threads; results stay the same, bit for bit."""

    def set_profiling(self, on: bool) -> None:
        """Whether steps from now on note when each operation was done."""

    def profile(self) -> _Profile:
        """Times of the last step that was profiled; no operations before the first."""

    def collect_squares(self, on: bool) -> None:
        """Whether steps from now on add up the squares of the inputs of products, from 0."""

    def squares(self) -> list[list[float]]:
        """The sums so far, [operation][column]; empty for an operation without products."""

    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block of the KV cache: 32 tokens in all layers."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes held, by purpose: `packed_weights`, `kv_cache`, `scratch`.

        Of the cache and the scratch this is the address space: memory is taken as they are first
        used.
        """

class kernels:
    """The submodule of single kernels, for tests and benchmarks.

    `isa` is one of `isas()`, `type` the name of a weight type. Results go into the arrays passed
    in. Every array must have the type and shape given here and be C-contiguous: TypeError where
    its type or order in memory is another, ValueError for a shape or a number out of range. What
    the kernels compute is said in src/core/kernels.h.
    """

    @staticmethod
    def packed_bytes(type: str, rows: int, columns: int) -> int:
        """Bytes of a weight in the layout of the kernels."""

    @staticmethod
    def pack(
        type: str,
        rows: int,
        columns: int,
        data: _Bytes,
        interleaved_head_dim: int,
        out: _Bytes,
        as_codes: bool = False,
    ) -> None:
        """Repacks the rows of a file, data [rows * row bytes], to out [packed_bytes].

        as_codes: F16 and BF16 to I16, of which packed_bytes, linear and dequantize know as well.
        """

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
        fast: bool = False,
    ) -> None:
        """x [tokens, columns] times rows row_begin..row_end of the weight: out [tokens, those].

        row_begin is a multiple of 16; row_end too, or the number of rows. fast: with inputs of 8
        bits; ValueError where there is no such product.
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
    def has_fast(isa: str, type: str) -> bool:
        """Whether there is a product of this type with inputs of 8 bits."""

    @staticmethod
    def quantize_bytes(isa: str, x: _Floats, codes: _Int8, scales: _Floats, sums: _Int32) -> None:
        """x [n] rounded to codes [n], scales [n/16], sums [n/16]; n a multiple of 32."""

    @staticmethod
    def quantize_runs(isa: str, x: _Floats, codes: _Int16, scales: _Floats) -> None:
        """x [n] rounded to codes [n] and scales [ceil(n/128)], as products of I16 take them."""

    @staticmethod
    def encode(isa: str, type: str, weights: _Bytes, codes: _Int16) -> float:
        """Up to 512 weights of F16 or BF16 to codes of I16, an even number of them; their scale."""

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
    def weigh(isa: str, x: _Floats, greatest: float, factor: float, out: _Floats) -> float:
        """exp((x - greatest) * factor), both [n], and their sum; x is nowhere above greatest."""

    @staticmethod
    def add(isa: str, x: _Floats, out: _Floats) -> None:
        """out += x, both [n]."""

    @staticmethod
    def store_kv(
        isa: str, k: _Floats, v: _Floats, slot: int, k_block: _Int16, v_block: _Int16
    ) -> None:
        """k [d] and v [d] into slot 0..31 of k_block and v_block [32 * (d + 2)]."""

    @staticmethod
    def attention(
        isa: str,
        q: _Floats,
        out: _Floats,
        length: int,
        scale: float,
        pool: _Int16,
        block_table: _Int32,
        block_stride: int,
        k_offset: int,
        v_offset: int,
        by_segments: bool = False,
    ) -> None:
        """Successive tokens and one KV head: q, out [tokens, group, d].

        The first token sees `length` tokens of the pool, each next one a token more.
        by_segments computes the segments of a single token one by one, the last first.

        Block b of the pool starts at element b * block_stride; K and V [32 * (d + 2)] of the head
        stand k_offset and v_offset behind it.
        """
