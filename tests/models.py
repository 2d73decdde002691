"""Small models for tests: configurations of many shapes, and the same model as others hold it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from smolrun.model.config import ModelConfig, RopeScaling
from smolrun.quant.blocks import tensor_values
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

Values = dict[str, npt.NDArray[np.float32]]

# Where the float16 scale (and minimum) of a block stand.
SCALE_OFFSETS: dict[WeightType, tuple[int, ...]] = {
    WeightType.Q4_0: (0,),
    WeightType.Q4_1: (0, 2),
    WeightType.Q5_0: (0,),
    WeightType.Q5_1: (0, 2),
    WeightType.Q8_0: (0,),
    WeightType.Q2_K: (80, 82),
    WeightType.Q3_K: (108,),
    WeightType.Q4_K: (0, 2),
    WeightType.Q5_K: (0, 2),
    WeightType.Q6_K: (208,),
    WeightType.IQ4_NL: (0,),
    WeightType.IQ4_XS: (0,),
}


def small_config(**changes: Any) -> ModelConfig:
    """A SmolLM3 of two kinds of layer, small enough to run in a blink."""
    values: dict[str, Any] = {
        "model_type": "smollm3",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": RopeScaling(),
        "no_rope_layers": (1, 1, 1, 0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": None,
        **changes,
    }
    if "num_hidden_layers" in changes and "no_rope_layers" not in changes:
        values["no_rope_layers"] = tuple(
            int((layer + 1) % 4 != 0) for layer in range(values["num_hidden_layers"])
        )
    return ModelConfig(**values)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Configurations of random shapes: every option that smolrun runs, in any combination."""
    model_type = draw(st.sampled_from(["llama", "smollm3"]))
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    # Multiples of 32 that are, for the most part, no multiples of 64 or 256. transformers wants a
    # Llama's to be a multiple of its heads too, even where the head size is given.
    step = math.lcm(32, heads) if model_type == "llama" else 32
    layers = draw(st.integers(1, 6))
    positions = draw(st.sampled_from([64, 100, 256]))
    pattern = (
        draw(st.tuples(*[st.integers(0, 1)] * layers)) if model_type == "smollm3" else (1,) * layers
    )
    return small_config(
        model_type=model_type,
        vocab_size=draw(st.integers(40, 160)),
        hidden_size=step * draw(st.integers(1, 288 // step)),
        intermediate_size=32 * draw(st.integers(1, 11)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 48, 64, 80, 96, 128])),
        max_position_embeddings=positions,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        rope_theta=draw(st.sampled_from([10000.0, 130000.0, 5e6])),
        rope_scaling=draw(rope_scalings(positions)),
        no_rope_layers=pattern,
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def rope_scalings(positions: int) -> st.SearchStrategy[RopeScaling]:
    """Default, linear and YaRN with its optional settings."""
    yarn = st.builds(
        RopeScaling,
        type=st.just("yarn"),
        factor=st.sampled_from([1.0, 2.0, 3.9, 16.0]),
        original_max_position_embeddings=st.sampled_from([16, 50, positions]),
        attention_factor=st.sampled_from([None, None, 1.25]),
        beta_fast=st.sampled_from([32.0, 8.0]),
        beta_slow=st.sampled_from([1.0, 0.5]),
        truncate=st.booleans(),
        mscale=st.sampled_from([None, 0.7]),
        mscale_all_dim=st.sampled_from([None, 1.3]),
    )
    linear = st.builds(RopeScaling, st.just("linear"), st.sampled_from([2.0, 3.9, 16.0]))
    return st.one_of(st.just(RopeScaling()), linear, yarn)


def hugging_face_values(config: ModelConfig, *, old_spelling: bool = False) -> dict[str, Any]:
    """config.json of a configuration, as transformers 5 writes it or as older ones did."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.type}
    if scaling.type != "default":
        rope["factor"] = scaling.factor
    if scaling.type == "yarn":
        names = (
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "truncate", "mscale", "mscale_all_dim",
        )  # fmt: skip
        found = {name: getattr(scaling, name) for name in names}
        rope.update({name: value for name, value in found.items() if value is not None})
    values: dict[str, Any] = {
        "architectures": [
            "LlamaForCausalLM" if config.model_type == "llama" else "SmolLM3ForCausalLM"
        ],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "eos_token_id": list(config.eos_token_ids),
    }
    plain = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id",
        "pad_token_id",
    )  # fmt: skip
    values.update({name: getattr(config, name) for name in plain})
    if config.model_type == "smollm3":
        values["no_rope_layers"] = list(config.no_rope_layers)
    if old_spelling:
        values["rope_theta"] = config.rope_theta
        values["torch_dtype"] = "float32"
        rope["type"] = rope.pop("rope_type")
        values["rope_scaling"] = rope if scaling.type != "default" else None
    else:
        values["dtype"] = "float32"
        values["rope_parameters"] = {"rope_theta": config.rope_theta, **rope}
    return values


def values_of(tensors: Mapping[str, Tensor]) -> Values:
    """float32 values of tensors, by name."""
    return {name: tensor_values(tensor) for name, tensor in tensors.items()}


def save_folder(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes config.json and model.safetensors, the tensors in their own float types."""
    names = {WeightType.F32: "F32", WeightType.F16: "F16", WeightType.BF16: "BF16"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_values(config)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.data.nbytes
        header[name] = {
            "dtype": names[tensor.type], "shape": tensor.shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.data.tobytes())
    return folder


def transformers_model(config: ModelConfig, weights: Values) -> Any:
    """The same model in transformers: float32, eager attention, evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

    values = hugging_face_values(config)
    for key in ("architectures", "model_type", "dtype"):
        del values[key]
    if config.model_type == "llama":
        model = LlamaForCausalLM._from_config(LlamaConfig(**values), attn_implementation="eager")
    else:
        model = SmolLM3ForCausalLM._from_config(
            SmolLM3Config(**values), attn_implementation="eager"
        )
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model.eval()


def transformers_logits(model: Any, input_ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """float32 logits (batch, n, vocab_size) of input_ids (batch, n)."""
    import torch

    with torch.no_grad():
        ids = torch.from_numpy(np.atleast_2d(np.asarray(input_ids, dtype=np.int64)))
        logits: npt.NDArray[np.float32] = model(ids).logits.numpy()
    return logits


def nmse(found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Squared error over squared size, in float64; NaN where anything is NaN."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (found, expected))
    assert x.shape == y.shape, (x.shape, y.shape)
    return float(np.sum((x - y) ** 2) / np.sum(y**2))
