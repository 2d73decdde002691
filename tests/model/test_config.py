"""Configurations out of config.json and GGUF metadata: the published ones, and hostile ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import ModelFormatError, RequestError, UnsupportedError
from smolrun.model.config import ModelConfig, RopeScaling
from smolrun.model.presets import DEFAULT_PRESET, PRESETS, preset
from tests.models import configs, hugging_face_values

# The published files, reduced to the keys that matter.
SMOLLM2_135M_INSTRUCT: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "use_cache": True,
    "vocab_size": 49152,
}
# No head_dim and no tie_word_embeddings, as published.
SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128012,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pad_token_id": 128004,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
SMOLLM2_135M_GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
}
SMOLLM3_3B_GGUF: dict[str, Any] = {
    "general.architecture": "smollm3",
    "smollm3.block_count": 36,
    "smollm3.context_length": 65536,
    "smollm3.embedding_length": 2048,
    "smollm3.feed_forward_length": 11008,
    "smollm3.attention.head_count": 16,
    "smollm3.attention.head_count_kv": 4,
    "smollm3.rope.freq_base": 5000000.0,
    "smollm3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "smollm3.vocab_size": 128256,
    "smollm3.rope.dimension_count": 128,
    "tokenizer.ggml.bos_token_id": 128000,
    "tokenizer.ggml.eos_token_id": 128012,
    "tokenizer.ggml.padding_token_id": 128012,
}


def read(values: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.from_hugging_face({**values, **changes}, "folder/config.json")


def read_gguf(metadata: dict[str, Any], **changes: Any) -> ModelConfig:
    arch = metadata["general.architecture"]
    renamed = {
        key if key.startswith(("tokenizer.", "smolrun.", "general.")) else f"{arch}.{key}": value
        for key, value in changes.items()
    }
    return ModelConfig.from_gguf({**metadata, **renamed}, "model.gguf")


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def test_published_files_give_the_presets() -> None:
    assert read(SMOLLM2_135M_INSTRUCT) == preset("smollm2-135m-instruct")
    assert read(SMOLLM3_3B) == preset()
    assert read_gguf(SMOLLM2_135M_GGUF) == preset("SmolLM2-135M-Instruct")
    assert read_gguf(SMOLLM3_3B_GGUF) == replace(preset("SmolLM3-3B"), pad_token_id=128012)


def test_the_default_preset_has_the_true_heads() -> None:
    config = PRESETS[DEFAULT_PRESET]
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert heads == (16, 4, 128)
    assert [i for i, rope in enumerate(config.no_rope_layers) if not rope] == list(range(3, 36, 4))
    with pytest.raises(KeyError, match="SmolLM2-360M"):
        preset("smollm4")


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("SmolLM-135M", 134_515_008, 23_760),
        ("SmolLM-360M", 361_821_120, 42_240),
        ("SmolLM-1.7B", 1_711_376_384, 202_752),
        ("SmolLM2-135M", 134_515_008, 23_760),
        ("SmolLM2-360M", 361_821_120, 42_240),
        ("SmolLM2-1.7B", 1_711_376_384, 202_752),
        ("SmolLM3-3B", 3_075_098_624, 74_880),
    ],
)
def test_sizes_of_the_seven_checkpoints(name: str, parameters: int, kv_bytes: int) -> None:
    config = preset(name)
    assert (config.num_parameters, config.kv_bytes_per_token) == (parameters, kv_bytes)


@settings(max_examples=200)
@given(config=configs(), old_spelling=st.booleans())
def test_both_spellings_give_the_configuration_back(
    config: ModelConfig, old_spelling: bool
) -> None:
    assert read(hugging_face_values(config, old_spelling=old_spelling)) == config


def test_rope_settings_in_their_spellings() -> None:
    yarn = {"factor": 2.0, "original_max_position_embeddings": 65536}
    expected = RopeScaling("yarn", 2.0, 65536)
    for kind in ({"type": "yarn"}, {"rope_type": "yarn"}):
        assert read(SMOLLM3_3B, rope_scaling={**kind, **yarn}).rope_scaling == expected
    new = without(SMOLLM3_3B, "rope_theta", "rope_scaling")
    rope = {"rope_type": "yarn", "rope_theta": 3e6, **yarn}
    assert read(new, rope_parameters=rope).rope_scaling == expected
    assert read(new, rope_parameters=rope).rope_theta == 3e6
    assert read(SMOLLM3_3B, rope_parameters=rope, rope_scaling=None).rope_theta == 3e6
    # Absent: the model's own context. Beside the scaling: it wins. Null factor: the ratio.
    assert read(SMOLLM3_3B, rope_scaling={"type": "yarn", "factor": 2}).rope_scaling == expected
    outer = read(
        SMOLLM3_3B,
        max_position_embeddings=131072,
        original_max_position_embeddings=32768,
        rope_scaling={"type": "yarn", "factor": None},
    )
    assert outer.rope_scaling == RopeScaling("yarn", 4.0, 32768)
    linear = read(SMOLLM2_135M_INSTRUCT, rope_scaling={"type": "linear", "factor": 3.9})
    assert linear.rope_scaling == RopeScaling("linear", 3.9)


def test_defaults_are_the_familys_and_never_those_of_another_checkpoint() -> None:
    # Llama files may leave these out; a SmolLM3 file may not, its class defaults are wrong for it.
    llama = without(SMOLLM2_135M_INSTRUCT, "rope_theta", "num_key_value_heads")
    assert (read(llama).rope_theta, read(llama).num_key_value_heads) == (10000.0, 9)
    for key in ("rope_theta", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        with pytest.raises(ModelFormatError, match=rf"config.json: {key} must be .*found nothing"):
            read(without(SMOLLM3_3B, key))
    assert read(SMOLLM3_3B, num_key_value_heads=None).num_key_value_heads == 16
    assert not read(without(SMOLLM2_135M_INSTRUCT, "tie_word_embeddings")).tie_word_embeddings
    assert read(SMOLLM3_3B).tie_word_embeddings
    assert not read(SMOLLM3_3B, tie_word_embeddings=False).tie_word_embeddings
    assert read(SMOLLM3_3B).with_tied(False).num_parameters == 3_075_098_624 + 128256 * 2048


def test_the_layers_with_rope() -> None:
    interval = without(SMOLLM3_3B, "no_rope_layers")
    assert read(interval).no_rope_layers == (1, 1, 1, 0) * 9
    assert read(interval, no_rope_layers=None).no_rope_layers == (1, 1, 1, 0) * 9
    assert read(interval, no_rope_layer_interval=6).no_rope_layers == (1, 1, 1, 1, 1, 0) * 6
    # An explicit list wins over the interval.
    assert read(SMOLLM3_3B, no_rope_layers=[1, 0] * 18).no_rope_layers == (1, 0) * 18
    assert read(SMOLLM2_135M_INSTRUCT).no_rope_layers == (1,) * 30
    wrong: list[object] = [[1, 1, 1, 0], [2] * 36, "1110" * 9, [None] * 36, 4]
    for bad in wrong:
        with pytest.raises(ModelFormatError, match="no_rope_layers"):
            read(SMOLLM3_3B, no_rope_layers=bad)
    with pytest.raises(ModelFormatError, match="no_rope_layers"):
        read(SMOLLM2_135M_INSTRUCT, no_rope_layers=[1, 0] * 15)
    for array in ([1, 0] * 18, np.array([1, 0] * 18, dtype=np.uint8)):
        config = read_gguf(SMOLLM3_3B_GGUF, **{"smolrun.no_rope_layers": array})
        assert config.no_rope_layers == (1, 0) * 18


def test_token_ids() -> None:
    assert read(SMOLLM3_3B, eos_token_id=[128012, 128001]).eos_token_ids == (128012, 128001)
    assert read(SMOLLM3_3B, eos_token_id=None, bos_token_id=None).eos_token_ids == ()
    assert read(SMOLLM3_3B, pad_token_id=-1).pad_token_id is None
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        for bad in BAD_TOKENS:
            with pytest.raises(ModelFormatError, match=key):
                read(SMOLLM3_3B, **{key: bad})
    more = {"tokenizer.ggml.eot_token_id": 128009, "tokenizer.ggml.eom_token_id": 128012}
    assert read_gguf(SMOLLM3_3B_GGUF, **more).eos_token_ids == (128012, 128009)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.ggml\.bos_token_id"):
        read_gguf(SMOLLM3_3B_GGUF, **{"tokenizer.ggml.bos_token_id": 128256})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": []}}, "short_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"] * 36}, "layer_types"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 4096}, "sliding"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved"),
    ],
)
def test_what_is_not_run_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"config\.json.*{named}.*smolrun runs"):
        read(SMOLLM3_3B, **changes)


def test_gguf_scaling_keys() -> None:
    def scaling(**keys: Any) -> RopeScaling:
        changes = {f"rope.{key.replace('__', '.')}": value for key, value in keys.items()}
        return read_gguf(SMOLLM3_3B_GGUF, **changes).rope_scaling

    assert scaling(scale_linear=2.0) == RopeScaling("linear", 2.0)
    assert scaling(scaling__factor=2.0) == RopeScaling("linear", 2.0)
    assert scaling(scaling__type="none", scaling__factor=2.0) == RopeScaling()
    assert scaling(scaling__type="linear", scaling__factor=0.0) == RopeScaling()
    yarn = {"scaling__type": "yarn", "scaling__factor": 2.0}
    yarn["scaling__original_context_length"] = 32768
    assert scaling(**yarn) == RopeScaling("yarn", 2.0, 32768)
    assert scaling(**yarn, scaling__attn_factor=1.0) == RopeScaling("yarn", 2.0, 32768)
    halved = scaling(**yarn, scaling__attn_factor=0.5).attention_factor
    assert halved == pytest.approx(0.5 * (0.1 * math.log(2.0) + 1.0))
    assert scaling(**yarn, scaling__yarn_beta_fast=float(np.float32(8.1))).beta_fast == 8.1
    with pytest.raises(UnsupportedError, match=r"smollm3\.rope\.scaling\.type"):
        scaling(scaling__type="longrope")
    with pytest.raises(UnsupportedError, match="yarn_log_multiplier"):
        scaling(**yarn, scaling__yarn_log_multiplier=0.1)


def test_gguf_head_sizes() -> None:
    lengths = {"attention.key_length": 64, "attention.value_length": 64}
    assert read_gguf(SMOLLM2_135M_GGUF, **lengths) == read_gguf(SMOLLM2_135M_GGUF)
    with pytest.raises(UnsupportedError, match="rope.dimension_count"):
        read_gguf(SMOLLM2_135M_GGUF, **{"rope.dimension_count": 32})
    with pytest.raises(UnsupportedError, match="attention.value_length"):
        read_gguf(SMOLLM2_135M_GGUF, **{"attention.value_length": 32})
    explicit = {"attention.key_length": 32, "rope.dimension_count": 32}
    assert read_gguf(SMOLLM2_135M_GGUF, **explicit).head_dim == 32


def test_gguf_heads_that_tensor_shapes_can_not_tell_apart() -> None:
    """32 heads of 64 have the shapes of 16 heads of 128; the RoPE size tells."""
    with pytest.raises(UnsupportedError, match="rope.dimension_count is 128"):
        read_gguf(SMOLLM3_3B_GGUF, **{"attention.head_count": 32, "attention.head_count_kv": 8})


def test_gguf_vocabulary_size_may_come_from_the_tokens() -> None:
    metadata = without(SMOLLM2_135M_GGUF, "llama.vocab_size")
    with pytest.raises(ModelFormatError, match=r"llama\.vocab_size"):
        read_gguf(metadata)
    assert read_gguf(metadata, **{"tokenizer.ggml.tokens": ["a"] * 49154}).vocab_size == 49154


BAD_TOKENS: list[object] = [128256, -2, 1.0, "2", True, {}]
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
GGUF_SIZES = (
    "vocab_size", "embedding_length", "feed_forward_length", "block_count", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "context_length", "rope.dimension_count",
)  # fmt: skip
NUMBERS = ("rms_norm_eps", "rope_theta")
GGUF_NUMBERS = ("rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor")
BAD_SIZES = [0, -1, 2**31 - 1, 2**32 - 1, 2**63, 10**400, 1.0, math.nan, "12", [12], {}, True]
BAD_NUMBERS = [math.nan, math.inf, -1.0, 1e300, 10**400, "1e-5", [1.0], {}, True]


@pytest.mark.parametrize("bad", BAD_SIZES, ids=lambda bad: repr(bad)[:20])
def test_sizes_out_of_range_are_refused_by_name(bad: object) -> None:
    for key in SIZES:
        with pytest.raises(ModelFormatError, match=rf"config.json: {key} must be"):
            read(SMOLLM3_3B, **{key: bad})
    for key in GGUF_SIZES:
        with pytest.raises(ModelFormatError, match=rf"model.gguf: smollm3.{key}"):
            read_gguf(SMOLLM3_3B_GGUF, **{key: bad})


@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=lambda bad: repr(bad)[:20])
def test_numbers_out_of_range_are_refused_by_name(bad: object) -> None:
    for key in NUMBERS:
        with pytest.raises(ModelFormatError, match=rf"config.json: {key} must be"):
            read(SMOLLM3_3B, **{key: bad})
    for key in GGUF_NUMBERS:
        with pytest.raises(ModelFormatError, match=rf"model.gguf: smollm3.{key} must be"):
            read_gguf(SMOLLM3_3B_GGUF, **{key: bad})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 17},  # does not divide hidden_size
        {"num_key_value_heads": 3},  # does not divide the heads
        {"num_key_value_heads": 17},  # more than the heads
        {"head_dim": 127},
        {"num_attention_heads": 2048, "num_key_value_heads": 1},  # head size 1
        {"no_rope_layer_interval": 0, "no_rope_layers": None},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": {"type": 7}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1e-300}},
        {"tie_word_embeddings": "yes"},
        {"attention_bias": 1},
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError):
        read(SMOLLM3_3B, **changes)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, 64, 2048, 2**31, "linear", "yarn", "default", "smollm3", 1e-6]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["type", "factor", "beta_fast", "rope_theta"]), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=500)
@given(data=st.data())
def test_any_values_give_a_configuration_or_a_format_error(data: st.DataObject) -> None:
    gguf = data.draw(st.booleans())
    base = SMOLLM3_3B_GGUF if gguf else SMOLLM3_3B
    optional = ["smollm3.rope.scaling.type", "smollm3.rope.scaling.factor", "head_dim", "mlp_bias",
                "rope_parameters", "smolrun.no_rope_layers", "partial_rotary_factor"]  # fmt: skip
    keys = data.draw(st.lists(st.sampled_from([*base, *optional]), min_size=1, max_size=4))
    values = {**base, **{key: data.draw(json_values) for key in keys}}
    read_values = ModelConfig.from_gguf if gguf else ModelConfig.from_hugging_face
    try:
        config = read_values(values, "file")
    except ModelFormatError:
        return
    frequencies, factor = config.rope_parameters()
    assert np.all(np.isfinite(frequencies))
    assert math.isfinite(factor)


def test_a_longer_context_turns_yarn_on() -> None:
    config = preset("SmolLM3-3B")
    assert config.with_context(65536) is config
    long = config.with_context(131072)
    assert long.rope_scaling == RopeScaling("yarn", 2.0, 65536)
    assert long.max_position_embeddings == 131072
    assert long.with_context(262144) == config.with_context(262144)
    assert config.with_context(98304).rope_scaling.factor == 1.5
    with pytest.raises(RequestError, match="at most 8192"):
        preset("SmolLM2-135M").with_context(8193)
    with pytest.raises(RequestError, match="context of 1000000000000"):
        config.with_context(10**12)
