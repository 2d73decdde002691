"""Sound files changed at random: each either is refused, or loads and computes.

SMOLRUN_FUZZ sets the number of structure-aware mutations of each format; from 10000 on, every
prefix and every single-byte substitution of the header is tried too, not a sample.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from smolrun.errors import ModelFormatError
from smolrun.files.safetensors import SafetensorsFile
from smolrun.quant.blocks import tensor_values

from .images import (
    PROMPT,
    Field,
    GgufImage,
    SafetensorsImage,
    tiny_config,
    tiny_gguf,
    tiny_safetensors,
)
from .loading import open_whole, run

pytestmark = pytest.mark.fuzz

MUTATIONS = int(os.environ.get("SMOLRUN_FUZZ", "500"))
EXHAUSTIVE = MUTATIONS >= 10_000
EDGES = [0, 1, 2, 3, 31, 32, 33, 255, 256, 65_535, 1 << 16, (1 << 31) - 1, 1 << 31]
EDGES += [(1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
# Beyond this, sound arithmetic overflows, and a logit that is not finite proves nothing.
MODERATE = 1e4


def outcome(path: Path) -> bool:
    """Whether the file loads; then it must compute, too, and finitely if its weights are."""
    try:
        checkpoint, tokenizer = open_whole(path)
    except ModelFormatError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.isprintable()
        return False
    if tokenizer is not None:
        tokenizer.encode("<|im_start|>babc d")
    vocabulary = checkpoint.config.vocab_size
    logits = run(checkpoint, [token % vocabulary for token in PROMPT])
    values = [tensor_values(tensor) for tensor in checkpoint.tensors.values()]
    if all(np.abs(value).max() < MODERATE for value in values):  # false for NaN
        assert np.isfinite(logits).all()
    checkpoint.close()
    return True


# -- GGUF -------------------------------------------------------------------------------------


def mutate_gguf(image: GgufImage, choose: random.Random) -> None:
    fields = image.fields
    place = choose.randrange(len(fields))
    chosen = fields[place]
    action = choose.choice(("edge", "edge", "near", "bits", "delete", "repeat", "swap", "data"))
    if action == "delete":
        del fields[place]
    elif action == "repeat":
        fields.insert(place, copy.copy(chosen))
    elif action == "swap":
        other = choose.randrange(len(fields))
        fields[place], fields[other] = fields[other], chosen
    elif action == "data":
        mutate_data(image, choose)
    elif chosen.is_string:
        mutate_string(chosen, choose)
    elif action == "bits":
        number = int.from_bytes(chosen.data, "little") ^ 1 << choose.randrange(8 * len(chosen.data))
        chosen.data = number.to_bytes(len(chosen.data), "little")
    else:
        number = int.from_bytes(chosen.data, "little")
        number = choose.choice(EDGES) if action == "edge" else number + choose.randint(-2, 2)
        size = len(chosen.data)
        chosen.data = (number % (1 << 8 * size)).to_bytes(size, "little")


def mutate_string(chosen: Field, choose: random.Random) -> None:
    action = choose.randrange(4)
    if action == 0:
        chosen.length = choose.choice(EDGES)
    elif action == 1:
        chosen.length = max(0, len(chosen.data) + choose.randint(-9, 9))
    elif action == 2:
        chosen.data = choose.choice(
            (b"", b"\0", b"\xff", b"a" * 100, b"blk.0.attn_k.weight", b"a b")
        )
    elif chosen.data:
        place = choose.randrange(len(chosen.data))
        changed = chosen.data[place] ^ 1 << choose.randrange(8)
        chosen.data = chosen.data[:place] + bytes([changed]) + chosen.data[place + 1 :]


def mutate_data(image: GgufImage | SafetensorsImage, choose: random.Random) -> None:
    action = choose.randrange(3)
    place = choose.randrange(len(image.data))
    if action == 0:
        image.data = image.data[:place]
    elif action == 1:
        image.data += bytes(choose.choice((1, 31, 32, 4096)))
    else:
        noise = choose.randbytes(8)
        image.data = image.data[:place] + noise + image.data[place + 8 :]


def test_mutated_gguf(tmp_path: Path) -> None:
    choose = random.Random(20250708)
    seed = tiny_gguf()
    path = tmp_path / "mutated.gguf"
    loaded = 0
    for number in range(MUTATIONS):
        image = copy.deepcopy(seed)
        for _ in range(choose.randint(1, 3)):
            mutate_gguf(image, choose)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(image.to_bytes())
        loaded += outcome(path)
        path.unlink()
    # Mutations that are all refused would not reach what lies behind the reader.
    assert MUTATIONS // 50 < loaded < MUTATIONS // 2


def header_bytes(content: bytes, header_length: int) -> Iterator[bytes]:
    """Prefixes of a header, and the file with one byte of the header changed."""
    step = 1 if EXHAUSTIVE else 17
    for length in range(0, header_length, step):
        yield content[:length]
    for place in range(0, header_length, step):
        old = content[place]
        for new in {0x00, 0xFF, old ^ 0x80} - {old}:
            yield content[:place] + bytes([new]) + content[place + 1 :]


def test_prefixes_and_single_bytes_of_a_gguf_header(tmp_path: Path) -> None:
    image = tiny_gguf()
    for number, content in enumerate(header_bytes(image.to_bytes(), len(image.header()))):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        loaded = outcome(path)
        assert not loaded or len(content) == len(image.to_bytes())
        path.unlink()


# -- safetensors ------------------------------------------------------------------------------


def mutate_header(image: SafetensorsImage, choose: random.Random) -> None:
    header = image.header
    name = choose.choice(list(header))
    entry: dict[str, Any] = header[name]
    action = choose.randrange(8)
    if action == 0:
        del header[name]
    elif action == 1:
        header[choose.choice(("", "x", "lm_head.weight", "a\0"))] = copy.deepcopy(entry)
    elif action == 2:
        entry["dtype"] = choose.choice(
            ("F32", "F16", "BF16", "I64", "F8_E4M3", "Q8_0", "", 5, None)
        )
    elif action == 3:
        entry.pop(choose.choice(("dtype", "shape", "data_offsets")), None)
    elif action in (4, 5):
        key = "shape" if action == 4 else "data_offsets"
        found = entry.get(key)
        numbers = entry[key] = list(found) if isinstance(found, list) and found else [1]
        place = choose.randrange(len(numbers))
        near = int(numbers[place] or 0) + choose.choice((-32, -1, 1, 32))
        numbers[place] = choose.choice((near, -1, 0, 1.0, True, None, *EDGES))
    elif action == 6:
        entry["shape"] = choose.choice(([], [0], "x", None, list(entry.get("shape") or [])[::-1]))
    else:
        mutate_data(image, choose)


def test_mutated_safetensors(tmp_path: Path) -> None:
    choose = random.Random(20250709)
    seed = tiny_safetensors()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    loaded = 0
    for number in range(MUTATIONS):
        image = copy.deepcopy(seed)
        for _ in range(choose.randint(1, 2)):
            mutate_header(image, choose)
        content = image.to_bytes()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        agree_with_reference(path, content)
        loaded += outcome(path)
        path.unlink()
    assert MUTATIONS // 100 < loaded < MUTATIONS // 2


def test_single_bytes_of_a_safetensors_header(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    content = tiny_safetensors().to_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for number, changed in enumerate(header_bytes(content, 8 + length)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(changed)
        agree_with_reference(path, changed)
        outcome(path)
        path.unlink()


def agree_with_reference(path: Path, content: bytes) -> None:
    """What our reader takes, the reference reader takes, and sees the same tensors in it."""
    try:
        ours = SafetensorsFile.open(path)
    except ModelFormatError:
        return
    theirs = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    assert ours.tensors.keys() == theirs.keys()
    for name, tensor in ours.tensors.items():
        assert list(tensor.shape) == theirs[name]["shape"]
        assert tensor.type.value == theirs[name]["dtype"]
        assert tensor.data.tobytes() == bytes(theirs[name]["data"])
    ours.close()


@pytest.mark.parametrize("which", ["gguf", "safetensors"])
def test_a_file_cut_anywhere_in_its_data_is_refused(which: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    content = (tiny_gguf() if which == "gguf" else tiny_safetensors()).to_bytes()
    path = tmp_path / f"cut.{which}"
    for missing in (1, 31, 32, 33, 4096, 8000):
        path.write_bytes(content[:-missing])
        assert not outcome(path)
