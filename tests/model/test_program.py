"""The listing: what it holds, what it prints, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.model.presets import PRESETS
from smolrun.model.program import NormQKV, ProgramBuilder
from smolrun.model.random import random_weights, zero_weights
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType
from tests.models import configs, small_config

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_the_listing_are_the_parameters_of_the_model(name: str) -> None:
    config = PRESETS[name]
    program = build(config)
    assert sum(math.prod(shape) for shape in program.weights.values()) == config.num_parameters
    # Embedding and last norm, and nine tensors per layer: as many as the published files hold.
    assert len(program.weights) == 2 + 9 * config.num_hidden_layers
    assert len(program.operations) == 2 + 5 * config.num_hidden_layers
    rope = [o.rope for o in program.operations if isinstance(o, NormQKV)]
    assert rope == [bool(value) for value in config.no_rope_layers]


@settings(max_examples=50)
@given(config=configs())
def test_any_shape_builds_and_accepts_its_own_weights(config: ModelConfig) -> None:
    program = build(config)
    program.check(zero_weights(config, WeightType.F16))
    assert sum(math.prod(shape) for shape in program.weights.values()) == config.num_parameters
    assert ("lm_head.weight" in program.weights) != config.tie_word_embeddings


def test_operations_as_the_native_engine_takes_them() -> None:
    embed, first, *_, last = (operation.as_dict() for operation in build(small_config()).operations)
    assert embed == {"kind": "embed", "weight": "model.embed_tokens.weight", "out": "hidden"}
    assert first == {
        "kind": "norm_qkv",
        "input": "hidden",
        "norm": "model.layers.0.input_layernorm.weight",
        "epsilon": 1e-6,
        "q": "model.layers.0.self_attn.q_proj.weight",
        "k": "model.layers.0.self_attn.k_proj.weight",
        "v": "model.layers.0.self_attn.v_proj.weight",
        "q_bias": None,
        "k_bias": None,
        "v_bias": None,
        "rope": True,
        "layer": 0,
        "out": "query",
    }
    assert last == {
        "kind": "norm_logits",
        "input": "hidden",
        "norm": "model.norm.weight",
        "epsilon": 1e-6,
        "weight": "model.embed_tokens.weight",
    }


def test_the_printed_listing_tells_weights_and_rope() -> None:
    lines = str(build(small_config())).splitlines()
    assert len(lines) == 2 + 22
    assert lines[1] == "buffers: hidden[64], query[128], attention[128], ffn[96]"
    assert "model.layers.0.self_attn.k_proj.weight[64, 64]" in lines[3]
    assert [line.split()[-1] for line in lines if " norm_qkv " in line] == ["RoPE"] * 3 + ["NoPE"]


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    return random_weights(config, seed=1)


def refused(config: ModelConfig, found: dict[str, Tensor]) -> str:
    with pytest.raises(ModelFormatError) as caught:
        build(config).check(found)
    return str(caught.value)


@pytest.mark.parametrize("name", list(build(small_config()).weights))
def test_each_tensor_missing_or_of_another_shape_is_named(name: str) -> None:
    config = small_config()
    found = tensors(config)
    shape = found[name].shape
    message = refused(config, {key: tensor for key, tensor in found.items() if key != name})
    assert f"tensor {name} of shape {shape} is missing" in message
    wrong = [tuple(n + 1 for n in shape), (*shape, 1), shape[:1] + tuple(n - 1 for n in shape[1:])]
    if len(set(shape)) == 2:
        wrong.append(shape[::-1])
    for other in wrong:
        if other == shape:
            continue
        message = refused(config, {**found, name: replace(found[name], shape=other)})
        assert name in message
        assert str(shape) in message
        assert str(other) in message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1024},
        {"hidden_size": 65},
        {"intermediate_size": 97},
        {"vocab_size": 97},
        {"num_attention_heads": 5, "num_key_value_heads": 1},
        {"head_dim": 34},
    ],
)
def test_a_configuration_that_is_off_by_one_does_not_fit_the_tensors(
    changes: dict[str, int],
) -> None:
    assert "tensor model." in refused(small_config(**changes), tensors(small_config()))


def test_tensors_that_no_kernel_may_read_are_refused() -> None:
    config = small_config()
    found = tensors(config)

    def message(name: str, **changes: Any) -> str:
        return refused(config, {**found, name: replace(found[name], **changes)})

    assert "found 16380" in message(Q, data=found[Q].data[:16380])
    assert "vector of type Q8_0" in message(NORM, type=WeightType.Q8_0)
    assert "not a multiple of the 256" in message(Q, type=WeightType.Q4_K)
    assert "heads of 64" in message(Q, interleaved_head_dim=64)


def test_tensors_that_do_not_belong_are_refused_or_known() -> None:
    config = small_config()
    found = tensors(config)
    extra = replace(found["model.norm.weight"], name="model.layers.4.input_layernorm.weight")
    message = refused(config, {**found, extra.name: extra})
    assert extra.name in message
    assert "4 layers" in message
    head = replace(found["model.embed_tokens.weight"], name="lm_head.weight")
    assert "tied head" in refused(config, {**found, "lm_head.weight": head})
    build(config.with_tied(False)).check({**found, "lm_head.weight": head})
    bias = replace(found[NORM], name="model.layers.0.self_attn.k_proj.bias")
    assert "attention biases off" in refused(config, {**found, bias.name: bias})
    frequencies = replace(extra, name="model.layers.0.self_attn.rotary_emb.inv_freq")
    build(config).check({**found, frequencies.name: frequencies})
    factors = replace(extra, name="rope_freqs.weight")
    with pytest.raises(UnsupportedError, match="llama3"):
        build(config).check({**found, factors.name: factors})


def test_the_builder_refuses_what_does_not_fit() -> None:
    config = small_config(num_hidden_layers=1)
    builder = ProgramBuilder(config)
    hidden = builder.buffer("hidden", 64)
    with pytest.raises(ValueError, match="twice"):
        builder.buffer("hidden", 64)
    norm = builder.weight("norm", 64)
    with pytest.raises(ValueError, match="now \\(65,\\)"):
        builder.weight("norm", 65)
    square = builder.weight("square", 64, 64)
    with pytest.raises(ValueError, match="needed: \\(96, 64\\)"):
        builder.embed(weight=square, out=hidden)
    with pytest.raises(ValueError, match="not declared"):
        builder.linear_add(input="other", weight=square, out=hidden)
    with pytest.raises(ValueError, match="its input"):
        builder.linear_add(input=hidden, weight=square, out=hidden)
    query = builder.buffer("query", 128)
    with pytest.raises(ValueError, match="before its norm_qkv"):
        builder.attention(input=query, layer=0, out=builder.buffer("attention", 128))
    head = builder.weight("head", 96, 64)
    builder.embed(weight=head, out=hidden)
    builder.norm_logits(input=hidden, norm=norm, weight=head)
    with pytest.raises(ValueError, match="runs for layers \\[\\]"):
        builder.build()


def test_random_weights_depend_on_seed_and_name_only() -> None:
    config = small_config()
    one, same, other = (random_weights(config, seed) for seed in (7, 7, 2**64 - 1))
    last_but_one = random_weights(config, 2**64 - 2)
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor.data, same[name].data)
        assert not np.array_equal(tensor.data, other[name].data)
        assert not np.array_equal(last_but_one[name].data, other[name].data)
    wider = random_weights(replace(config, intermediate_size=128), 7)
    np.testing.assert_array_equal(one[Q].data, wider[Q].data)
    # Pinned: the same weights on every machine and in every release.
    assert one[Q].data.view("<f4")[:4].tolist() == PINNED


PINNED = [-0.03543137386441231, 0.14407438039779663, 0.10293763875961304, -0.17186446487903595]


@pytest.mark.parametrize(("dtype", "bound"), [(WeightType.F16, 2**-11), (WeightType.BF16, 2**-8)])
def test_random_weights_are_rounded_to_nearest(dtype: WeightType, bound: float) -> None:
    from smolrun.quant.blocks import tensor_values

    config = small_config()
    exact, rounded = random_weights(config, 3), random_weights(config, 3, dtype)
    for name, tensor in exact.items():
        want, found = tensor_values(tensor), tensor_values(rounded[name])
        assert np.all(np.abs(found - want) <= np.abs(want) * bound + 1e-7)
        assert np.abs(found - want).max() > 0.0


def test_weights_are_made_in_float_types_only() -> None:
    for make in (random_weights, zero_weights):
        with pytest.raises(ValueError, match="Q4_K"):
            make(small_config(), dtype=WeightType.Q4_K)
    with pytest.raises(ValueError, match="seed"):
        random_weights(small_config(), -1)
