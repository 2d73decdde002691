"""Converted models in the programs that they are made for: llama.cpp and transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun import Model
from smolrun.files.convert import convert_files
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import (
    configs,
    nmse,
    save_folder,
    transformers_logits,
    transformers_model,
    values_of,
)
from tests.parity.test_real_model import llama_cpp_logits, mean_divergence

pytestmark = pytest.mark.parity

TEXTS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs.\n\n\tdef f(x):  return x**2",
    "ünïcödé 中文 👍🏽 I'M it'S\r\n\r\n  a\u00a0b",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
]


def read_by_transformers(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@pytest.mark.parametrize("weight_type", [WeightType.F32, WeightType.F16, WeightType.BF16])
def test_llama_cpp_runs_our_gguf(
    shared_data: Path, tmp_path: Path, weight_type: WeightType
) -> None:
    golden = np.load(shared_data / "tiny-smollm3" / "golden.npz")
    ids = golden["medium_ids"].tolist()
    path = tmp_path / "m.gguf"
    convert_files(shared_data / "tiny-smollm3", path, weight_type)
    with Model(path, activations="exact") as model:
        ours = model.forward([ids], all_positions=True)[0]
    divergence = mean_divergence(ours, llama_cpp_logits(path, ids))
    print(weight_type, divergence)
    # llama.cpp rounds what is multiplied by float16 and bfloat16 weights to their type.
    assert divergence < (5e-5 if weight_type is WeightType.BF16 else 1e-6)


def test_llama_cpp_notices_rows_in_the_wrong_order(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.load(shared_data / "tiny-smollm3" / "golden.npz")["short_ids"].tolist()
    with Model(shared_data / "tiny-smollm3", activations="exact") as model:
        ours = model.forward([ids], all_positions=True)[0]
    monkeypatch.setattr("smolrun.files.convert.is_interleaved", lambda name: False)
    convert_files(shared_data / "tiny-smollm3", tmp_path / "m.gguf")
    assert mean_divergence(ours, llama_cpp_logits(tmp_path / "m.gguf", ids)) > 0.01


@pytest.mark.parametrize("name", ["bf16", "Q8_0", "Q4_K_M"])
def test_transformers_runs_our_folder(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / "tiny-smollm3" / f"tiny-smollm3-{name}.gguf"
    ids = np.load(shared_data / "tiny-smollm3" / "golden.npz")["medium_ids"].tolist()
    convert_files(source, tmp_path / "folder")
    expected = transformers_logits(read_by_transformers(tmp_path / "folder"), ids)[0]
    with Model(tmp_path / "folder", activations="exact") as model:
        folder = model.forward([ids], all_positions=True)[0]
    with Model(source, activations="exact") as model:
        gguf = model.forward([ids], all_positions=True)[0]
    print(name, nmse(folder, expected), mean_divergence(expected, gguf))
    assert nmse(folder, expected) < (5e-5 if name == "bf16" else 1e-6)
    assert mean_divergence(expected, gguf) < 2e-6


@given(
    config=configs(),
    dtype=st.sampled_from([WeightType.F32, WeightType.BF16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_transformers_finds_every_setting_after_a_trip_through_gguf(
    config: ModelConfig, dtype: WeightType, seed: int
) -> None:
    tensors = random_weights(config, seed, dtype)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, 40))
    expected = transformers_logits(transformers_model(config, values_of(tensors)), ids)
    with tempfile.TemporaryDirectory() as name:
        folder = save_folder(config, tensors, Path(name) / "one")
        convert_files(folder, Path(name) / "two.gguf")
        convert_files(Path(name) / "two.gguf", Path(name) / "three")
        found = transformers_logits(read_by_transformers(Path(name) / "three"), ids)
    # float32 settings of GGUF differ from config.json's decimals in the eighth digit.
    assert nmse(found, expected) < 1e-9


def text_ids(path: Path, **options: Any) -> list[list[int]]:
    with Model(path, activations="exact") as model:
        return [model.tokenizer.encode(text, **options) for text in TEXTS]


@pytest.mark.parametrize("source", ["tiny-smollm3", "real"])
def test_text_is_the_same_in_every_program(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import llama_cpp
    from transformers import AutoTokenizer

    if source == "real":
        first = request.getfixturevalue("real_model")
    else:
        first = request.getfixturevalue("shared_data") / "tiny-smollm3"
    folder, gguf, folder_again = tmp_path / "a", tmp_path / "b.gguf", tmp_path / "c"
    convert_files(first, folder)
    convert_files(folder, gguf)
    convert_files(gguf, folder_again)
    expected = text_ids(first)
    for path in (folder, gguf, folder_again):
        assert text_ids(path) == expected
    messages = [{"role": "user", "content": "Why?"}]
    rendered = None
    for path in (folder, folder_again):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected
        assert [tokenizer.encode(text) for text in TEXTS] == expected
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered in (None, text)
        rendered = text
    theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    found = [theirs.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]
    theirs.close()
    assert found == expected
