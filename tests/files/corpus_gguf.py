"""GGUF files whose container is malformed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial

from .corpus_case import EMBEDDING, LAST, TOKENS, Case, Q, changed, gguf, length_of, text, u32, u64
from .images import (
    HIDDEN,
    Field,
    GgufImage,
    tiny_gguf,
    tiny_metadata,
)


def container_cases() -> Iterator[Case]:
    yield gguf("empty", lambda: b"", "empty")
    yield gguf("bad-magic", text("magic", b"GGML"), "magic", "GGML")
    for version in (0, 1, 4):
        yield gguf(
            f"version-{version}",
            u32("version", version),
            "version",
            str(version),
        )
    yield gguf("big-endian", u32("version", 3 << 24), "big-endian")
    for length in range(1, 24):
        yield gguf(f"only-{length}-bytes", partial(_first, length), "the file ends at")
    for name, count in COUNTS.items():
        for which in ("tensor count", "metadata count"):
            yield gguf(
                f"{which.replace(' ', '-')}-{name}-in-32-bytes",
                partial(_counts, which, count),
                which,
                str(count),
            )
    keys = len(tiny_metadata())
    for name, wrong in (("more", keys + 1), ("fewer", keys - 1)):
        yield gguf(
            f"one-metadata-key-{name}",
            u64("metadata count", wrong),
        )
    yield gguf("two-million-keys", _two_million_keys, "metadata count", "2000000")


COUNTS = {"2e31": 1 << 31, "2e32": 1 << 32, "2e63-1": (1 << 63) - 1, "2e63": 1 << 63}
COUNTS["2e64-1"] = (1 << 64) - 1


def _two_million_keys() -> bytes:
    entry = struct.pack("<Q1sIB", 1, b"k", 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 2_000_000) + entry * 2_000_000


def tensor_cases() -> Iterator[Case]:
    yield gguf("ends-one-byte-early", partial(_cut, 1), LAST, "the file ends at")
    yield gguf("ends-before-its-data", partial(_cut, len(tiny_gguf().data)), EMBEDDING)
    yield gguf("bytes-after-the-end", lambda: tiny_gguf().to_bytes() + b"x" * 40, "after the last")
    for name, offset in (
        ("2e64-32", (1 << 64) - 32),
        ("wrapping-sum", (1 << 64) - HIDDEN * 2),
        ("unaligned", 1),
        ("of-the-tensor-before", 0),
        ("after-a-hole", 1 << 16),
    ):
        yield gguf(
            f"offset-{name}",
            u64(f"{LAST}:offset", offset),
            LAST,
            f"offset {offset}",
        )
    for name, type_id, sizes, word in (
        ("2e32-by-2e32", 0, (1 << 32, 1 << 32), str(1 << 32)),
        ("2e62-1", 0, ((1 << 62) - 1,), str((1 << 62) - 1)),
        ("q8_0-wrapping", 8, ((1 << 64) // 34 * 32 // 32 * 32,), "dimension"),
        ("q6_k-wrapping", 14, ((1 << 64) // 210 // 256 * 256 * 256 % (1 << 64),), "dimension"),
        ("minus-one", 0, ((1 << 64) - 1,), str((1 << 64) - 1)),
        ("zero", 0, (0,), "dimension of 0"),
        ("zero-rows", 0, (HIDDEN, 0), "dimension of 0"),
        ("2e21-cubed-twice", 0, (1 << 21, 1 << 21, 1 << 21, 2), str(1 << 21)),
        ("i8-wrapping-sum", 24, (0x7FFFFFFFFFFFFFC0,), str(0x7FFFFFFFFFFFFFC0)),
        ("part-of-a-block", 8, (33, 2), "33"),
    ):
        yield gguf(
            f"dimensions-{name}",
            partial(_with_sizes, type_id, sizes),
            EMBEDDING,
            word,
        )
    for count in (0, 5, (1 << 32) - 1):
        yield gguf(
            f"{count}-dimensions",
            u32(f"{Q}:dimensions", count),
            Q,
            str(count),
        )
    for type_id in (-1, 4, 5, 31, 32, 33, 36, 37, 38, 41, 1 << 31):
        yield gguf(
            f"tensor-type-{type_id}",
            u32(f"{Q}:type", type_id),
            Q,
            str(type_id % (1 << 32)),
        )
    for type_id, name in ((16, "IQ2_XXS"), (24, "I8"), (34, "TQ1_0"), (9, "Q8_1"), (39, "MXFP4")):
        yield gguf(
            f"tensor-type-{name}",
            u32(f"{Q}:type", type_id),
            Q,
            name,
            "requantize",
        )
    yield gguf("duplicate-tensor", text(f"{Q}:name", EMBEDDING.encode()), "twice")
    yield gguf("tensor-without-name", text(f"{Q}:name", b""), "name of tensor 2")
    yield gguf("tensor-name-of-65", text(f"{Q}:name", b"a" * 65), "65")
    yield gguf("tensor-name-with-nul", text(f"{Q}:name", b"a\0b"), "name of")
    yield gguf("tensor-name-not-utf8", text(f"{Q}:name", b"\xff"), "UTF-8")


def _cut(missing: int) -> bytes:
    content = tiny_gguf().to_bytes()
    return content[: len(content) - missing]


def _with_sizes(type_id: int, sizes: tuple[int, ...]) -> GgufImage:
    """The tiny model, the first tensor given another type and other sizes."""
    image = tiny_gguf().set_u32(f"{EMBEDDING}:type", type_id)
    image.set_u32(f"{EMBEDDING}:dimensions", len(sizes))
    place = image.fields.index(image[f"{EMBEDDING}:size0"])
    del image.fields[place : place + 2]
    image.fields[place:place] = [Field("size", struct.pack("<Q", n % (1 << 64))) for n in sizes]
    return image


# -- GGUF: values -----------------------------------------------------------------------------


def value_cases() -> Iterator[Case]:
    alignment = "general.alignment"
    for value in (0, 1, 4, 13, 48, 1 << 17, 1 << 30, 1 << 31):
        yield gguf(
            f"alignment-{value}",
            changed({alignment: ("u32", value)}),
            alignment,
            str(value),
        )
    others: tuple[tuple[str, object], ...] = (("i32", 32), ("u64", 32), ("[u32]", [32]))
    for stored, other in (*others, ("string", "32")):
        yield gguf(
            f"alignment-as-{stored}",
            changed({alignment: (stored, other)}),
            alignment,
            stored.strip("[]"),
        )
    yield gguf("string-of-2e40", length_of("general.name:value", 1 << 40), "name")
    yield gguf("string-of-2e64-1", length_of("general.name:value", -1), "name")
    yield gguf("string-of-1-GiB-in-160-bytes", _gigabyte_string, "k", str(1 << 30))
    yield gguf("array-of-2e63-in-49-bytes", _endless_array, "k", str(1 << 63))
    for name, length in (("2e63", 1 << 63), ("2e64-1", (1 << 64) - 1), ("too-long", 1 << 21)):
        yield gguf(
            f"string-array-length-{name}",
            u64(f"{TOKENS}:length", length),
            TOKENS,
            str(length),
        )
    yield gguf(
        "string-in-array-too-long",
        length_of(f"{TOKENS}[5]", 1 << 50),
        f"{TOKENS}'[5]",
        str(1 << 50),
    )
    yield gguf("token-not-utf8", text(f"{TOKENS}[7]", b"\xc3("), TOKENS, "[7]", "UTF-8")
    yield gguf("token-of-10-MB", text(f"{TOKENS}[7]", b"a" * 10**7), "[7]", "10000000")
    yield gguf("array-of-arrays", u32(f"{TOKENS}:element type", 9), TOKENS)
    yield gguf("array-of-type-99", u32(f"{TOKENS}:element type", 99), "99")
    for type_id in (13, 99, (1 << 32) - 1):
        yield gguf(
            f"value-type-{type_id}",
            u32("llama.block_count:type", type_id),
            "llama.block_count",
            str(type_id),
        )
    name = "general.name:key"
    yield gguf("duplicate-key", text(name, b"general.architecture"), "twice")
    yield gguf("empty-key", text(name, b""), "metadata key 1")
    yield gguf("key-with-nul", text(name, b"a\0b"), "metadata key 1")
    yield gguf("key-not-utf8", text(name, b"\xff\xfe"), "metadata key 1", "UTF-8")
    yield gguf("key-of-70000", text(name, b"k" * 70_000), "metadata key 1", "70000")
    yield gguf(
        "bool-of-2",
        text("tokenizer.ggml.add_bos_token:value", b"\2"),
        "add_bos_token",
        "2",
    )
    yield gguf("split-file", changed({"split.count": ("u16", 3)}), "split.count", "3")


def _gigabyte_string() -> bytes:
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIQ", 1, b"k", 8, 1 << 30)
    return start + bytes(160 - len(start))


def _endless_array() -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 1 << 63)


def _first(length: int) -> bytes:
    return tiny_gguf().to_bytes()[:length]


def _counts(which: str, count: int) -> bytes:
    counts = (count, 1) if which == "tensor count" else (0, count)
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(8)
