"""The architecture of SmolLM, SmolLM2 and SmolLM3.

A Llama: pre-norm RMSNorm, grouped-query attention with RoPE, SwiGLU. SmolLM3 differs in that some
layers leave RoPE out (NoPE), which is an argument of the layer. Names are those of Hugging Face.
"""

from __future__ import annotations

from smolrun.model.config import ModelConfig
from smolrun.model.program import Program, ProgramBuilder


def build(config: ModelConfig) -> Program:
    """The listing of a model of this configuration."""
    builder = ProgramBuilder(config)
    width = config.hidden_size
    query_width = config.num_attention_heads * config.head_dim
    hidden = builder.buffer("hidden", width)
    builder.buffer("query", query_width)
    builder.buffer("attention", query_width)
    builder.buffer("ffn", config.intermediate_size)

    embedding = builder.weight("model.embed_tokens.weight", config.vocab_size, width)
    builder.embed(weight=embedding, out=hidden)
    for layer in range(config.num_hidden_layers):
        _attention(builder, layer)
        _ffn(builder, layer)
    builder.norm_logits(
        input=hidden,
        norm=builder.weight("model.norm.weight", width),
        weight=(
            embedding
            if config.tie_word_embeddings
            else builder.weight("lm_head.weight", config.vocab_size, width)
        ),
    )
    return builder.build()


def _attention(builder: ProgramBuilder, layer: int) -> None:
    """hidden += o attention(q, k, v of RMSNorm(hidden))."""
    config = builder.config
    prefix = f"model.layers.{layer}"
    width = config.hidden_size
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim

    def bias(name: str, rows: int) -> str | None:
        if not config.attention_bias:
            return None
        return builder.weight(f"{prefix}.self_attn.{name}_proj.bias", rows)

    def weight(name: str, rows: int, columns: int) -> str:
        return builder.weight(f"{prefix}.self_attn.{name}_proj.weight", rows, columns)

    builder.norm_qkv(
        input="hidden",
        norm=builder.weight(f"{prefix}.input_layernorm.weight", width),
        q=weight("q", query_width, width),
        k=weight("k", kv_width, width),
        v=weight("v", kv_width, width),
        q_bias=bias("q", query_width),
        k_bias=bias("k", kv_width),
        v_bias=bias("v", kv_width),
        rope=config.no_rope_layers[layer] == 1,
        layer=layer,
        out="query",
    )
    builder.attention(input="query", layer=layer, out="attention")
    builder.linear_add(
        input="attention",
        weight=weight("o", width, query_width),
        bias=bias("o", width),
        out="hidden",
    )


def _ffn(builder: ProgramBuilder, layer: int) -> None:
    """hidden += down (silu(gate n) * up n), n = RMSNorm(hidden)."""
    config = builder.config
    prefix = f"model.layers.{layer}"
    width, ffn_width = config.hidden_size, config.intermediate_size

    def bias(name: str, rows: int) -> str | None:
        if not config.mlp_bias:
            return None
        return builder.weight(f"{prefix}.mlp.{name}_proj.bias", rows)

    def weight(name: str, rows: int, columns: int) -> str:
        return builder.weight(f"{prefix}.mlp.{name}_proj.weight", rows, columns)

    builder.norm_swiglu(
        input="hidden",
        norm=builder.weight(f"{prefix}.post_attention_layernorm.weight", width),
        gate=weight("gate", ffn_width, width),
        up=weight("up", ffn_width, width),
        gate_bias=bias("gate", ffn_width),
        up_bias=bias("up", ffn_width),
        out="ffn",
    )
    builder.linear_add(
        input="ffn", weight=weight("down", width, ffn_width), bias=bias("down", width), out="hidden"
    )
