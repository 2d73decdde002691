"""What a step must do at the least: bytes to read and operations to compute, counted exactly.

Every weight is read once per step, and so are the keys and values of every sequence; a token that
is looked up reads one row of the embedding. A multiplication and an addition are two operations.
Norms, biases, RoPE and softmax, together well below a hundredth, are left out. What follows K and V
of the last layer is only computed for the tokens whose logits are wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smolrun.model.program import (
    Attention,
    Embed,
    LinearAdd,
    NormLogits,
    NormQKV,
    NormSwiGLU,
    Operation,
    Program,
)
from smolrun.quant.types import WeightType

if TYPE_CHECKING:
    from smolrun.engine.native import Activations


@dataclass(frozen=True)
class StepShape:
    """A step of `sequences` sequences, each of which takes in `tokens` tokens after `start`."""

    tokens: int = 1
    start: int = 0  # tokens already in the cache
    sequences: int = 1
    logits: bool = True  # of the last token of every sequence

    @property
    def attended(self) -> int:
        """Tokens that the step's tokens look at, all together."""
        each = self.tokens * self.start + self.tokens * (self.tokens + 1) // 2
        return each * self.sequences

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.tokens * self.sequences

    @property
    def narrowed(self) -> StepShape:
        """What the step goes on with after K and V of the last layer: the tokens with logits."""
        last = self.start + self.tokens - 1
        return StepShape(1, last, self.sequences if self.logits else 0, self.logits)


@dataclass(frozen=True)
class Work:
    """An amount of work."""

    weight_bytes: int = 0
    kv_bytes: int = 0  # read and written
    # By the fastest arithmetic that weights and activations allow: see `arithmetic_of`.
    operations: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes to and from memory."""
        return self.weight_bytes + self.kv_bytes

    @property
    def total_operations(self) -> int:
        """Operations of all kinds."""
        return sum(self.operations.values())

    def __add__(self, other: Work) -> Work:
        return Work(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            Counter(self.operations) + Counter(other.operations),
        )


def total(parts: Iterable[Work]) -> Work:
    """All of it together."""
    return sum(parts, Work())


def arithmetic_of(weight_type: WeightType, activation_bits: int, *, codes: bool) -> str:
    """The fastest arithmetic that a product could use: "f32", "int16" or "int8".

    `activation_bits`, 8 or 16, are those of the inputs of quantized weights. Inputs of 16 bits take
    one product of 16 bits or two of 8, which is the same rate.
    `codes`: whether F16 and BF16 are rounded to 16 bits, and their inputs.
    """
    if weight_type.is_float:
        return "int16" if codes and weight_type is not WeightType.F32 else "f32"
    return f"int{activation_bits}"


class WorkCounter:
    """Counts the work of steps of one model.

    Args:
        program: the model's listing.
        types: weight type of every matrix, by its canonical name.
        activations: as of `load_model`.
    """

    def __init__(
        self,
        program: Program,
        types: Mapping[str, WeightType],
        activations: Activations = "exact",
    ) -> None:
        self._program = program
        self._types = types
        self._bits = 8 if activations == "fast" else 16
        self._codes = activations == "fast"
        last = max(i for i, op in enumerate(program.operations) if isinstance(op, NormQKV))
        self._last = program.operations[last]
        self._after_last = frozenset(program.operations[last + 1 :])

    def step(self, shape: StepShape) -> Work:
        """The work of a whole step."""
        return total(self.operation(operation, shape) for operation in self._program.operations)

    def steps(self, shapes: Iterable[StepShape]) -> Work:
        """The work of steps one after the other."""
        return total(self.step(shape) for shape in shapes)

    def operation(self, operation: Operation, shape: StepShape) -> Work:
        """The work of one operation of a step. ValueError for one that is not known."""
        config = self._program.config
        if operation in self._after_last:
            shape = shape.narrowed
        rows = shape.rows
        kv_row_bytes = config.kv_bytes_per_token // config.num_hidden_layers
        if isinstance(operation, Embed):
            columns = self._program.weights[operation.weight][1]
            return Work(rows * self._types[operation.weight].row_bytes(columns))
        if isinstance(operation, NormQKV):
            q_rows = shape.narrowed.rows if operation == self._last else rows
            products = self._products((operation.q,), q_rows, self._bits)
            products += self._products((operation.k,), rows, self._bits)
            products += self._products((operation.v,), rows, 16)  # V and head stay exact
            return products + Work(kv_bytes=rows * kv_row_bytes)
        if isinstance(operation, Attention):
            read = shape.sequences * (shape.start + shape.tokens) * kv_row_bytes
            width = config.num_attention_heads * config.head_dim
            return Work(kv_bytes=read, operations={"int16": 4 * width * shape.attended})
        if isinstance(operation, LinearAdd):
            return self._products((operation.weight,), rows, self._bits)
        if isinstance(operation, NormSwiGLU):
            return self._products((operation.gate, operation.up), rows, self._bits)
        if isinstance(operation, NormLogits):
            return self._products((operation.weight,), rows, 16)
        raise ValueError(f"no count for operation {operation.kind}")

    def _products(self, weights: Iterable[str], tokens: int, bits: int) -> Work:
        if tokens == 0:
            return Work()
        parts = []
        for name in weights:
            out, columns = self._program.weights[name]
            weight_type = self._types[name]
            operations = {
                arithmetic_of(weight_type, bits, codes=self._codes): 2 * out * columns * tokens
            }
            parts.append(Work(out * weight_type.row_bytes(columns), operations=operations))
        return total(parts)


def chunks(tokens: int, start: int, most: int) -> list[StepShape]:
    """The steps that take in a prompt: of at most `most` tokens, the last with logits."""
    begins = range(0, tokens, most)
    return [
        StepShape(min(most, tokens - begin), start + begin, logits=begin + most >= tokens)
        for begin in begins
    ]
