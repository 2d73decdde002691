"""A malformed file, and GGUF files with one field changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .images import (
    GgufImage,
    Metadata,
    Tensors,
    changed_gguf,
    tiny_gguf,
)


@dataclass(frozen=True)
class Case:
    """A bad file (or folder), and what the error must name."""

    name: str
    write: Callable[[Path], Path]  # puts it into an empty folder and returns what to open
    mentions: tuple[str, ...]


TOKENS = "tokenizer.ggml.tokens"
EMBEDDING = "token_embd.weight"
LAST = "output_norm.weight"
Q = "blk.0.attn_q.weight"


def gguf(name: str, content: Callable[[], GgufImage | bytes], *mentions: str) -> Case:
    """A GGUF file of this content."""

    def write(folder: Path) -> Path:
        image = content()
        path = folder / "bad.gguf"
        path.write_bytes(image if isinstance(image, bytes) else image.to_bytes())
        return path

    return Case(f"gguf-{name}", write, ("bad.gguf", *mentions))


# The tiny model, one field of it changed.


def u32(label: str, value: int) -> Callable[[], GgufImage]:
    return lambda: tiny_gguf().set_u32(label, value)


def u64(label: str, value: int) -> Callable[[], GgufImage]:
    return lambda: tiny_gguf().set_u64(label, value)


def text(label: str, data: bytes) -> Callable[[], GgufImage]:
    return lambda: tiny_gguf().set(label, data)


def length_of(label: str, length: int) -> Callable[[], GgufImage]:
    return lambda: tiny_gguf().set_length(label, length)


def changed(
    metadata: Metadata | None = None,
    *,
    without: str | None = None,
    tensors: Callable[[Tensors], None] | None = None,
) -> Callable[[], GgufImage]:
    return lambda: changed_gguf(metadata, without=without, tensors=tensors)
