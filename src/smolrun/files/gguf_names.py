"""What GGUF calls the tensors of the family, and how it orders the rows of q and k."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from smolrun.quant.blocks import source_rows

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {name: gguf for gguf, name in (_NAMES | _LAYER_NAMES).items()}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z_]+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.(weight|bias)")
# llama.cpp's converter interleaves the rows of these, in all layers and for both architectures.
_INTERLEAVED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")


def canonical_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name unknown to the family stays as it is."""
    layer = _GGUF_LAYER.fullmatch(gguf_name)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    stem, _, ending = gguf_name.rpartition(".")
    return f"{_NAMES[stem]}.weight" if stem in _NAMES and ending == "weight" else gguf_name


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor of the family; KeyError for any other."""
    layer = _LAYER.fullmatch(name)
    if layer:
        return f"blk.{layer[1]}.{_GGUF_NAMES[layer[2]]}.{layer[3]}"
    return f"{_GGUF_NAMES[name.removesuffix('.weight')]}.weight"


def is_interleaved(name: str) -> bool:
    """Whether GGUF stores the rows of this tensor (canonical name) interleaved: q and k."""
    return _INTERLEAVED.fullmatch(name) is not None


def interleaved_rows(rows: int, head_dim: int) -> npt.NDArray[np.intp]:
    """For each row that GGUF stores, the row of Hugging Face files that it holds.

    The inverse of `source_rows`; ValueError if heads of this size do not fill the rows.
    """
    order = np.empty(rows, np.intp)
    order[source_rows(rows, head_dim)] = np.arange(rows)
    return order
