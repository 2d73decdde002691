"""Tokenizers and templates that several tests of this room use."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.text.tokenizer import Tokenizer

from .support import gguf_data, tokenizer


@pytest.fixture(scope="session")
def llama3(shared_data: Path) -> Tokenizer:
    path = shared_data / "vocab-tests/ggml-vocab-llama-bpe.gguf"
    return Tokenizer(gguf_data(path, add_bos_token=False), 128256)


@pytest.fixture(scope="session")
def starcoder(shared_data: Path) -> Tokenizer:
    """StarCoder 2's vocabulary: its text is cut as SmolLM2's."""
    path = shared_data / "vocab-tests/ggml-vocab-starcoder.gguf"
    return Tokenizer(gguf_data(path, pre_tokenizer="smollm"), 49152)


@pytest.fixture(scope="session")
def tiny_json(shared_data: Path) -> Tokenizer:
    content = (shared_data / "tiny-smollm3/tokenizer.json").read_bytes()
    return tokenizer(2304, json=content, eos_token_id=2051, origin="tokenizer.json")


@pytest.fixture(scope="session")
def tiny_gguf(shared_data: Path) -> Tokenizer:
    return Tokenizer(gguf_data(shared_data / "tiny-smollm3/tiny-smollm3-Q8_0.gguf"), 2304)
