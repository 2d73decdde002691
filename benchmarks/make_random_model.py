"""Write a model of real shape with random weights, to measure load, memory and speed.

    python benchmarks/make_random_model.py 3b.gguf                       # SmolLM3-3B, Q4_K_M
    python benchmarks/make_random_model.py 135m.gguf --preset SmolLM2-135M --type Q8_0
    python benchmarks/make_random_model.py folder --preset SmolLM2-360M --type BF16   # safetensors

A path that ends in .gguf becomes a GGUF file; any other, a folder with safetensors. Tensors get the
types that llama.cpp's quantizer gives them. The vocabulary has the real size: --vocab takes it from
a GGUF file, else it is made up. What such a model says makes no sense.
"""

from __future__ import annotations

import argparse
import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from random_blocks import Bytes, random_blocks
from random_vocabulary import (
    CHAT_TEMPLATE,
    Vocabulary,
    synthetic_vocabulary,
    vocabulary_from_gguf,
)
from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.model.presets import DEFAULT_PRESET, preset
from smolrun.quant.types import WeightType

CHUNK_BLOCKS_BYTES = 16 << 20

# Name: (type of most matrices, type of attn_v and ffn_down in every other layer or so)
MIXES: dict[str, tuple[WeightType, WeightType]] = {
    **{weight_type.value: (weight_type, weight_type) for weight_type in WeightType},
    "Q4_K_M": (WeightType.Q4_K, WeightType.Q6_K),
    "Q5_K_M": (WeightType.Q5_K, WeightType.Q6_K),
}
FALLBACKS = {
    WeightType.Q2_K: WeightType.Q4_0,
    WeightType.Q3_K: WeightType.Q4_0,
    WeightType.Q4_K: WeightType.Q5_0,
    WeightType.Q5_K: WeightType.Q5_1,
    WeightType.Q6_K: WeightType.Q8_0,
    WeightType.IQ4_XS: WeightType.IQ4_NL,
}
# general.file_type of GGUF.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10},
    **{"Q3_K": 12, "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q5_K_M": 17, "Q6_K": 18},
    **{"IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32},
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def weight_type_of(name: str, shape: tuple[int, ...], mix: str, layers: int) -> WeightType:
    """The type that llama.cpp's quantizer gives a tensor in a mix."""
    base, better = MIXES[mix]
    if len(shape) == 1:
        return WeightType.F32
    chosen = base
    if "embed_tokens" in name or "lm_head" in name:
        # The tied embedding is also the output head, which gets more bits.
        if not base.is_float and base is not WeightType.Q8_0:
            chosen = WeightType.Q6_K if shape[1] % 256 == 0 else WeightType.Q8_0
    elif "v_proj" in name or "down_proj" in name:
        layer = int(name.split(".")[2])
        eighth = layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            chosen = better
    if shape[1] % chosen.block_weights:
        chosen = FALLBACKS.get(chosen, WeightType.F16)
    return chosen if shape[1] % chosen.block_weights == 0 else WeightType.F16


def random_tensor(
    name: str, shape: tuple[int, ...], weight_type: WeightType, seed: int
) -> Iterator[Bytes]:
    """The bytes of a tensor, in pieces."""
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    blocks = int(np.prod(shape)) // weight_type.block_weights
    if len(shape) == 1 and name.endswith("norm.weight"):
        values = random.uniform(0.8, 1.2, blocks).astype(np.float32)
        if weight_type is WeightType.F32:
            yield values.view(np.uint8)
        elif weight_type is WeightType.F16:
            yield values.astype(np.float16).view(np.uint8)
        else:
            yield (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return
    step = CHUNK_BLOCKS_BYTES // weight_type.block_bytes
    for begin in range(0, blocks, step):
        yield random_blocks(weight_type, min(step, blocks - begin), random)


def gguf_name(name: str) -> str:
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write_gguf(
    path: Path, config: ModelConfig, mix: str, vocabulary: Vocabulary, seed: int = 0
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name(f"Random {path.stem}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[mix])
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos_token_id)
    writer.add_eos_token_id(vocabulary.eos_token_id)
    writer.add_pad_token_id(vocabulary.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    weights = build(config).weights
    types = {
        name: weight_type_of(name, shape, mix, config.num_hidden_layers)
        for name, shape in weights.items()
    }
    for name, shape in weights.items():
        row_bytes = types[name].row_bytes(shape[-1])
        nbytes = int(np.prod(shape[:-1])) * row_bytes
        writer.add_tensor_info(
            gguf_name(name),
            (*shape[:-1], row_bytes),
            np.dtype(np.uint8),
            nbytes,
            gguf.GGMLQuantizationType(types[name].ggml_id),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # The writer takes whole tensors only; the data are streamed after what it wrote.
    assert writer.fout is not None
    file = writer.fout[0]
    for name, shape in weights.items():
        writer.write_padding(file, file.tell())
        for piece in random_tensor(name, shape, types[name], seed):
            file.write(piece.data)
    writer.write_padding(file, file.tell())
    writer.close()


def write_safetensors(
    folder: Path, config: ModelConfig, dtype: str, vocabulary: Vocabulary, seed: int = 0
) -> None:
    weight_type = WeightType(dtype)
    if not weight_type.is_float:
        raise SystemExit(f"safetensors hold F32, F16 or BF16, not {dtype}")
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    weights = build(config).weights
    end = 0
    for name, shape in weights.items():
        begin, end = end, end + int(np.prod(shape)) * weight_type.block_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in weights.items():
            for piece in random_tensor(name, shape, weight_type, seed):
                file.write(piece.data)
    (folder / "config.json").write_text(json.dumps(config_json(config, dtype), indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary)))
    eos = vocabulary.tokens[vocabulary.eos_token_id]
    names = {"bos_token": None, "eos_token": eos, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    values = asdict(config)
    values["eos_token_id"] = list(values.pop("eos_token_ids"))
    values["rope_scaling"] = None
    values["torch_dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    if config.model_type == "llama":
        del values["no_rope_layers"]
    return values


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    from smolrun.files.tokenizer_data import LLAMA3_PATTERN

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if vocabulary.pre_tokenizer == "smollm":
        first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    else:
        first = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
        first["invert"] = False
    second = {**byte_level, "use_regex": vocabulary.pre_tokenizer == "smollm"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    types = enumerate(vocabulary.token_types)
    added = [(token_id, kind) for token_id, kind in types if kind != 1]
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": vocabulary.tokens[i], **flags, "special": kind == 3}
            for i, kind in added
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, second]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "ignore_merges": True, "vocab": ids, "merges": vocabulary.merges},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a .gguf file, or a folder for safetensors")
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--type", choices=list(MIXES), help="default: Q4_K_M; BF16 in a folder")
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="GGUF file with the vocabulary")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    config = preset(arguments.preset)
    if arguments.layers:
        layers = arguments.layers
        pattern = config.no_rope_layers[:layers]
        config = replace(config, num_hidden_layers=layers, no_rope_layers=pattern)
    if arguments.vocab:
        vocabulary = vocabulary_from_gguf(arguments.vocab, config.model_type)
    else:
        vocabulary = synthetic_vocabulary(config.vocab_size, config.model_type)
    if len(vocabulary.tokens) != config.vocab_size:
        raise SystemExit(f"{len(vocabulary.tokens)} tokens, the preset has {config.vocab_size}")
    if arguments.path.suffix == ".gguf":
        mix = arguments.type or "Q4_K_M"
        write_gguf(arguments.path, config, mix, vocabulary, arguments.seed)
    else:
        mix = arguments.type or "BF16"
        write_safetensors(arguments.path, config, mix, vocabulary, arguments.seed)
    print(f"{arguments.path}: {arguments.preset} {mix}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
