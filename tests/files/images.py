"""Model files as lists of fields, so that a test can break any one of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SCALAR_FORMATS = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<?"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
STRING, ARRAY = 8, 9
# Name: (id, weights of a block, bytes of a block)
TENSOR_TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q6_K": (14, 256, 210)}

Metadata = dict[str, tuple[str, Any]]  # key: (type, value), type such as "u32" or "[string]"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name: (type, sizes, row length first)


@dataclass
class Field:
    """One field of a header: an integer, a scalar, or a string with its length."""

    label: str
    data: bytes
    is_string: bool = False
    length: int | None = None  # of a string; None: the true one

    def to_bytes(self) -> bytes:
        if not self.is_string:
            return self.data
        length = len(self.data) if self.length is None else self.length
        return struct.pack("<Q", length % (1 << 64)) + self.data


@dataclass
class GgufImage:
    """A GGUF file: the fields of its header in order, and the data section."""

    fields: list[Field]
    data: bytes
    alignment: int = 32

    def __getitem__(self, label: str) -> Field:
        return next(one for one in self.fields if one.label == label)

    def set(self, label: str, data: bytes) -> GgufImage:
        self[label].data = data
        return self

    def set_u32(self, label: str, value: int) -> GgufImage:
        return self.set(label, struct.pack("<I", value % (1 << 32)))

    def set_u64(self, label: str, value: int) -> GgufImage:
        return self.set(label, struct.pack("<Q", value % (1 << 64)))

    def set_length(self, label: str, length: int) -> GgufImage:
        self[label].length = length
        return self

    def header(self) -> bytes:
        return b"".join(one.to_bytes() for one in self.fields)

    def to_bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def gguf_image(
    metadata: Metadata, tensors: Tensors, *, version: int = 3, alignment: int = 32
) -> GgufImage:
    fields = [
        Field("magic", b"GGUF"),
        Field("version", struct.pack("<I", version)),
        Field("tensor count", struct.pack("<Q", len(tensors))),
        Field("metadata count", struct.pack("<Q", len(metadata))),
    ]
    for key, (type_name, value) in metadata.items():
        fields.append(Field(f"{key}:key", key.encode(), is_string=True))
        fields += _value_fields(key, type_name, value)
    data = b""
    for name, (type_name, sizes, content) in tensors.items():
        fields.append(Field(f"{name}:name", name.encode(), is_string=True))
        fields.append(Field(f"{name}:dimensions", struct.pack("<I", len(sizes))))
        fields += [Field(f"{name}:size{i}", struct.pack("<Q", n)) for i, n in enumerate(sizes)]
        fields.append(Field(f"{name}:type", struct.pack("<I", TENSOR_TYPES[type_name][0])))
        fields.append(Field(f"{name}:offset", struct.pack("<Q", len(data))))
        data += content + bytes(-len(content) % alignment)
    return GgufImage(fields, data, alignment)


def _value_fields(key: str, type_name: str, value: Any) -> list[Field]:
    if type_name == "string":
        content = value if isinstance(value, bytes) else value.encode()
        return [
            Field(f"{key}:type", struct.pack("<I", STRING)),
            Field(f"{key}:value", content, is_string=True),
        ]
    if not type_name.startswith("["):
        type_id, code = SCALAR_FORMATS[type_name]
        return [
            Field(f"{key}:type", struct.pack("<I", type_id)),
            Field(f"{key}:value", struct.pack(code, value)),
        ]
    element = type_name[1:-1]
    element_id = STRING if element == "string" else SCALAR_FORMATS[element][0]
    fields = [
        Field(f"{key}:type", struct.pack("<I", ARRAY)),
        Field(f"{key}:element type", struct.pack("<I", element_id)),
        Field(f"{key}:length", struct.pack("<Q", len(value))),
    ]
    for index, one in enumerate(value):
        if element == "string":
            content = one if isinstance(one, bytes) else one.encode()
            fields.append(Field(f"{key}[{index}]", content, is_string=True))
        else:
            fields.append(Field(f"{key}[{index}]", struct.pack(SCALAR_FORMATS[element][1], one)))
    return fields


# -- the smallest model that has everything ---------------------------------------------------

VOCABULARY = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"abcdefghijklm",
    "Ġ",
    "ab",
    "abc",
    "Ġd",
]
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 1, 16
PROMPT = [1, 4, 17, 18]


def tiny_metadata() -> Metadata:
    return {
        "general.architecture": ("string", "llama"),
        "general.name": ("string", "tiny"),
        "general.alignment": ("u32", 32),
        "llama.block_count": ("u32", 1),
        "llama.context_length": ("u32", 64),
        "llama.embedding_length": ("u32", HIDDEN),
        "llama.feed_forward_length": ("u32", FFN),
        "llama.attention.head_count": ("u32", HEADS),
        "llama.attention.head_count_kv": ("u32", KV_HEADS),
        "llama.rope.freq_base": ("f32", 10000.0),
        "llama.rope.dimension_count": ("u32", HEAD_DIM),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "llama.vocab_size": ("u32", len(VOCABULARY)),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "smollm"),
        "tokenizer.ggml.tokens": ("[string]", VOCABULARY),
        "tokenizer.ggml.token_type": ("[i32]", [3] * 3 + [1] * (len(VOCABULARY) - 3)),
        "tokenizer.ggml.merges": ("[string]", ["a b", "ab c", "Ġ d"]),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.padding_token_id": ("u32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.chat_template": ("string", "{{ messages[0]['content'] }}"),
    }


def tiny_tensors() -> Tensors:
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    return {
        name: (type_name, sizes, random_content(name, type_name, sizes))
        for name, type_name, sizes in (
            ("token_embd.weight", "Q8_0", (HIDDEN, len(VOCABULARY))),
            ("blk.0.attn_norm.weight", "F32", (HIDDEN,)),
            ("blk.0.attn_q.weight", "Q8_0", (HIDDEN, q)),
            ("blk.0.attn_k.weight", "F16", (HIDDEN, kv)),
            ("blk.0.attn_v.weight", "F32", (HIDDEN, kv)),
            ("blk.0.attn_output.weight", "Q8_0", (q, HIDDEN)),
            ("blk.0.ffn_norm.weight", "F32", (HIDDEN,)),
            ("blk.0.ffn_gate.weight", "Q8_0", (HIDDEN, FFN)),
            ("blk.0.ffn_up.weight", "Q8_0", (HIDDEN, FFN)),
            ("blk.0.ffn_down.weight", "Q8_0", (FFN, HIDDEN)),
            ("output_norm.weight", "F32", (HIDDEN,)),
        )
    }


def random_content(name: str, type_name: str, sizes: tuple[int, ...]) -> bytes:
    """Finite weights of a moderate size, as stored."""
    random = np.random.default_rng([ord(letter) for letter in name])
    count = int(np.prod(sizes))
    if type_name == "Q8_0":
        blocks = random.integers(0, 256, (count // 32, 34), np.uint8)
        scales = random.uniform(0.0005, 0.001, count // 32).astype(np.float16)
        blocks[:, :2] = scales.view(np.uint8).reshape(-1, 2)
        return blocks.tobytes()
    values = random.normal(0, 0.1, count) + (1.0 if "norm" in name else 0.0)
    return values.astype({"F32": np.float32, "F16": np.float16}[type_name]).tobytes()


def tiny_gguf() -> GgufImage:
    return gguf_image(tiny_metadata(), tiny_tensors())


def changed_gguf(
    metadata: Metadata | None = None,
    *,
    without: str | None = None,
    tensors: Callable[[Tensors], None] | None = None,
) -> GgufImage:
    """The tiny model with metadata replaced, added or removed, and its tensors changed."""
    all_metadata = {**tiny_metadata(), **(metadata or {})}
    if without is not None:
        del all_metadata[without]
    all_tensors = tiny_tensors()
    if tensors is not None:
        tensors(all_tensors)
    return gguf_image(all_metadata, all_tensors)


# -- safetensors ------------------------------------------------------------------------------


@dataclass
class SafetensorsImage:
    """A safetensors file: its header as an object, or as text of its own, and the data."""

    header: dict[str, Any]
    data: bytes
    text: bytes | None = field(default=None)

    def to_bytes(self) -> bytes:
        text = json.dumps(self.header).encode() if self.text is None else self.text
        return struct.pack("<Q", len(text)) + text + self.data


def safetensors_image(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> SafetensorsImage:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += content
    return SafetensorsImage(header, data)


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_safetensors(dtype: str = "F32") -> SafetensorsImage:
    q, kv, layer = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (len(VOCABULARY), HIDDEN),
        f"{layer}.input_layernorm.weight": (HIDDEN,),
        f"{layer}.self_attn.q_proj.weight": (q, HIDDEN),
        f"{layer}.self_attn.k_proj.weight": (kv, HIDDEN),
        f"{layer}.self_attn.v_proj.weight": (kv, HIDDEN),
        f"{layer}.self_attn.o_proj.weight": (HIDDEN, q),
        f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
        f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
        f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
        "model.norm.weight": (HIDDEN,),
    }
    return safetensors_image(
        {name: (dtype, shape, random_content(name, dtype, shape)) for name, shape in shapes.items()}
    )
