"""The published checkpoints. An instruct model has the shape of its base model.

Sources: the config.json files of the HuggingFaceTB repositories. SmolLM3-3B has 16 heads of 128
over 4 KV heads; documents that say 32 over 8 are wrong (the shapes of its weights fit both).
"""

from __future__ import annotations

from dataclasses import replace

from smolrun.model.config import ModelConfig
from smolrun.model.rope import RopeScaling

_SMOLLM_135M = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(),
    no_rope_layers=(1,) * 30,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0,),
    pad_token_id=None,
)
_SMOLLM_360M = replace(
    _SMOLLM_135M,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
    no_rope_layers=(1,) * 32,
)
_SMOLLM_1_7B = replace(
    _SMOLLM_135M,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    no_rope_layers=(1,) * 24,
)
_SMOLLM3_3B = ModelConfig(
    model_type="smollm3",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=65536,
    rms_norm_eps=1e-6,
    rope_theta=5_000_000.0,
    rope_scaling=RopeScaling(),
    no_rope_layers=(1, 1, 1, 0) * 9,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_ids=(128001,),
    pad_token_id=128004,
)


def _second(first: ModelConfig, rope_theta: float) -> ModelConfig:
    """SmolLM2 differs from SmolLM in its context and in the base of RoPE."""
    return replace(first, max_position_embeddings=8192, rope_theta=rope_theta)


_BASES = {
    "SmolLM-135M": _SMOLLM_135M,
    "SmolLM-360M": _SMOLLM_360M,
    "SmolLM-1.7B": _SMOLLM_1_7B,
    "SmolLM2-135M": _second(_SMOLLM_135M, 100_000.0),
    "SmolLM2-360M": _second(_SMOLLM_360M, 100_000.0),
    "SmolLM2-1.7B": _second(_SMOLLM_1_7B, 130_000.0),
}

# Base models under their own names, instruct models with -Instruct; SmolLM3 names its base instead.
PRESETS: dict[str, ModelConfig] = {
    **_BASES,
    **{
        f"{name}-Instruct": replace(base, bos_token_id=1, eos_token_ids=(2,), pad_token_id=2)
        for name, base in _BASES.items()
    },
    "SmolLM3-3B": replace(_SMOLLM3_3B, eos_token_ids=(128012,)),
    "SmolLM3-3B-Base": _SMOLLM3_3B,
}

DEFAULT_PRESET = "SmolLM3-3B"


def preset(name: str = DEFAULT_PRESET) -> ModelConfig:
    """The configuration of a published checkpoint, by name in any case.

    KeyError lists the names there are.
    """
    for known, config in PRESETS.items():
        if known.lower() == name.lower():
            return config
    raise KeyError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
