"""The small files of a Hugging Face folder, made from what a GGUF file says."""

from __future__ import annotations

import json
from typing import Any

from smolrun.files.checkpoint import Checkpoint
from smolrun.files.gguf_vocabulary import tokenizer_json
from smolrun.files.model_card import card_text
from smolrun.files.tokenizer_data import TokenizerData
from smolrun.quant.types import WeightType

_DTYPES = {WeightType.F32: "float32", WeightType.F16: "float16", WeightType.BF16: "bfloat16"}

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
_PLAIN = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id",
    "pad_token_id",
)  # fmt: skip
_YARN = ("attention_factor", "mscale", "mscale_all_dim")


def folder_files(checkpoint: Checkpoint, dtype: WeightType) -> dict[str, bytes]:
    """Names and contents of all files but the weights, for a model from a GGUF file.

    Args:
        checkpoint: an open model; its vocabulary must not have been dropped.
        dtype: what the matrices will be stored as.

    Raises:
        UnsupportedError: the file's tokenizer is one that smolrun does not know.
    """
    files: dict[str, Any] = {"config.json": config_json(checkpoint, dtype)}
    files["generation_config.json"] = _generation_config(checkpoint)
    if checkpoint.tokenizer is not None:
        files["tokenizer.json"] = tokenizer_json(checkpoint.tokenizer)
        files["tokenizer_config.json"] = _tokenizer_config(checkpoint, checkpoint.tokenizer)
    contents = {
        name: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
        for name, values in files.items()
    }
    if checkpoint.chat_template is not None:
        contents["chat_template.jinja"] = checkpoint.chat_template.encode()
    contents["README.md"] = card_text(checkpoint.metadata, checkpoint.name).encode()
    return contents


def dtype_name(dtype: WeightType) -> str:
    """What config.json calls a float type."""
    return _DTYPES[dtype]


def config_json(checkpoint: Checkpoint, dtype: WeightType) -> dict[str, Any]:
    """config.json, in the spelling that transformers of every version reads."""
    config = checkpoint.config
    eos = config.eos_token_ids
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        **{name: getattr(config, name) for name in _PLAIN},
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "hidden_act": "silu",
        "rope_scaling": _rope_scaling(checkpoint),
        "torch_dtype": dtype_name(dtype),
        "use_cache": True,
    }
    usual = config.hidden_size == config.num_attention_heads * config.head_dim
    if not usual or f"{config.model_type}.attention.key_length" in checkpoint.metadata:
        values["head_dim"] = config.head_dim
    if config.model_type == "smollm3":
        values["no_rope_layers"] = list(config.no_rope_layers)
        values["use_sliding_window"] = False
    return dict(sorted(values.items()))


def _rope_scaling(checkpoint: Checkpoint) -> dict[str, Any] | None:
    scaling = checkpoint.config.rope_scaling
    if scaling.type == "default":
        return None
    values: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "yarn":
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        values["beta_fast"], values["beta_slow"] = scaling.beta_fast, scaling.beta_slow
        values |= {n: getattr(scaling, n) for n in _YARN if getattr(scaling, n) is not None}
        if not scaling.truncate:
            values["truncate"] = False
    return values


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    eos = config.eos_token_ids
    values = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
        **checkpoint.generation,
    }
    if "temperature" in checkpoint.generation:
        values["do_sample"] = checkpoint.generation["temperature"] != 0
    return {key: value for key, value in values.items() if value is not None}


def _tokenizer_config(checkpoint: Checkpoint, tokenizer: TokenizerData) -> dict[str, Any]:
    values: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    switches = {"add_bos_token": "add_bos_token", "add_prefix_space": "add_space_prefix"}
    for name, key in switches.items():
        value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(value, bool):
            values[name] = value
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        values[f"{name}_token"] = None if token_id is None else tokenizer.tokens[token_id]
    return dict(sorted(values.items()))
