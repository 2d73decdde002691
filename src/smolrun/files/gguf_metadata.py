"""The metadata of a GGUF file for a model from a folder, as llama.cpp's converter writes it.

What GGUF has no key for, and a model of the family can ask for, goes under keys of our own, which
other programs pass over; `gguf_metadata` says so. Source: llama.cpp's `conversion/base.py` and
`conversion/llama.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.checkpoint import Checkpoint
from smolrun.files.gguf_vocabulary import gguf_vocabulary
from smolrun.files.gguf_writer import TypedValue
from smolrun.files.model_card import card_metadata, name_parts, read_card, size_label, title
from smolrun.model.config import ModelConfig, RopeScaling

logger = logging.getLogger("smolrun")

QUANTIZATION_VERSION = 2

# Key in generation_config.json: (key in GGUF after general.sampling., type)
_SAMPLING = {
    "sequence": ("sequence", "string"),
    "top_k": ("top_k", "i32"),
    "top_p": ("top_p", "f32"),
    "min_p": ("min_p", "f32"),
    "xtc_probability": ("xtc_probability", "f32"),
    "xtc_threshold": ("xtc_threshold", "f32"),
    "temperature": ("temp", "f32"),
    "penalty_last_n": ("penalty_last_n", "i32"),
    "repetition_penalty": ("penalty_repeat", "f32"),
    "mirostat": ("mirostat", "i32"),
    "mirostat_tau": ("mirostat_tau", "f32"),
    "mirostat_eta": ("mirostat_eta", "f32"),
}

# Ids that GGUF takes from the tokenizer's files rather than from config.json.
_TOKENS = ("bos_token_id", "eos_token_ids", "pad_token_id")


def gguf_metadata(checkpoint: Checkpoint, file_type: int) -> dict[str, TypedValue]:
    """The metadata for a GGUF file with the tensors of a model.

    A model that came from a GGUF file keeps its metadata, but for the type of the file.

    Args:
        checkpoint: an open model; its vocabulary must not have been dropped.
        file_type: general.file_type, GGUF's number for what most matrices are stored as.

    Raises:
        UnsupportedError: the tokenizer, or a setting, is one that a GGUF file can not carry.
        ModelFormatError: tokenizer.json contradicts itself.
    """
    if checkpoint.format == "gguf":
        metadata = {
            key: TypedValue(checkpoint.metadata_types[key], value)
            for key, value in checkpoint.metadata.items()
        }
        return {**metadata, "general.file_type": TypedValue("u32", file_type)}
    metadata = {
        "general.architecture": TypedValue("string", checkpoint.config.model_type),
        "general.type": TypedValue("string", "model"),
        **_sampling(checkpoint.generation),
        **_names(checkpoint),
        **_sizes(checkpoint.config, checkpoint.metadata),
        "general.file_type": TypedValue("u32", file_type),
        "general.quantization_version": TypedValue("u32", QUANTIZATION_VERSION),
    }
    if checkpoint.tokenizer is not None:
        metadata |= gguf_vocabulary(
            checkpoint.tokenizer, checkpoint.metadata, checkpoint.config.vocab_size
        )
    if checkpoint.chat_template is not None:
        metadata["tokenizer.chat_template"] = TypedValue("string", checkpoint.chat_template)
    metadata |= _own_keys(checkpoint, metadata)
    _check_text(metadata, checkpoint)
    return metadata


def _check_text(metadata: Mapping[str, TypedValue], checkpoint: Checkpoint) -> None:
    """ModelFormatError for text that is not Unicode, which JSON can spell and GGUF can not."""
    for key, typed in metadata.items():
        texts = typed.value if typed.type == "string[]" else [typed.value]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode()  # type: ignore[attr-defined]
        except UnicodeEncodeError:
            raise ModelFormatError(
                f"{checkpoint.path}: half of a surrogate pair in what would be {key}; correct it"
            ) from None


def _sampling(generation: Mapping[str, object]) -> dict[str, TypedValue]:
    """The settings that their types can hold."""
    metadata = {}
    for name, (key, kind) in _SAMPLING.items():
        value = generation.get(name)
        if kind == "string":
            fits = isinstance(value, str)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            fits = False
        elif kind == "i32":
            fits = isinstance(value, int) and -(1 << 31) <= value < 1 << 31
        else:
            fits = abs(value) <= float(np.finfo(np.float32).max)
        if fits:
            metadata[f"general.sampling.{key}"] = TypedValue(kind, value)
    return metadata


def _names(checkpoint: Checkpoint) -> dict[str, TypedValue]:
    """Name, size and origin: what README.md says, else what the folder's name tells."""
    folder = checkpoint.folder
    name = _repository_name(folder)
    parameters = checkpoint.config.num_parameters
    parts = {"name": title(name), "size_label": size_label(parameters)}
    parts |= name_parts(name, parameters)
    found = {f"general.{key}": TypedValue("string", text) for key, text in parts.items()}
    return found | card_metadata(read_card(folder))


def _repository_name(folder: Path) -> str:
    """The folder's name; in the Hub's cache, which names folders by commit, the repository's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1]
    return folder.name


def _sizes(config: ModelConfig, values: Mapping[str, object]) -> dict[str, TypedValue]:
    """The keys that begin with the architecture's name."""
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
    }
    # transformers gives every Llama a head_dim; SmolLM3's config.json may leave it out.
    if config.model_type == "llama" or values.get("head_dim") is not None:
        sizes |= {"attention.key_length": config.head_dim}
        sizes |= {"attention.value_length": config.head_dim}
    found = {key: TypedValue("u32", value) for key, value in sizes.items()}
    found["attention.layer_norm_rms_epsilon"] = TypedValue("f32", config.rms_norm_eps)
    found["rope.freq_base"] = TypedValue("f32", config.rope_theta)
    scaling = config.rope_scaling
    if scaling.type != "default":
        found["rope.scaling.type"] = TypedValue("string", scaling.type)
        found["rope.scaling.factor"] = TypedValue("f32", scaling.factor)
    if scaling.type == "yarn":
        original = scaling.original_max_position_embeddings or config.max_position_embeddings
        found["rope.scaling.original_context_length"] = TypedValue("u32", original)
        if scaling.attention_factor is not None:
            factor = TypedValue("f32", scaling.attention_factor)
            found["rope.scaling.yarn_attn_factor"] = factor
        given = values.get("rope_scaling") or values.get("rope_parameters")
        for name in ("beta_fast", "beta_slow"):
            if isinstance(given, Mapping) and given.get(name) is not None:
                found[f"rope.scaling.yarn_{name}"] = TypedValue("f32", getattr(scaling, name))
    return {f"{config.model_type}.{key}": value for key, value in found.items()}


def _own_keys(checkpoint: Checkpoint, metadata: Mapping[str, TypedValue]) -> dict[str, TypedValue]:
    """What the keys of GGUF leave out, found by reading them back; a warning names it."""
    config = checkpoint.config
    own: dict[str, TypedValue] = {}
    read = _read_back(metadata, config, checkpoint)
    if read.no_rope_layers != config.no_rope_layers:
        own["smolrun.no_rope_layers"] = TypedValue("i32[]", list(config.no_rope_layers))
    for name, kind in (("truncate", "bool"), ("mscale", "f32"), ("mscale_all_dim", "f32")):
        value = getattr(config.rope_scaling, name)
        if value != getattr(read.rope_scaling, name):
            own[f"smolrun.rope_scaling.{name}"] = TypedValue(kind, value)
    for key in own:
        logger.warning(
            "%s: GGUF has no key for this setting; it is kept as %s, which other programs ignore: "
            "what they compute will differ",
            checkpoint.name,
            key,
        )
    missing = set(config.eos_token_ids) - set(read.eos_token_ids)
    if missing:
        own["smolrun.eos_token_ids"] = TypedValue("u32[]", list(config.eos_token_ids))
    read = _read_back({**metadata, **own}, config, checkpoint)
    different = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in _TOKENS
        and not _same(getattr(read, field.name), getattr(config, field.name))
    ]
    if different:
        name = different[0]
        raise UnsupportedError(
            f"{checkpoint.path}: {name} is {getattr(config, name)}, and a GGUF file would say "
            f"{getattr(read, name)}; keep this model as safetensors"
        )
    return own


def _read_back(
    metadata: Mapping[str, TypedValue], config: ModelConfig, checkpoint: Checkpoint
) -> ModelConfig:
    """The configuration that a reader of the file will find."""
    values: dict[str, Any] = {
        key: float(np.float32(typed.value)) if typed.type == "f32" else typed.value  # type: ignore[arg-type]
        for key, typed in metadata.items()
    }
    read = ModelConfig.from_gguf(values, str(checkpoint.path))
    return read.with_tied(config.tie_word_embeddings).with_biases(
        attention=config.attention_bias, mlp=config.mlp_bias
    )


def _same(found: object, expected: object) -> bool:
    """Whether two settings are equal as far as float32, in which GGUF stores them, can tell."""
    if isinstance(found, RopeScaling) and isinstance(expected, RopeScaling):
        return all(map(_same, astuple(found), astuple(expected)))
    if isinstance(found, float) and isinstance(expected, float):
        return bool(np.float32(found) == np.float32(expected))
    return found == expected
