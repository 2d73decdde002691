"""Tokenizers and templates that several tests of this room use."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.text.tokenizer import Tokenizer

from .support import gguf_fields, tokenizer


@pytest.fixture(scope="session")
def llama3(shared_data: Path) -> Tokenizer:
    fields = gguf_fields(shared_data / "vocab-tests/ggml-vocab-llama-bpe.gguf")
    return tokenizer(128256, **fields)


@pytest.fixture(scope="session")
def starcoder(shared_data: Path) -> Tokenizer:
    """StarCoder 2's vocabulary: its text is cut as SmolLM2's."""
    fields = gguf_fields(shared_data / "vocab-tests/ggml-vocab-starcoder.gguf")
    return tokenizer(49152, **{**fields, "pre_tokenizer": "smollm"})


@pytest.fixture(scope="session")
def tiny_json(shared_data: Path) -> Tokenizer:
    content = (shared_data / "tiny-smollm3/tokenizer.json").read_bytes()
    return tokenizer(2304, json=content, eos_token_id=2051, origin="tokenizer.json")


@pytest.fixture(scope="session")
def tiny_gguf(shared_data: Path) -> Tokenizer:
    return tokenizer(2304, **gguf_fields(shared_data / "tiny-smollm3/tiny-smollm3-Q8_0.gguf"))
