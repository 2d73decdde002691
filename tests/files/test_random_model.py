"""The random models that benchmarks use are sound files of the real shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from smolrun.files.checkpoint import open_checkpoint
from smolrun.model.presets import preset
from smolrun.quant.blocks import dequantize, tensor_values
from smolrun.quant.types import WeightType
from smolrun.text.tokenizer import Tokenizer
from tests.package import SOURCE
from tests.waiting import SECONDS

MAKER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "make_random_model.py"


def make(path: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, MAKER, path, *arguments],
        check=True,
        env={"PYTHONPATH": str(SOURCE)},
        timeout=SECONDS,
    )


@pytest.mark.parametrize("weight_type", WeightType)
def test_weights_are_spread_alike_in_every_type(
    weight_type: WeightType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MAKER.parent))
    from random_blocks import random_blocks

    blocks = (1 << 18) // weight_type.block_weights
    data = random_blocks(weight_type, blocks, np.random.default_rng(5))
    values = dequantize(data, weight_type, 256)
    assert abs(values.mean()) < 0.003
    assert 0.018 < values.std() < 0.023


def test_the_gguf_package_reads_the_same_numbers(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path, "--preset", "SmolLM2-135M", "--layers", "1", "--type", "Q4_K_M")
    checkpoint = open_checkpoint(path)
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    theirs = by_name["blk.0.ffn_down.weight"]
    ours = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    assert ours.type is WeightType.Q6_K
    values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    np.testing.assert_array_equal(values, tensor_values(ours))


def test_types_of_the_small_model_are_those_of_the_published_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path, "--preset", "SmolLM2-135M-Instruct", "--type", "Q4_K_M")
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == preset("SmolLM2-135M-Instruct")
    count: dict[tuple[str, WeightType], int] = {}
    for name, tensor in checkpoint.tensors.items():
        key = (name.split(".")[-2], tensor.type)
        count[key] = count.get(key, 0) + 1
    assert count["embed_tokens", WeightType.Q8_0] == 1
    assert count["q_proj", WeightType.Q5_0] == 30
    assert (count["v_proj", WeightType.Q8_0], count["v_proj", WeightType.Q5_0]) == (14, 16)
    assert (count["down_proj", WeightType.Q6_K], count["down_proj", WeightType.Q4_K]) == (14, 16)


def test_the_made_up_vocabulary_has_the_real_size_and_is_usable(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path, "--preset", "SmolLM3-3B", "--layers", "1", "--type", "Q2_K")
    checkpoint = open_checkpoint(path)
    data = checkpoint.tokenizer
    assert data is not None
    assert (len(data.tokens), len(data.merges)) == (128_256, 280_147)
    tokenizer = Tokenizer(data, checkpoint.config.vocab_size)
    text = "<|im_start|>Hello, world! 日本 123"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.id_of("<|im_end|>") == 128_012


def test_safetensors_of_a_preset(tmp_path: Path) -> None:
    make(tmp_path / "m", "--preset", "SmolLM2-135M", "--layers", "2")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert {tensor.type for tensor in checkpoint.tensors.values()} == {WeightType.BF16}
    assert checkpoint.chat_template is not None
    assert checkpoint.tokenizer is not None
    tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
    text = "<|im_start|>the sky is blue"
    assert tokenizer.decode(tokenizer.encode(text)) == text
