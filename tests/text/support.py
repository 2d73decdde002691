"""Tokenizers for the tests of this room, from the golden data."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from smolrun.text.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smolrun.files.checkpoint import TokenizerData


@dataclass
class Data:
    """The fields of `TokenizerData`, each with a default."""

    json: bytes | None = None
    tokens: Sequence[str] = ()
    token_types: Sequence[int] = ()
    merges: Sequence[str] = ()
    pre_tokenizer: str | None = "smollm"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    config: dict[str, object] = field(default_factory=dict)
    origin: str = "test"


def tokenizer(vocab_size: int, **fields: Any) -> Tokenizer:
    return Tokenizer(cast("TokenizerData", Data(**fields)), vocab_size)


@functools.cache
def gguf_fields(path: Path) -> dict[str, Any]:
    """Fields of a GGUF vocabulary, read by the gguf package."""
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields

    def value(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    return {
        "tokens": value("tokens"),
        "token_types": value("token_type"),
        "merges": value("merges"),
        "pre_tokenizer": value("pre"),
        "bos_token_id": value("bos_token_id"),
        "eos_token_id": value("eos_token_id"),
        "origin": path.name,
    }


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
