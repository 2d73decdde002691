"""The GGUF reader against what the gguf package writes."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolrun.errors import ModelFormatError, ModelNotFoundError
from smolrun.files.gguf import GgufFile
from smolrun.files.tokenizer_data import gguf_tokenizer
from smolrun.quant.types import WeightType

from .images import gguf_image, tiny_gguf, tiny_metadata, tiny_tensors

INTEGERS = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "uint16": (0, 65_535),
    "int16": (-32_768, 32_767),
    "uint32": (0, (1 << 32) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "uint64": (0, (1 << 64) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
}
# Names of the gguf package: (ours, values)
SCALARS: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    **{
        name: (name.replace("uint", "u").replace("int", "i"), st.integers(*limits))
        for name, limits in INTEGERS.items()
    },
    "float32": ("f32", st.floats(width=32, allow_nan=False)),
    "float64": ("f64", st.floats(allow_nan=False)),
    "bool": ("bool", st.booleans()),
    "string": ("string", st.text(min_size=1, max_size=40)),
}
KEYS = st.text("abcdefghij._", min_size=1, max_size=12)
ENTRIES = st.one_of(
    [st.tuples(st.just(name), values) for name, (_, values) in SCALARS.items()]
    + [
        st.just("array").flatmap(
            lambda _: st.tuples(st.just("strings"), st.lists(st.text(), min_size=1))
        )
    ]
    + [st.tuples(st.just("integers"), st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1))]
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(entries=st.dictionaries(KEYS, ENTRIES, max_size=12))
def test_metadata_of_every_type(entries: dict[str, tuple[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "metadata.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, (name, value) in entries.items():
        if name in ("strings", "integers"):
            writer.add_array(key, value)
        else:
            getattr(writer, f"add_{name}")(key, value)
    write(writer)
    file = GgufFile.open(path)
    assert file.metadata.pop("general.architecture") == "llama"
    assert file.metadata == {key: value for key, (_, value) in entries.items()}
    arrays = {"strings": "string[]", "integers": "i32[]"}
    for key, (name, _) in entries.items():
        assert file.types[key] == (arrays.get(name) or SCALARS[name][0])
    file.close()


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [8, 32, 64, 65_536])
def test_tensors_of_every_type(alignment: int, tmp_path: Path) -> None:
    """Shapes, types and bytes; the quantized ones from gguf's own quantizers where it has them."""
    random = np.random.default_rng(1)
    path = tmp_path / "tensors.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    written: dict[str, tuple[WeightType, tuple[int, ...], bytes]] = {}
    for weight_type in WeightType:
        shape: tuple[int, ...] = (3, 512)
        kind = gguf.GGMLQuantizationType(weight_type.ggml_id)
        values = random.normal(size=shape).astype(np.float32)
        try:
            data = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            rows = (shape[0], weight_type.row_bytes(shape[1]))
            data = random.integers(0, 256, rows, np.uint8)
        writer.add_tensor(f"{weight_type.value}.weight", data, raw_dtype=kind)
        written[f"{weight_type.value}.weight"] = (weight_type, shape, data.tobytes())
    vector = random.normal(size=7).astype(np.float32)
    writer.add_tensor("vector.weight", vector)
    written["vector.weight"] = (WeightType.F32, (7,), vector.tobytes())
    write(writer)

    file = GgufFile.open(path)
    assert list(file.tensors) == list(written)
    for name, (weight_type, shape, content) in written.items():
        tensor = file.tensors[name]
        assert (tensor.type, tensor.shape) == (weight_type, shape)
        assert tensor.data.tobytes() == content
        assert not tensor.data.flags.writeable


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    for version in (2, 3):
        path = tmp_path / f"{version}.gguf"
        path.write_bytes(gguf_image(tiny_metadata(), tiny_tensors(), version=version).to_bytes())
    two, three = (GgufFile.open(tmp_path / f"{version}.gguf") for version in (2, 3))
    assert (two.version, three.version) == (2, 3)
    assert two.metadata == three.metadata
    assert two.tensors.keys() == three.tensors.keys()


def test_the_last_tensor_may_end_the_file_without_padding(tmp_path: Path) -> None:
    image = gguf_image({}, {"a": ("F32", (3,), bytes(12))})
    image.data = image.data[:12]
    path = tmp_path / "exact.gguf"
    path.write_bytes(image.to_bytes())
    assert GgufFile.open(path).tensors["a"].shape == (3,)
    path.write_bytes(image.to_bytes()[:-1])
    with pytest.raises(ModelFormatError, match="the file ends at"):
        GgufFile.open(path)


def test_strings_with_nul_and_long_strings_in_arrays(tmp_path: Path) -> None:
    """The fast way of decoding splits at NUL; strings that hold one take the slow way."""
    for strings in (["a\0b", "", "c"], ["Ġ" * 200, "x" * 300, ""], ["é", "\0", "日本"]):
        path = tmp_path / "strings.gguf"
        path.write_bytes(gguf_image({"k": ("[string]", strings)}, {}).to_bytes())
        assert GgufFile.open(path).metadata["k"] == strings


def test_vocabulary_of_real_size(shared_data: Path) -> None:
    """128,256 tokens and 280,147 merges, equal to what gguf's own reader sees."""
    path = shared_data / "vocab-tests/ggml-vocab-llama-bpe.gguf"
    data = gguf_tokenizer(GgufFile.open(path))
    assert data is not None
    reader = gguf.GGUFReader(path)
    for values, name in ((data.tokens, "tokens"), (data.merges, "merges")):
        field = reader.fields[f"tokenizer.ggml.{name}"]
        assert len(values) == len(field.data)
        for index in (0, 1, 1000, 128_000, len(values) - 1):
            assert values[index] == bytes(field.parts[field.data[index]]).decode()
    assert (data.bos_token_id, data.eos_token_id) == (128_000, 128_001)
    assert data.pre_tokenizer == "llama-bpe"
    assert not data.add_bos_token  # the file is silent


@pytest.mark.parametrize("pre_tokenizer", ["smollm", "smaug-bpe", "llama-bpe"])
@pytest.mark.parametrize("stored", [None, False, True])
def test_bos_is_added_only_where_the_file_says_so(
    tmp_path: Path, pre_tokenizer: str, stored: bool | None
) -> None:
    key = "tokenizer.ggml.add_bos_token"
    metadata = {
        **tiny_metadata(),
        "tokenizer.ggml.pre": ("string", pre_tokenizer),
        key: ("bool", stored),
    }
    if stored is None:
        del metadata[key]
    path = tmp_path / "bos.gguf"
    path.write_bytes(gguf_image(metadata, {}).to_bytes())
    data = gguf_tokenizer(GgufFile.open(path))
    assert data is not None
    assert data.add_bos_token is bool(stored)


def test_a_file_without_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    path.write_bytes(gguf_image({}, {}).to_bytes())
    assert gguf_tokenizer(GgufFile.open(path)) is None


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent.gguf"):
        GgufFile.open(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError, match="file name"):
        GgufFile.open("a\0b.gguf")
    with pytest.raises((ModelFormatError, ModelNotFoundError), match=tmp_path.name):
        GgufFile.open(tmp_path)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="regular file"):
        GgufFile.open(tmp_path / "pipe.gguf")


def test_offsets_count_from_the_padded_end_of_the_header(tmp_path: Path) -> None:
    for extra in range(33):
        image = tiny_gguf().set("general.name:value", b"x" * extra)
        path = tmp_path / f"{extra}.gguf"
        path.write_bytes(image.to_bytes())
        tensor = GgufFile.open(path).tensors["output_norm.weight"]
        expected = tiny_tensors()["output_norm.weight"][2]
        assert tensor.data.tobytes() == expected
        assert struct.unpack("<f", expected[:4])
