"""The correctness stamp: what the measured model says, held to the reference reading.

The native runner continues a fixed prompt greedily. The reference (model/reference.py, NumPy) then
reads prompt and continuation in one go, and its logits say at each position whether the token taken
was the likeliest, and if not, by how much it fell short.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from smolrun.measure.sequences import Sequences
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.blocks import tensor_values

if TYPE_CHECKING:
    from smolrun.engine.engine import Engine
    from smolrun.model.program import Program
    from smolrun.quant.tensor import Tensor

TOKENS = 32
PROMPT_TOKENS = 8
# Beyond so many parameters the reference computes in float32, and checks fewer tokens: in float64 a
# model of three thousand million would take minutes and twice the memory.
LARGE = 500_000_000
TOKENS_OF_LARGE = 4
ROWS_AT_A_TIME = 4096  # that are dequantized together
# How far below the reference's best a chosen token's logit may be: what two roundings can swap.
# Eight-bit activations move logits, which span about 30, by a few tenths.
TOLERANCE = 0.5
# Ten times what eight-bit activations cost; a wrong weight or position costs a hundred times more.
NMSE_LIMIT = 5e-3


@dataclass(frozen=True)
class Stamp:
    """What was checked, and how it came out."""

    tokens: tuple[int, ...]  # chosen greedily
    agreed: int  # of these, the reference's own choice
    largest_gap: float  # by which a chosen token's logit was below the reference's best
    nmse: float  # of the last position's logits, native against reference
    reference: str  # what the reference computed in

    @property
    def digest(self) -> str:
        """Hash of the tokens: the same on every run with the same build, file and machine."""
        return hashlib.sha256(np.array(self.tokens, "<i4").tobytes()).hexdigest()[:16]

    @property
    def correct(self) -> bool:
        """Whether every token was the reference's choice, or as good, and the logits are close."""
        return self.largest_gap <= TOLERANCE and self.nmse <= NMSE_LIMIT

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "hash": self.digest,
            "correct": self.correct,
            "tokens": list(self.tokens),
            "agreed": self.agreed,
            "largest_gap": self.largest_gap,
            "nmse": self.nmse,
            "reference": self.reference,
        }

    def __str__(self) -> str:
        verdict = "as the reference" if self.correct else "NOT as the reference"
        return (
            f"{verdict}: {self.agreed} of {len(self.tokens)} greedy tokens agree, largest gap "
            f"{self.largest_gap:.2g}, NMSE {self.nmse:.1e} ({self.reference}); hash {self.digest}"
        )


def prompt_tokens(vocab_size: int, count: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Token ids (count,) of a prompt that is the same on every machine, away from special ones."""
    low = min(256, vocab_size // 2)
    spread = (np.arange(count, dtype=np.int64) + seed * 7919) * 2654435761 % (vocab_size - low)
    return (low + spread).astype(np.int32)


def memory_needed(program: Program) -> int:
    """Bytes that the reference reading takes beside the model, at about the most."""
    largest = max(math.prod(shape) for shape in program.weights.values())
    # In float32, and where the model is not large also in float64; logits and temporaries.
    each = 4 if program.config.num_parameters > LARGE else 12
    return largest * each + (256 << 20)


def stamp(engine: Engine, program: Program, tensors: Mapping[str, Tensor]) -> Stamp:
    """Run both readings. `tensors` are those of the file, which must be open."""
    large = program.config.num_parameters > LARGE
    count = TOKENS_OF_LARGE if large else TOKENS
    dtype = np.float32 if large else np.float64
    prompt = prompt_tokens(program.config.vocab_size, PROMPT_TOKENS)
    with Sequences(engine, 1, len(prompt) + count) as sequences:
        sequences.prefill(prompt)
        first = sequences.logits().argmax(axis=1).astype(np.int32)
        _, others = sequences.decode(first, len(prompt), count - 1)
        native = sequences.logits()[0].copy()  # of the last token chosen
    chosen = np.concatenate((first, others[0]))

    values = _LazyValues(tensors)
    reference = ReferenceRunner(program, values, dtype=dtype, rounded_kv=True)
    values.start()
    taken = np.concatenate((prompt, chosen[:-1]))
    wanted = np.arange(len(prompt) - 1, len(taken))
    logits = reference.step(taken, np.arange(len(taken)), np.zeros(len(taken)), wanted)
    best = logits.max(axis=1)
    gaps = best - logits[np.arange(count), chosen]
    expected = logits[-1].astype(np.float64)
    return Stamp(
        tokens=tuple(int(token) for token in chosen),
        agreed=int(np.sum(logits.argmax(axis=1) == chosen)),
        largest_gap=float(gaps.max()),
        nmse=float(np.sum((native - expected) ** 2) / np.sum(expected**2)),
        reference=f"NumPy, {np.dtype(dtype).name}" + (", a short check" if large else ""),
    )


def _values(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The values of a tensor; of a large one, some rows at a time, as temporaries are larger."""
    if len(tensor.shape) == 1 or tensor.interleaved_head_dim:
        return tensor_values(tensor)
    values = np.empty(tensor.shape, np.float32)
    row_bytes = tensor.type.row_bytes(tensor.columns)
    for begin in range(0, tensor.rows, ROWS_AT_A_TIME):
        end = min(begin + ROWS_AT_A_TIME, tensor.rows)
        data = tensor.data[begin * row_bytes : end * row_bytes]
        part = replace(tensor, shape=(end - begin, tensor.columns), data=data)
        values[begin:end] = tensor_values(part)
    return values


class _LazyValues(Mapping[str, npt.NDArray[np.float32]]):
    """Values made as they are read, so that memory holds one matrix in float32, not all.

    Until `start` is called they are zeros of the right shapes, which take neither time nor memory:
    a ReferenceRunner looks at all shapes as it is made.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._started = False
        self._last: tuple[str, npt.NDArray[np.float32]] | None = None

    def start(self) -> None:
        self._started = True

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._tensors[name]
        if not self._started:
            return np.broadcast_to(np.float32(0), tensor.shape)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, _values(tensor))
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
