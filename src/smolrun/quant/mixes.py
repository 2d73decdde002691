"""Which type each weight of a model gets, by the names that llama.cpp gave to its choices.

A mix such as Q4_K_M gives more bits to the weights that suffer most. A weight whose rows do not
fill the blocks of its type gets another type instead, a little larger as a rule.
Source: llama.cpp's `src/llama-quant.cpp`; tests/parity holds the choices to those of its quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smolrun.quant.types import WeightType

_T = WeightType


@dataclass(frozen=True)
class Mix:
    """A way to choose types."""

    name: str
    base: WeightType  # of most weights
    file_type: int  # GGUF's number for it, general.file_type


MIXES = {
    mix.name: mix
    for mix in (
        Mix("F32", _T.F32, 0),
        Mix("F16", _T.F16, 1),
        Mix("BF16", _T.BF16, 32),
        Mix("Q8_0", _T.Q8_0, 7),
        Mix("Q6_K", _T.Q6_K, 18),
        Mix("Q5_K_M", _T.Q5_K, 17),
        Mix("Q5_K_S", _T.Q5_K, 16),
        Mix("Q5_1", _T.Q5_1, 9),
        Mix("Q5_0", _T.Q5_0, 8),
        Mix("Q4_K_M", _T.Q4_K, 15),
        Mix("Q4_K_S", _T.Q4_K, 14),
        Mix("IQ4_NL", _T.IQ4_NL, 25),
        Mix("IQ4_XS", _T.IQ4_XS, 30),
        Mix("Q4_1", _T.Q4_1, 3),
        Mix("Q4_0", _T.Q4_0, 2),
        Mix("Q3_K_L", _T.Q3_K, 13),
        Mix("Q3_K_M", _T.Q3_K, 12),
        Mix("Q3_K_S", _T.Q3_K, 11),
        Mix("Q2_K", _T.Q2_K, 10),
    )
}
_SYNONYMS = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# What takes the place of a type of 256 weights a block where these do not fill a row.
_FALLBACK = {
    _T.Q2_K: _T.Q4_0,
    _T.Q3_K: _T.Q4_0,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
    _T.IQ4_XS: _T.IQ4_NL,
}

_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.weight")


@dataclass(frozen=True)
class Choice:
    """What a weight should have been stored as, and what it is."""

    wanted: WeightType
    type: WeightType  # differs from `wanted` where its blocks do not fill a row


def find_mix(name: str) -> Mix:
    """The mix of a name, in any case; ValueError that lists the names for one that is none."""
    upper = name.upper()
    found = MIXES.get(_SYNONYMS.get(upper, upper))
    if found is None:
        raise ValueError(f"there is no type {name!r}; there are {', '.join(MIXES)}")
    return found


def fitting(wanted: WeightType, columns: int) -> WeightType:
    """The type itself, or what takes its place in rows of so many weights."""
    for found in (wanted, _FALLBACK.get(wanted, wanted)):
        if columns % found.block_weights == 0:
            return found
    return _T.F16


def choose_types(
    mix: Mix,
    shapes: Mapping[str, tuple[int, ...]],
    query_group: int,
    *,
    importance: bool = False,
    overrides: Sequence[tuple[str, WeightType]] = (),
    names: Mapping[str, str] | None = None,
) -> dict[str, Choice]:
    """The type of every weight.

    Args:
        mix: how to choose.
        shapes: (out, in) of matrices, (width,) of vectors, which stay F32; by canonical name.
        query_group: query heads that share a KV head.
        importance: whether the importance of columns is known, which changes some choices.
        overrides: regular expressions and types; the first that is found anywhere in a matrix's
            name decides, whatever the mix says.
        names: the names that `overrides` are compared with, by canonical name; None: those.
    """
    patterns = [(re.compile(pattern), weight_type) for pattern, weight_type in overrides]
    layers = 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, shapes) if m), default=-1)
    chosen = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            chosen[name] = Choice(_T.F32, _T.F32)
            continue
        searched = name if names is None else names[name]
        forced = (weight_type for pattern, weight_type in patterns if pattern.search(searched))
        wanted = next(forced, None)
        if wanted is None:
            output = "model.embed_tokens.weight" if "lm_head.weight" not in shapes else ""
            if name in ("lm_head.weight", output):
                wanted = _output_type(mix)
            else:
                wanted = _matrix_type(mix, name, layers, query_group, importance)
        chosen[name] = Choice(wanted, fitting(wanted, shape[-1]))
    return chosen


def _output_type(mix: Mix) -> WeightType:
    """Of the matrix that makes logits, which is the embedding too where they are tied."""
    return mix.base if mix.base.is_float or mix.base is _T.Q8_0 else _T.Q6_K


def _matrix_type(
    mix: Mix, name: str, layers: int, query_group: int, importance: bool
) -> WeightType:
    found = _LAYER.fullmatch(name)
    if found is None:
        return mix.base
    layer, kind = int(found[1]), found[2]
    if kind == "self_attn.v_proj":
        return _value_type(mix, layer, layers, query_group)
    if kind == "mlp.down_proj":
        return _down_type(mix, layer, layers, importance)
    if kind == "self_attn.o_proj":
        return {"Q2_K": _T.Q3_K, "Q3_K_M": _T.Q4_K, "Q3_K_L": _T.Q5_K}.get(mix.name, mix.base)
    return mix.base


def _takes_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _value_type(mix: Mix, layer: int, layers: int, query_group: int) -> WeightType:
    if mix.name in ("Q4_K_M", "Q5_K_M"):
        return _T.Q6_K if _takes_more_bits(layer, layers) else mix.base
    if mix.name == "Q4_K_S":
        return _T.Q5_K if layer < 4 else mix.base
    if mix.name == "Q3_K_M":
        return _T.Q5_K if layer < 2 else _T.Q4_K
    if mix.name == "Q3_K_L":
        return _T.Q5_K
    if mix.name == "Q2_K":
        return _T.Q4_K if query_group >= 4 else _T.Q3_K
    if mix.name in ("IQ4_NL", "IQ4_XS") and query_group >= 4:
        return _T.Q5_K
    return mix.base


def _down_type(mix: Mix, layer: int, layers: int, importance: bool) -> WeightType:
    first = layer < layers // 8
    if mix.name in ("Q4_K_M", "Q5_K_M"):
        return _T.Q6_K if _takes_more_bits(layer, layers) else mix.base
    if mix.name == "Q3_K_M":
        return _T.Q5_K if layer < layers // 16 else _T.Q4_K
    if mix.name == "Q3_K_L":
        return _T.Q5_K
    if mix.name == "Q2_K":
        return _T.Q3_K
    if mix.name == "Q4_K_S" and first:
        return _T.Q5_K
    if mix.name in ("IQ4_NL", "IQ4_XS") and first and not importance:
        return _T.Q5_K
    if mix.name in ("Q4_0", "Q5_0") and first and importance:
        return _T.Q4_1 if mix.name == "Q4_0" else _T.Q5_1
    return mix.base
