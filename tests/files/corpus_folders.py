"""Malformed safetensors files, and folders that do not belong together."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .corpus_case import Case
from .images import (
    safetensors_image,
    tiny_config,
    tiny_safetensors,
)


def safetensors(name: str, content: Callable[[], bytes], *mentions: str) -> Case:
    def write(folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(tiny_config()))
        path = folder / "model.safetensors"
        path.write_bytes(content())
        return path

    return Case(f"safetensors-{name}", write, ("model.safetensors", *mentions))


def one_tensor(text: str | bytes, data: int = 16) -> Callable[[], bytes]:
    """A file with this header text and so many bytes of data."""

    def content() -> bytes:
        header = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(header)) + header + bytes(data)

    return content


def entry(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


def safetensors_cases() -> Iterator[Case]:
    good = entry()
    yield safetensors("empty", lambda: b"", "empty")
    yield safetensors("7-bytes", lambda: bytes(7), "7")
    for length in ((1 << 64) - 1, 100_000_001, 1 << 20):
        yield safetensors(f"header-of-{length}", partial(_header_of, length), str(length))
    yield safetensors(
        "long-header", lambda: struct.pack("<Q", 2 << 20) + b" " * (2 << 20), "2097152"
    )
    yield safetensors("one-byte-more", one_tensor(f'{{"a":{good}}}', 17), "1 bytes after")
    yield safetensors("one-byte-less", one_tensor(f'{{"a":{good}}}', 15), "'a'", "ends at")
    for name, first, second, word in (
        ("hole-at-start", (4, 20), None, "hole"),
        ("hole-between", (0, 16), (20, 36), "hole"),
        ("overlap", (0, 16), (8, 24), "overlap"),
        ("full-overlap", (0, 16), (0, 16), "overlap"),
    ):
        text = f'"a":{entry(offsets=first)}'
        if second:
            text += f',"b":{entry(offsets=second)}'
        yield safetensors(name, one_tensor(f"{{{text}}}", 36), word)
    for name, text, word in (
        ("begin-after-end", entry(offsets=(16, 0)), "[16, 0]"),
        ("negative-offset", entry(offsets=(-16, 0)), "[-16, 0]"),
        ("float-offset", entry(offsets=(0, 16.0)), "16.0"),
        ("bool-offset", entry(offsets=(False, 16)), "False"),
        ("three-offsets", entry(offsets=(0, 16, 16)), "[0, 16, 16]"),
        ("negative-dimension", entry((-4,)), "-4"),
        ("float-dimension", entry((4.0,)), "4.0"),
        ("text-dimension", entry(("4",)), "'4'"),
        ("unknown-dtype", entry(dtype="F33"), "F33"),
        ("dtype-number", entry(dtype=32), "32"),
        ("dtype-i64", entry((2,), dtype="I64"), "I64"),
        ("dtype-f8", entry((16,), dtype="F8_E4M3"), "F8_E4M3"),
        ("shape-not-span", entry((5,)), "20"),
        ("product-overflow", entry((1 << 40, 1 << 40)), str(1 << 40)),
        ("2e32-by-2e32", entry((1 << 32, 1 << 32), (0, 0)), str(1 << 32)),
        ("2e40-by-2e40-by-0", entry((1 << 40, 1 << 40, 0), (0, 0)), str(1 << 40)),
        ("0-by-2e64-by-2", entry((0, (1 << 64) - 1, 2), (0, 0)), "0"),
        ("zero-dimension", entry((2, 0), (0, 0)), "0"),
        ("scalar", entry((), (0, 4)), "dimensions"),
        ("nine-dimensions", entry((1,) * 8 + (4,)), "dimensions"),
        ("without-dtype", '{"shape":[4],"data_offsets":[0,16]}', "dtype"),
        ("without-shape", '{"dtype":"F32","data_offsets":[0,16]}', "shape"),
        ("without-offsets", '{"dtype":"F32","shape":[4]}', "data_offsets"),
        (
            "duplicate-field",
            '{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}',
            "twice",
        ),
        ("not-an-object", "[]", "[]"),
        ("null", "null", "None"),
        ("shape-not-a-list", entry(4), "4"),
        ("nan", '{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}', "NaN"),
        ("integer-of-5000-digits", '{"dtype":"F32","shape":[' + "9" * 5000 + "]}", "5000"),
    ):
        yield safetensors(name, one_tensor(f'{{"a":{text}}}'), word)
    yield safetensors("duplicate-name", one_tensor(f'{{"a":{good},"a":{good}}}'), "'a'", "twice")
    yield safetensors(
        "duplicate-name-other-shape",
        one_tensor(f'{{"a":{good},"a":{entry((2, 2))}}}'),
        "'a'",
        "twice",
    )
    yield safetensors("empty-name", one_tensor(f'{{"":{good}}}'), "name")
    yield safetensors("name-with-nul", one_tensor(f'{{"a\\u0000b":{good}}}'), "name")
    yield safetensors("lone-surrogate", one_tensor(f'{{"\\ud800":{good}}}'), "name")
    yield safetensors(
        "metadata-number", one_tensor(f'{{"__metadata__":{{"a":1}},"a":{good}}}'), "__metadata__"
    )
    yield safetensors(
        "metadata-list", one_tensor(f'{{"__metadata__":[],"a":{good}}}'), "__metadata__"
    )
    yield safetensors("deep-nesting", one_tensor('{"a":' + "[" * 200_000, 0), "nested")
    yield safetensors("json-array", one_tensor("[]", 0), "object")
    yield safetensors("trailing-json", one_tensor(f'{{"a":{good}}} {{}}'), "JSON")
    yield safetensors("no-json", one_tensor("hello"), "JSON")
    yield safetensors("not-utf8", one_tensor(b'{"\xff":1}'), "UTF-8")
    yield safetensors("missing-tensor", lambda: _without("model.norm.weight"), "model.norm.weight")
    yield safetensors("foreign-tensor", _with_foreign_tensor, "model.extra.weight")


def _without(name: str) -> bytes:
    header = tiny_safetensors().header
    data, image = tiny_safetensors().data, {}
    for key, value in header.items():
        begin, end = value["data_offsets"]
        if key != name:
            image[key] = (value["dtype"], tuple(value["shape"]), data[begin:end])
    return safetensors_image(image).to_bytes()


def _with_foreign_tensor() -> bytes:
    image = tiny_safetensors()
    end = len(image.data)
    image.header["model.extra.weight"] = {
        "dtype": "F32",
        "shape": [2],
        "data_offsets": [end, end + 8],
    }
    image.data += bytes(8)
    return image.to_bytes()


def _header_of(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}"


# -- folders ----------------------------------------------------------------------------------


def folder(name: str, write: Callable[[Path], object], *mentions: str) -> Case:
    def into(target: Path) -> Path:
        root = target / "model"
        root.mkdir()
        (root / "config.json").write_text(json.dumps(tiny_config()))
        write(root)
        return root

    return Case(f"folder-{name}", into, mentions)


def json_file(name: str, content: object) -> Callable[[Path], None]:
    """A sound model, one of its JSON files replaced."""

    def write(root: Path) -> None:
        (root / "model.safetensors").write_bytes(tiny_safetensors().to_bytes())
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def index(weight_map: Any, *names: str) -> Callable[[Path], None]:
    """A sharded model with this weight_map; the files named hold the whole model."""

    def write(root: Path) -> None:
        for name in names:
            (root / name).write_bytes(tiny_safetensors().to_bytes())
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (root / "model.safetensors.index.json").write_text(text)

    return write


def whole(file_name: str) -> dict[str, str]:
    return dict.fromkeys(tiny_safetensors().header, file_name)


def folder_cases() -> Iterator[Case]:
    for name in (
        "../x.safetensors",
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "a/../../x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "x\0y.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "model.bin",
        "file:x.safetensors",
    ):
        shown = ascii(name).strip("'")[:12]
        yield folder(f"shard-{shown}", index(whole(name)), "weight_map", shown)
    yield folder("shard-number", index({"a": 1}), "weight_map", "1")
    yield folder("weight-map-list", index([]), "weight_map")
    yield folder("weight-map-empty", index({}), "weight_map")
    many = {f"t{i}": f"{i}.safetensors" for i in range(10_000)}
    yield folder("10000-shards", index(many), "weight_map", "10000")
    yield folder("shard-missing", index(whole("gone.safetensors")), "gone.safetensors", "missing")
    mapped = whole("a.safetensors")
    yield folder(
        "name-mapped-but-absent", index({**mapped, "x": "a.safetensors"}, "a.safetensors"), "'x'"
    )
    del mapped["model.norm.weight"]
    yield folder("name-not-mapped", index(mapped, "a.safetensors"), "model.norm.weight")

    def link_out(root: Path) -> None:
        outside = root.parent / "outside.safetensors"
        outside.write_bytes(tiny_safetensors().to_bytes())
        os.symlink(outside, root / "a.safetensors")
        index(whole("a.safetensors"))(root)

    yield folder("shard-links-out", link_out, "a.safetensors", "link")

    config = tiny_config()
    for name, content, words in (
        ("config-empty", "", ("config.json",)),
        ("config-not-json", "{", ("config.json",)),
        ("config-list", "[]", ("config.json",)),
        ("config-not-utf8", b'{"a":"\xff"}', ("config.json", "UTF-8")),
        ("config-deep", '{"a":' + "[" * 100_000, ("config.json", "nested")),
        ("config-nan", '{"a":NaN}', ("config.json", "NaN")),
        ("config-huge", b" " * (3 << 20), ("config.json", str(3 << 20))),
        ("config-duplicate", '{"a":1,"a":2}', ("config.json", "'a'")),
        ("config-foreign", {**config, "model_type": "gpt2"}, ("config.json", "gpt2")),
        ("config-heads", {**config, "num_attention_heads": 3}, ("config.json",)),
        ("config-layers", {**config, "num_hidden_layers": 2}, ("layers.1",)),
        ("config-eos", {**config, "eos_token_id": 999}, ("config.json", "999")),
        (
            "config-quantized",
            {**config, "quantization_config": {"quant_method": "bitsandbytes"}},
            ("quantization_config",),
        ),
        ("config-activation", {**config, "hidden_act": "gelu"}, ("hidden_act", "gelu")),
    ):
        yield folder(name, json_file("config.json", content), *words)
    for name, content, words in (
        ("generation_config.json", {"temperature": -1}, ("temperature", "-1")),
        ("generation_config.json", {"top_k": 1.5}, ("top_k", "1.5")),
        ("generation_config.json", {"top_p": "high"}, ("top_p", "high")),
        ("generation_config.json", "[1]", ("generation_config.json",)),
        ("chat_template.jinja", b"\xff", ("chat_template.jinja", "UTF-8")),
        ("chat_template.jinja", b"x" * (2 << 20), ("chat_template.jinja", str(2 << 20))),
        ("chat_template.json", {"chat_template": 5}, ("chat_template", "5")),
        ("chat_template.json", {"chat_template": [{"name": "rag"}]}, ("default", "rag")),
    ):
        (word, *_) = words
        yield folder(f"{name}-{word}-{words[-1]}", json_file(name, content), name, *words)

    def tokenizer(content: bytes) -> Callable[[Path], None]:
        return json_file("tokenizer.json", content)

    yield folder("tokenizer-not-json", tokenizer(b"{"), "tokenizer.json")
    yield folder("tokenizer-empty-object", tokenizer(b"{}"), "tokenizer.json")
    yield folder(
        "only-pytorch",
        lambda root: (root / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        "pytorch_model.bin",
        ".gguf",
        ".safetensors",
    )
    yield folder(
        "only-an-adapter",
        lambda root: (root / "adapter_model.safetensors").write_bytes(b""),
        "adapter",
        "merge",
    )
