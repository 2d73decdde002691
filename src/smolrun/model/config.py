"""What a model is made of: its sizes and settings, read from config.json or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from smolrun.errors import RequestError
from smolrun.model.fields import Fields, decimal, token_id
from smolrun.model.rope import RopeScaling, RopeType, rope_parameters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ModelConfig", "RopeScaling"]

ModelType = Literal["llama", "smollm3"]

# Bounds far above any model of the family; they keep a hostile file from asking for a loop or an
# allocation that never ends before its tensors are compared with these numbers.
MAX_VOCAB_SIZE = 1 << 24
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
# float32 holds every integer up to here; past it neighbouring positions would rotate alike.
MAX_POSITIONS = 1 << 24
MIN_THETA, MAX_THETA = 2.0, 1e12
MAX_FACTOR = 65536.0
MIN_BETA = 1e-6
# SmolLM3 leaves RoPE out in every fourth layer. GGUF carries no key for it.
NO_ROPE_LAYER_INTERVAL = 4


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and settings of a model, under the names of Hugging Face's config.json."""

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # tokens of context
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    # Per layer: 1 where RoPE is used, 0 where it is not (NoPE). The field's name means the opposite
    # of what it says.
    no_rope_layers: tuple[int, ...]
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, object], origin: str) -> ModelConfig:
        """The configuration in a parsed config.json; `origin` names the file in messages.

        ModelFormatError names a key that is missing or out of range, UnsupportedError one that asks
        for what smolrun does not run.
        """
        fields = Fields(values, origin)
        model_type = _known_model_type(fields, "model_type")
        _refuse_foreign_settings(fields)
        sizes = _sizes(fields, _HUGGING_FACE_KEYS, model_type)
        layers = sizes["num_hidden_layers"]
        max_positions = sizes["max_position_embeddings"]
        theta, scaling = _hugging_face_rope(fields, model_type, max_positions)
        if fields.has("rope_interleaved") and fields.boolean("rope_interleaved", False):
            raise fields.unsupported("rope_interleaved", "false", True)
        vocab_size = sizes["vocab_size"]
        return cls(
            model_type=model_type,
            **sizes,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            no_rope_layers=_hugging_face_pattern(fields, model_type, layers),
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=fields.boolean("mlp_bias", False),
            # Published SmolLM3 files leave the key out and mean true.
            tie_word_embeddings=fields.boolean("tie_word_embeddings", model_type == "smollm3"),
            bos_token_id=_optional_token(fields, "bos_token_id", vocab_size),
            eos_token_ids=_eos_tokens(fields, vocab_size),
            # -1 is how early Llama files say "none".
            pad_token_id=(
                None
                if fields.get("pad_token_id") == -1
                else _optional_token(fields, "pad_token_id", vocab_size)
            ),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], origin: str) -> ModelConfig:
        """The configuration in a GGUF file's metadata; `origin` names the file in messages.

        GGUF has no key for tied embeddings and biases: the tensors in the file tell. The head is
        taken as tied and biases as absent until with_tied and with_biases say otherwise. Errors as
        in from_hugging_face.
        """
        model_type = _known_model_type(Fields(metadata, origin), "general.architecture")
        fields = Fields(metadata, origin, f"{model_type}.")
        tokenizer = Fields(metadata, origin, "tokenizer.ggml.")
        listed = tokenizer.length("tokens", MAX_VOCAB_SIZE) if tokenizer.has("tokens") else None
        sizes = _sizes(fields, _GGUF_KEYS, model_type, vocab_size=listed)
        head_dim = sizes["head_dim"]
        for key in ("attention.value_length", "rope.dimension_count"):
            if fields.integer(key, 1, MAX_HEAD_DIM, head_dim) != head_dim:
                raise fields.unsupported(key, f"the head size, {head_dim}", fields.get(key))
        vocab_size = sizes["vocab_size"]
        own = Fields(metadata, origin, "smolrun.")
        layers = sizes["num_hidden_layers"]
        pattern = (
            _pattern(own, "no_rope_layers", layers)
            if own.has("no_rope_layers")
            else _interval_pattern(layers, NO_ROPE_LAYER_INTERVAL if model_type == "smollm3" else 0)
        )
        eos = [
            _optional_token(tokenizer, key, vocab_size)
            for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        ]
        if own.has("eos_token_ids"):
            eos += [
                token_id(own, "eos_token_ids", value, vocab_size)
                for value in own.sequence("eos_token_ids", 1024)
            ]
        return cls(
            model_type=model_type,
            **sizes,
            rms_norm_eps=decimal(fields.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0)),
            rope_theta=decimal(
                fields.number("rope.freq_base", MIN_THETA, MAX_THETA, _default_theta(model_type))
            ),
            rope_scaling=_with_own_settings(
                _gguf_scaling(fields, sizes["max_position_embeddings"]),
                Fields(metadata, origin, "smolrun.rope_scaling."),
            ),
            no_rope_layers=pattern,
            attention_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            bos_token_id=_optional_token(tokenizer, "bos_token_id", vocab_size),
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
            pad_token_id=_optional_token(tokenizer, "padding_token_id", vocab_size),
        )

    def with_tied(self, tied: bool) -> ModelConfig:
        """This configuration with the output head tied to the embedding, or not.

        Tensors overrule the file's word: the head is tied where there is no lm_head.weight.
        """
        return replace(self, tie_word_embeddings=tied)

    def with_biases(self, *, attention: bool, mlp: bool) -> ModelConfig:
        """This configuration with or without biases (GGUF: the tensors tell)."""
        return replace(self, attention_bias=attention, mlp_bias=mlp)

    def with_context(self, context_size: int) -> ModelConfig:
        """The configuration that runs a context of `context_size` tokens.

        Itself where the model's own limit holds them. SmolLM3, and any model that uses YaRN
        already, is stretched by YaRN with the factor needed: 2.0 for 131072 tokens on the
        published SmolLM3. RequestError where the model can not be stretched.
        """
        if context_size <= self.max_position_embeddings:
            return self
        scaling = self.rope_scaling
        stretchable = scaling.type == "yarn" or (
            self.model_type == "smollm3" and scaling.type == "default"
        )
        if not stretchable or context_size > MAX_POSITIONS:
            limit = MAX_POSITIONS if stretchable else self.max_position_embeddings
            raise RequestError(
                f"a context of {context_size} tokens was asked for; this model holds at most "
                f"{limit}: ask for that or less"
            )
        original = scaling.original_max_position_embeddings or self.max_position_embeddings
        stretched = replace(
            scaling,
            type="yarn",
            factor=max(context_size / original, 1.0),
            original_max_position_embeddings=original,
        )
        return replace(self, rope_scaling=stretched, max_position_embeddings=context_size)

    def rope_parameters(self) -> tuple[npt.NDArray[np.float32], float]:
        """Inverse frequencies (head_dim / 2,) in radians per token; the factor on cos and sin."""
        return rope_parameters(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        q = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv)
        ffn = 3 * self.hidden_size * self.intermediate_size
        if self.attention_bias:
            attention += q + 2 * kv + self.hidden_size
        if self.mlp_bias:
            ffn += 2 * self.intermediate_size + self.hidden_size
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        layer = attention + ffn + 2 * self.hidden_size
        return embedding + self.num_hidden_layers * layer + self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token takes in the KV cache: 16-bit codes, a float scale a head."""
        return self.num_hidden_layers * 2 * self.num_key_value_heads * (self.head_dim * 2 + 4)


_HUGGING_FACE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_GGUF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
}


def _sizes(
    fields: Fields, keys: Mapping[str, str], model_type: ModelType, vocab_size: int | None = None
) -> dict[str, int]:
    """The eight sizes, each in its range and consistent with the others.

    `vocab_size` stands in where the key is absent.
    """
    sizes = {"vocab_size": fields.integer(keys["vocab_size"], 1, MAX_VOCAB_SIZE, vocab_size)}
    sizes |= {
        name: fields.integer(keys[name], 1, high)
        for name, high in (
            ("hidden_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("num_hidden_layers", MAX_LAYERS),
            ("num_attention_heads", MAX_HEADS),
            ("max_position_embeddings", MAX_POSITIONS),
        )
    }
    heads, hidden_size = sizes["num_attention_heads"], sizes["hidden_size"]
    key = keys["num_key_value_heads"]
    # Llama files without the key predate grouped heads; a SmolLM3 file without it is incomplete,
    # but an explicit null means "as many as query heads".
    grouped_by_name = model_type == "smollm3" and fields.prefix + key not in fields.values
    kv_heads = fields.integer(key, 1, heads, None if grouped_by_name else heads)
    if heads % kv_heads:
        raise fields.error(key, f"a divisor of {keys['num_attention_heads']} = {heads}", kv_heads)
    key = keys["head_dim"]
    if not fields.has(key) and hidden_size % heads:
        raise fields.error(
            keys["hidden_size"],
            f"a multiple of {keys['num_attention_heads']} = {heads} where {key} is absent",
            hidden_size,
        )
    head_dim = fields.integer(key, 2, MAX_HEAD_DIM, hidden_size // heads)
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise fields.error(key, f"an even number from 2 to {MAX_HEAD_DIM}", head_dim)
    if heads * head_dim > MAX_WIDTH:
        raise fields.error(key, f"at most {MAX_WIDTH} over all {heads} heads", head_dim)
    return {**sizes, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _known_model_type(fields: Fields, key: str) -> ModelType:
    model_type = fields.text(key)
    if model_type not in ("llama", "smollm3"):
        raise fields.unsupported(key, "llama (SmolLM, SmolLM2) and smollm3 (SmolLM3)", model_type)
    return cast(ModelType, model_type)


def _default_theta(model_type: ModelType) -> float | None:
    # The first Llama files have no such key. transformers' default for SmolLM3 is not the value of
    # any published SmolLM3, so there the key must be in the file.
    return 10000.0 if model_type == "llama" else None


def _refuse_foreign_settings(fields: Fields) -> None:
    """UnsupportedError for settings that would change the result and that smolrun does not run."""
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.unsupported("hidden_act", "silu", activation)
    if fields.has("quantization_config"):
        raise fields.unsupported(
            "quantization_config",
            "unquantized safetensors, and GGUF for quantized weights",
            fields.get("quantization_config"),
        )
    if fields.has("layer_types"):
        for layer_type in fields.sequence("layer_types", MAX_LAYERS):
            if layer_type != "full_attention":
                raise fields.unsupported("layer_types", "full_attention only", layer_type)
    elif fields.boolean("use_sliding_window", False) and fields.has("sliding_window"):
        raise fields.unsupported("use_sliding_window", "full attention only", True)


def _optional_token(fields: Fields, key: str, vocab_size: int) -> int | None:
    return token_id(fields, key, fields.get(key), vocab_size) if fields.has(key) else None


def _eos_tokens(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """An id, a list of ids or null."""
    key = "eos_token_id"
    value = fields.get(key)
    if value is None:
        return ()
    values = fields.sequence(key, 1024) if isinstance(value, (list, tuple)) else [value]
    return tuple(token_id(fields, key, one, vocab_size) for one in values)


def _interval_pattern(layers: int, interval: int) -> tuple[int, ...]:
    """RoPE in all layers but every `interval`-th; interval 0: in all layers."""
    return tuple(int(interval == 0 or (layer + 1) % interval != 0) for layer in range(layers))


def _pattern(fields: Fields, key: str, layers: int) -> tuple[int, ...]:
    values = fields.sequence(key, MAX_LAYERS)
    if len(values) < layers or any(value not in (0, 1) for value in values):
        raise fields.error(key, f"a list of 0 and 1 for each of the {layers} layers", values)
    # transformers allows a longer list, which a pruned model may have kept.
    return tuple(int(cast(int, value)) for value in values[:layers])


def _hugging_face_pattern(fields: Fields, model_type: ModelType, layers: int) -> tuple[int, ...]:
    """The layers with RoPE: an explicit list wins over the interval, as in transformers."""
    if model_type == "llama":
        pattern = _interval_pattern(layers, 0)
        if fields.has("no_rope_layers") and _pattern(fields, "no_rope_layers", layers) != pattern:
            raise fields.error(
                "no_rope_layers", "all 1 where model_type is llama", fields.get("no_rope_layers")
            )
        return pattern
    if fields.has("no_rope_layers"):
        return _pattern(fields, "no_rope_layers", layers)
    interval = fields.integer("no_rope_layer_interval", 1, 1 << 31, NO_ROPE_LAYER_INTERVAL)
    return _interval_pattern(layers, interval)


_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "mscale",
    "mscale_all_dim", "finetuned",
}  # fmt: skip


def _hugging_face_rope(
    fields: Fields, model_type: ModelType, max_positions: int
) -> tuple[float, RopeScaling]:
    """rope_theta and the scaling, from `rope_scaling` (old) or `rope_parameters` (new)."""
    rope = fields.section("rope_scaling")
    if rope is None or not rope.values:
        rope = fields.section("rope_parameters") or Fields({}, fields.origin)
    for owner in (fields, rope):
        if owner.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            raise owner.unsupported(
                "partial_rotary_factor", "1.0", owner.get("partial_rotary_factor")
            )
    unknown = [key for key in rope.values if key not in _ROPE_KEYS]
    theta_owner = rope if rope.has("rope_theta") else fields
    theta = theta_owner.number("rope_theta", MIN_THETA, MAX_THETA, _default_theta(model_type))
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type not in ("default", "linear", "yarn"):
        raise rope.unsupported("rope_type", "default, linear and yarn", rope_type)
    if unknown:
        raise rope.unsupported(str(unknown[0])[:80], "no such key", rope.values[unknown[0]])
    if rope_type == "default":
        return theta, RopeScaling()
    if rope_type == "linear":
        return theta, RopeScaling("linear", rope.number("factor", 1.0, MAX_FACTOR))
    # A key beside the scaling wins over one inside it, as in transformers.
    key = "original_max_position_embeddings"
    owner = fields if fields.has(key) else rope
    original = owner.integer(key, 1, MAX_POSITIONS, max_positions)
    implied = max(max_positions / original, 1.0) if "factor" in rope.values else None
    return theta, RopeScaling(
        type="yarn",
        factor=rope.number("factor", 1.0, MAX_FACTOR, implied),
        original_max_position_embeddings=original,
        attention_factor=_optional_number(rope, "attention_factor"),
        # Zero means "the default", as in transformers.
        beta_fast=rope.number("beta_fast", MIN_BETA, 1e6) if rope.get("beta_fast") else 32.0,
        beta_slow=rope.number("beta_slow", MIN_BETA, 1e6) if rope.get("beta_slow") else 1.0,
        truncate=rope.boolean("truncate", True),
        mscale=_optional_number(rope, "mscale"),
        mscale_all_dim=_optional_number(rope, "mscale_all_dim"),
    )


def _optional_number(fields: Fields, key: str) -> float | None:
    return fields.number(key, 0.0, 1000.0) if fields.has(key) else None


def _optional_decimal(fields: Fields, key: str) -> float | None:
    value = _optional_number(fields, key)
    return None if value is None else decimal(value)


def _with_own_settings(scaling: RopeScaling, own: Fields) -> RopeScaling:
    """The scaling with what smolrun's converter says of it because GGUF has no key for it."""
    return replace(
        scaling,
        truncate=own.boolean("truncate", scaling.truncate),
        mscale=_optional_decimal(own, "mscale"),
        mscale_all_dim=_optional_decimal(own, "mscale_all_dim"),
    )


def _gguf_scaling(fields: Fields, max_positions: int) -> RopeScaling:
    """The scaling in GGUF's keys, `rope.scale_linear` of early files included."""
    key = "rope.scaling.factor" if fields.has("rope.scaling.factor") else "rope.scale_linear"
    # Some writers put 0 for "none".
    factor = decimal(fields.number(key, 0.0, MAX_FACTOR, 0.0)) or 1.0
    if factor < 1.0:
        raise fields.error(key, f"0 or a number from 1 to {MAX_FACTOR:g}", factor)
    # llama.cpp takes a factor without a type for linear.
    name = fields.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if name not in ("none", "linear", "yarn"):
        raise fields.unsupported("rope.scaling.type", "none, linear and yarn", name)
    if name == "none" or (name == "linear" and factor == 1.0):
        return RopeScaling()
    scaling = RopeScaling(type=cast(RopeType, name), factor=factor)
    if name == "linear":
        return scaling
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        key = f"rope.scaling.{key}"
        found = fields.number(key, -1.0, 1000.0, usual)
        if found not in (usual, -1.0):
            raise fields.unsupported(key, f"{usual:g}", found)
    scaling = replace(
        scaling,
        original_max_position_embeddings=fields.integer(
            "rope.scaling.original_context_length", 1, MAX_POSITIONS, max_positions
        ),
        beta_fast=decimal(fields.number("rope.scaling.yarn_beta_fast", MIN_BETA, 1e6, 32.0)),
        beta_slow=decimal(fields.number("rope.scaling.yarn_beta_slow", MIN_BETA, 1e6, 1.0)),
    )
    if fields.has("rope.scaling.yarn_attn_factor"):
        attention_factor = decimal(fields.number("rope.scaling.yarn_attn_factor", 0.0, 1000.0))
        scaling = replace(scaling, attention_factor=attention_factor)
    if fields.has("rope.scaling.attn_factor"):
        # llama.cpp multiplies this onto the magnitude that follows from the factor.
        weight = decimal(fields.number("rope.scaling.attn_factor", 0.0, 1000.0))
        if weight != 1.0:
            magnitude = rope_parameters(10000.0, 2, scaling)[1]
            scaling = replace(scaling, attention_factor=weight * magnitude)
    return scaling
