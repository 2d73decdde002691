"""The listing of a model: a straight list of operations over named weights and named buffers.

A `Program` says what one step computes for each of its tokens. It holds no numbers: the native
engine and `reference.py` read the same list. Weights are named as in Hugging Face files; buffers
hold one row of float32 per token of the step, and K and V go to the cache of their layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.model.config import ModelConfig
from smolrun.quant.tensor import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One entry of the listing; field names are the keys of its native form."""

    kind: ClassVar[str] = ""

    def as_dict(self) -> dict[str, object]:
        """The operation as the native engine takes it: its kind and its fields."""
        values: dict[str, object] = {"kind": self.kind}
        values.update((item.name, getattr(self, item.name)) for item in fields(self))
        return values


@dataclass(frozen=True)
class Embed(Operation):
    """out = row `token` of the weight (vocab_size, hidden_size)."""

    kind: ClassVar[str] = "embed"
    weight: str
    out: str


@dataclass(frozen=True)
class NormQKV(Operation):
    """n = RMSNorm(input); out = q n, rotated where rope; k n (rotated) and v n to the cache."""

    kind: ClassVar[str] = "norm_qkv"
    input: str
    norm: str
    epsilon: float
    q: str
    k: str
    v: str
    q_bias: str | None
    k_bias: str | None
    v_bias: str | None
    rope: bool
    layer: int
    out: str


@dataclass(frozen=True)
class Attention(Operation):
    """out = softmax(input K^T / sqrt(head_dim)) V, over the tokens up to each one and itself."""

    kind: ClassVar[str] = "attention"
    input: str
    layer: int
    out: str


@dataclass(frozen=True)
class LinearAdd(Operation):
    """out += weight input + bias."""

    kind: ClassVar[str] = "linear_add"
    input: str
    weight: str
    bias: str | None
    out: str


@dataclass(frozen=True)
class NormSwiGLU(Operation):
    """n = RMSNorm(input); out = silu(gate n + gate_bias) * (up n + up_bias)."""

    kind: ClassVar[str] = "norm_swiglu"
    input: str
    norm: str
    epsilon: float
    gate: str
    up: str
    gate_bias: str | None
    up_bias: str | None
    out: str


@dataclass(frozen=True)
class NormLogits(Operation):
    """logits = weight RMSNorm(input), for the rows of the step that want logits."""

    kind: ClassVar[str] = "norm_logits"
    input: str
    norm: str
    epsilon: float
    weight: str


# Tensors that some files carry and no operation needs: old Llama checkpoints store the inverse
# frequencies of RoPE, which follow from the configuration.
_HARMLESS_ENDINGS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Program:
    """A model's listing, with the shapes that its weights and buffers must have."""

    config: ModelConfig
    operations: tuple[Operation, ...]
    buffers: dict[str, int]  # name -> width, float32 per token
    weights: dict[str, Shape]  # canonical name -> shape, (out, in) or (width,)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compares a file's tensors with the listing, before any kernel runs.

        ModelFormatError names a tensor that is missing, has another shape or another number of
        bytes, or is not part of the model; UnsupportedError one whose meaning smolrun does not run.
        """
        for name, shape in self.weights.items():
            if name not in tensors:
                raise ModelFormatError(self._missing(name, shape, tensors))
            self._check_tensor(name, shape, tensors[name])
        for name, tensor in tensors.items():
            if name in self.weights or name.endswith(_HARMLESS_ENDINGS):
                continue
            if name.startswith("rope_freqs"):
                raise UnsupportedError(
                    f"{tensor.origin}: rope_freqs scales RoPE pair by pair (llama3), "
                    "smolrun runs the default, linear and yarn types"
                )
            raise ModelFormatError(
                f"{tensor.origin}: tensor {name} {tensor.shape} is no part of this "
                f"{self.config.model_type} model ({self._options()}); the file contradicts its "
                "configuration"
            )

    def _check_tensor(self, name: str, shape: Shape, tensor: Tensor) -> None:
        if tensor.shape != shape:
            raise ModelFormatError(
                f"{tensor.origin}: tensor {name} must have shape {shape}, found {tensor.shape}; "
                "the file contradicts its configuration"
            )
        if len(shape) == 1 and not tensor.type.is_float:
            raise UnsupportedError(
                f"{tensor.origin}: tensor {name} is a vector of type {tensor.type.value}; "
                "smolrun runs vectors of F32, F16 and BF16"
            )
        try:
            expected = tensor.rows * tensor.type.row_bytes(tensor.columns)
        except ValueError as error:
            raise ModelFormatError(f"{tensor.origin}: tensor {name}: {error}") from None
        if tensor.data.nbytes != expected:
            raise ModelFormatError(
                f"{tensor.origin}: tensor {name} {shape} of type {tensor.type.value} must have "
                f"{expected} bytes, found {tensor.data.nbytes}"
            )
        if tensor.interleaved_head_dim not in (0, self.config.head_dim):
            raise ModelFormatError(
                f"{tensor.origin}: tensor {name} interleaves rows of heads of "
                f"{tensor.interleaved_head_dim}, the model has heads of {self.config.head_dim}"
            )

    def _missing(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> str:
        origin = next((tensor.origin for tensor in tensors.values()), "the file")
        return (
            f"{origin.split(': ')[0]}: tensor {name} of shape {shape} is missing "
            f"({len(tensors)} tensors found, {len(self.weights)} needed for this "
            f"{self.config.model_type} model: {self._options()})"
        )

    def _options(self) -> str:
        config = self.config
        return (
            f"{config.num_hidden_layers} layers, "
            f"{'tied' if config.tie_word_embeddings else 'untied'} head, attention biases "
            f"{'on' if config.attention_bias else 'off'}, mlp biases "
            f"{'on' if config.mlp_bias else 'off'}"
        )

    def __str__(self) -> str:
        config = self.config
        lines = [
            f"{config.model_type}: {self._options()}, {config.num_attention_heads} heads of "
            f"{config.head_dim} over {config.num_key_value_heads} KV heads, "
            f"{config.num_parameters:,} parameters",
            "buffers: " + ", ".join(f"{name}[{width}]" for name, width in self.buffers.items()),
        ]
        lines += [
            f"{number:4} {self._line(operation)}"
            for number, operation in enumerate(self.operations)
        ]
        return "\n".join(lines)

    def _line(self, operation: Operation) -> str:
        """`norm_qkv    query, kv[3] = hidden: model.layers.3.input_layernorm.weight[576], ...`."""
        values = operation.as_dict()
        out = str(values.get("out", "logits"))
        if isinstance(operation, NormQKV):
            out += f", kv[{operation.layer}]"
        source = str(values.get("input", "tokens"))
        if isinstance(operation, Attention):
            source += f", kv[{operation.layer}]"
        parts = [
            f"{name}{list(self.weights[name])}"
            for name in (v for k, v in values.items() if k not in ("input", "out", "kind"))
            if isinstance(name, str)
        ]
        if isinstance(operation, NormQKV):
            parts.append("RoPE" if operation.rope else "NoPE")
        sign = "+=" if isinstance(operation, LinearAdd) else "="
        tail = ": " + ", ".join(parts) if parts else ""
        return f"{operation.kind:11} {out} {sign} {source}{tail}"


@dataclass
class ProgramBuilder:
    """Writes a Program down, one call per operation, and checks each as it is added.

    ValueError where a call contradicts the configuration or what was declared before: such a
    mistake is in the architecture's code, not in a model file.
    """

    config: ModelConfig
    _operations: list[Operation] = field(default_factory=list)
    _buffers: dict[str, int] = field(default_factory=dict)
    _weights: dict[str, Shape] = field(default_factory=dict)
    _cached_layers: list[int] = field(default_factory=list)  # whose norm_qkv is written down

    def buffer(self, name: str, width: int) -> str:
        """Declares a buffer of `width` float32 per token; returns its name."""
        if name in self._buffers:
            raise ValueError(f"buffer {name} is declared twice")
        self._buffers[name] = width
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Declares a weight, (out, in) or (width,); returns its name."""
        if self._weights.setdefault(name, shape) != shape:
            raise ValueError(f"weight {name} has shape {self._weights[name]}, now {shape}")
        return name

    def embed(self, *, weight: str, out: str) -> None:
        """out = the token's row of the weight."""
        self._expect(weight, self.config.vocab_size, self._width(out))
        self._operations.append(Embed(weight, out))

    def norm_qkv(
        self,
        *,
        input: str,
        norm: str,
        q: str,
        k: str,
        v: str,
        q_bias: str | None = None,
        k_bias: str | None = None,
        v_bias: str | None = None,
        rope: bool,
        layer: int,
        out: str,
    ) -> None:
        """RMSNorm, then q to `out` and k, v to the cache of `layer`; q and k rotated where rope."""
        config, width = self.config, self._width(input)
        q_rows = config.num_attention_heads * config.head_dim
        kv_rows = config.num_key_value_heads * config.head_dim
        self._expect(norm, width)
        for weight, bias, rows in ((q, q_bias, q_rows), (k, k_bias, kv_rows), (v, v_bias, kv_rows)):
            self._expect(weight, rows, width)
            self._expect_bias(bias, rows)
        self._expect_width(out, q_rows)
        self._cached_layers.append(layer)
        self._operations.append(
            NormQKV(
                input, norm, config.rms_norm_eps, q, k, v, q_bias, k_bias, v_bias, rope, layer, out
            )
        )

    def attention(self, *, input: str, layer: int, out: str) -> None:
        """Causal attention of the queries in `input` over the cache of `layer`."""
        rows = self.config.num_attention_heads * self.config.head_dim
        self._expect_width(input, rows)
        self._expect_width(out, rows)
        if layer not in self._cached_layers:
            raise ValueError(f"attention of layer {layer} stands before its norm_qkv")
        if input == out:
            raise ValueError("attention can not write over its queries")
        self._operations.append(Attention(input, layer, out))

    def linear_add(self, *, input: str, weight: str, bias: str | None = None, out: str) -> None:
        """out += weight input + bias."""
        self._expect(weight, self._width(out), self._width(input))
        self._expect_bias(bias, self._width(out))
        if input == out:
            raise ValueError("linear_add can not write over its input")
        self._operations.append(LinearAdd(input, weight, bias, out))

    def norm_swiglu(
        self,
        *,
        input: str,
        norm: str,
        gate: str,
        up: str,
        gate_bias: str | None = None,
        up_bias: str | None = None,
        out: str,
    ) -> None:
        """RMSNorm, then out = silu(gate) * up."""
        width, rows = self._width(input), self._width(out)
        self._expect(norm, width)
        for weight, bias in ((gate, gate_bias), (up, up_bias)):
            self._expect(weight, rows, width)
            self._expect_bias(bias, rows)
        self._operations.append(
            NormSwiGLU(input, norm, self.config.rms_norm_eps, gate, up, gate_bias, up_bias, out)
        )

    def norm_logits(self, *, input: str, norm: str, weight: str) -> None:
        """RMSNorm, then the logits (vocab_size,) of the rows that want them."""
        self._expect(norm, self._width(input))
        self._expect(weight, self.config.vocab_size, self._width(input))
        self._operations.append(NormLogits(input, norm, self.config.rms_norm_eps, weight))

    def build(self) -> Program:
        """The finished listing; ValueError where a layer is missing or out of order."""
        layers = self.config.num_hidden_layers
        if self._cached_layers != list(range(layers)):
            raise ValueError(
                f"norm_qkv runs for layers {self._cached_layers}, the model has {layers}"
            )
        kinds = [operation.kind for operation in self._operations]
        if kinds[0] != "embed" or kinds[-1] != "norm_logits":
            raise ValueError(f"a listing goes from embed to norm_logits, found {kinds}")
        unused = set(self._weights) - set(_weight_names(self._operations))
        if unused:
            raise ValueError(f"weights that no operation reads: {sorted(unused)}")
        return Program(
            self.config, tuple(self._operations), dict(self._buffers), dict(self._weights)
        )

    def _width(self, buffer: str) -> int:
        if buffer not in self._buffers:
            raise ValueError(f"buffer {buffer} is not declared")
        return self._buffers[buffer]

    def _expect_width(self, buffer: str, width: int) -> None:
        if self._width(buffer) != width:
            raise ValueError(f"buffer {buffer} is {self._width(buffer)} wide, needed: {width}")

    def _expect(self, weight: str, *shape: int) -> None:
        if self._weights.get(weight) != shape:
            raise ValueError(f"weight {weight} is {self._weights.get(weight)}, needed: {shape}")

    def _expect_bias(self, bias: str | None, rows: int) -> None:
        if bias is not None:
            self._expect(bias, rows)


def _weight_names(operations: Iterable[Operation]) -> Iterable[str]:
    for operation in operations:
        for key, value in operation.as_dict().items():
            if key not in ("kind", "input", "out") and isinstance(value, str):
                yield value
