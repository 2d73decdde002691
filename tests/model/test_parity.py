"""The reference reading against transformers: random models of many shapes, and a trained one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.model.random import random_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.models import (
    Values,
    configs,
    nmse,
    save_folder,
    small_config,
    transformers_logits,
    transformers_model,
    values_of,
)

PASSAGES = ["short", "medium", "long", "chat"]
# transformers computes in float32, the reference in float64: what is seen is float32's rounding.
RANDOM_BOUND = 3e-11
GOLDEN_BOUND = 1e-11


@pytest.mark.parity
@settings(max_examples=100)
@given(config=configs(), seed=st.integers(0, 2**64 - 1), length=st.integers(1, 60))
def test_random_models_of_many_shapes(config: ModelConfig, seed: int, length: int) -> None:
    weights = values_of(random_weights(config, seed))
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (2, length))
    expected = transformers_logits(transformers_model(config, weights), ids)
    found = ReferenceRunner(build(config), weights).forward(ids)
    assert nmse(found, expected) <= RANDOM_BOUND


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [WeightType.F32, WeightType.F16, WeightType.BF16])
def test_a_saved_folder_is_what_transformers_loads(tmp_path: Path, dtype: WeightType) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = small_config(attention_bias=True)
    tensors = random_weights(config, 4, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        save_folder(config, tensors, tmp_path), dtype=torch.float32
    )
    ids = np.arange(20)[None]
    found = ReferenceRunner(build(config), values_of(tensors)).forward(ids)
    assert nmse(found, transformers_logits(model, ids)) <= RANDOM_BOUND


@pytest.mark.parity
def test_yarn_on_a_long_text() -> None:
    """Far positions, where an error in the frequencies or the magnitude would show."""
    config = small_config(max_position_embeddings=1024, rope_theta=5e6).with_context(2048)
    weights = values_of(random_weights(config, 5))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (1, 2000))
    expected = transformers_logits(transformers_model(config, weights), ids)
    assert nmse(ReferenceRunner(build(config), weights).forward(ids), expected) <= RANDOM_BOUND


@pytest.fixture(scope="module")
def trained(shared_data: Path) -> tuple[ModelConfig, Values, dict[str, npt.NDArray[Any]]]:
    """Configuration, weights and transformers' logits of a small SmolLM3."""
    folder = shared_data / "tiny-smollm3"
    values = json.loads((folder / "config.json").read_text())
    with np.load(folder / "golden.npz") as golden:
        return (
            ModelConfig.from_hugging_face(values, "config.json"),
            _bfloat16_values(folder / "model.safetensors"),
            dict(golden),
        )


def _bfloat16_values(path: Path) -> Values:
    import safetensors

    deserialize: Any = safetensors.deserialize
    values = {}
    for name, entry in deserialize(path.read_bytes()):
        assert entry["dtype"] == "BF16"
        upper = np.frombuffer(entry["data"], dtype="<u2").astype(np.uint32)
        values[name] = (upper << 16).view(np.float32).reshape(entry["shape"])
    return values


@pytest.mark.parametrize("passage", PASSAGES)
def test_logits_of_a_trained_model(
    trained: tuple[ModelConfig, Values, dict[str, npt.NDArray[Any]]], passage: str
) -> None:
    config, weights, golden = trained
    logits = ReferenceRunner(build(config), weights).forward(golden[f"{passage}_ids"])[0]
    assert nmse(logits[golden[f"{passage}_rows"]], golden[f"{passage}_logits"]) <= GOLDEN_BOUND


@pytest.mark.parametrize("passage", PASSAGES)
def test_greedy_continuation_of_a_trained_model(
    trained: tuple[ModelConfig, Values, dict[str, npt.NDArray[Any]]], passage: str
) -> None:
    config, weights, golden = trained
    prompt = golden[f"{passage}_ids"]
    reference = ReferenceRunner(build(config), weights, dtype=np.float32)
    token = int(reference.forward(prompt)[0, -1].argmax())
    found = [token]
    for position in range(len(prompt), len(prompt) + 47):
        token = int(reference.forward([[token]], start_pos=position)[0, -1].argmax())
        found.append(token)
    assert found == golden[f"{passage}_greedy"].tolist()


@pytest.mark.parametrize("passage", ["short", "medium", "chat"])
@pytest.mark.parametrize("wrong", ["everywhere", "inverted", "one layer late"])
def test_a_wrong_nope_pattern_fails_the_same_check(
    trained: tuple[ModelConfig, Values, dict[str, npt.NDArray[Any]]], passage: str, wrong: str
) -> None:
    config, weights, golden = trained
    right = config.no_rope_layers
    pattern = {
        "everywhere": (1,) * len(right),
        "inverted": tuple(1 - rope for rope in right),
        "one layer late": right[-1:] + right[:-1],
    }[wrong]
    config = replace(config, no_rope_layers=pattern)
    logits = ReferenceRunner(build(config), weights).forward(golden[f"{passage}_ids"])[0]
    # Not by a hair: the wrong model is off by seven orders of magnitude more than the bound.
    assert nmse(logits[golden[f"{passage}_rows"]], golden[f"{passage}_logits"]) > 1e-4
