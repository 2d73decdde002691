"""Tokenizers for the tests of this room, from the golden data or made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolrun.files.checkpoint import TokenizerData
from smolrun.files.gguf import GgufFile
from smolrun.files.tokenizer_data import CONTROL, NORMAL, USER_DEFINED, gguf_tokenizer
from smolrun.text.tokenizer import Tokenizer


def tokenizer(vocab_size: int, **fields: Any) -> Tokenizer:
    fields = {"origin": "test", "pre_tokenizer": "smollm"} | fields
    return Tokenizer(TokenizerData(**fields), vocab_size)


def gguf_data(path: Path, **changes: Any) -> TokenizerData:
    data = gguf_tokenizer(GgufFile.open(path))
    assert data is not None
    return dataclasses.replace(data, **changes)


BYTE_ALPHABET = [
    *(chr(byte) for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]),
    *(chr(0x100 + place) for place in range(68)),
]


def byte_tokenizer(
    control: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    user_defined: Sequence[str] = (),
    words: Sequence[str] = (),
    merges: Sequence[str] = (),
    **fields: Any,
) -> Tokenizer:
    """A tokenizer of the 256 bytes, some words, and some tokens that are no text."""
    tokens = [*control, *user_defined, *BYTE_ALPHABET, *words]
    types = [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    types += [NORMAL] * (len(tokens) - len(types))
    return tokenizer(len(tokens), tokens=tokens, token_types=types, merges=merges, **fields)
