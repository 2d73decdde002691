"""Which weight gets which type. tests/parity/test_mixes.py holds the rules to llama.cpp's."""

from __future__ import annotations

import pytest

from smolrun.quant.mixes import MIXES, Choice, choose_types, find_mix, fitting
from smolrun.quant.types import WeightType as T


def test_names_are_found_in_any_case() -> None:
    assert find_mix("q4_k_m") is find_mix("Q4_K_M") is find_mix("q4_k") is MIXES["Q4_K_M"]
    assert find_mix("bf16").base is T.BF16
    with pytest.raises(ValueError, match=r"no type 'q7'; there are F32, .*Q4_K_M"):
        find_mix("q7")


@pytest.mark.parametrize(
    ("wanted", "columns", "found"),
    [
        (T.Q4_K, 768, T.Q4_K), (T.Q4_K, 576, T.Q5_0), (T.Q5_K, 960, T.Q5_1),
        (T.Q6_K, 576, T.Q8_0), (T.Q2_K, 32, T.Q4_0), (T.Q3_K, 32, T.Q4_0),
        (T.IQ4_XS, 96, T.IQ4_NL), (T.Q8_0, 40, T.F16), (T.Q4_K, 40, T.F16), (T.F32, 7, T.F32),
    ],
)  # fmt: skip
def test_what_fits_a_row(wanted: T, columns: int, found: T) -> None:
    assert fitting(wanted, columns) is found


SHAPES = {
    "model.embed_tokens.weight": (100, 256),
    "model.layers.0.input_layernorm.weight": (256,),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 576),
}


def test_overrides_come_first_and_must_fit() -> None:
    chosen = choose_types(
        find_mix("q4_0"),
        SHAPES,
        1,
        overrides=[("down", T.Q5_K), ("layers", T.Q8_0), ("q_proj", T.F16)],
    )
    assert list(chosen.values()) == [
        Choice(T.Q6_K, T.Q6_K), Choice(T.F32, T.F32), Choice(T.Q8_0, T.Q8_0),
        Choice(T.Q5_K, T.Q5_1),
    ]  # fmt: skip
    named = choose_types(
        find_mix("q4_0"),
        SHAPES,
        1,
        overrides=[("^x$", T.F16)],
        names={name: "x" for name in SHAPES},
    )
    assert [choice.type for choice in named.values()] == [T.F16, T.F32, T.F16, T.F16]
