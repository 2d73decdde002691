"""Converted models are the same models: weights bit for bit, configuration, and text."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import ModelFormatError
from smolrun.files import convert as convert_module
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.convert import convert_files
from smolrun.files.dtypes import converted
from smolrun.files.gguf import GgufFile
from smolrun.files.gguf_names import gguf_name, interleaved_rows
from smolrun.files.gguf_writer import GgufWriter, TensorInfo, metadata_of
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights
from smolrun.model.rope import RopeScaling
from smolrun.quant.blocks import source_rows, tensor_values
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType
from tests.models import configs, save_folder, small_config

FLOATS = [WeightType.F32, WeightType.F16, WeightType.BF16]


def field_values(path: Path) -> dict[str, Any]:
    """Every key with its types and value, as the gguf package dumps them."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: (field.types, field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


def tensor_bytes(tensors: dict[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (t.type, t.shape, t.data.tobytes()) for name, t in tensors.items()}


def without_tokens(config: ModelConfig) -> ModelConfig:
    """A configuration without the ids that GGUF takes from the tokenizer's files."""
    return replace(config, bos_token_id=None, eos_token_ids=(), pad_token_id=None)


# -- against files of llama.cpp's converter ----------------------------------------------------


@pytest.fixture
def tiny_smollm3(shared_data: Path) -> Path:
    """A trained SmolLM3, and beside it the GGUF that llama.cpp's converter made of it."""
    return shared_data / "tiny-smollm3"


def test_our_gguf_is_that_of_llama_cpp(tiny_smollm3: Path, tmp_path: Path) -> None:
    ours = tmp_path / "tiny-smollm3.gguf"
    assert convert_files(tiny_smollm3, ours).nbytes == ours.stat().st_size
    theirs = tiny_smollm3 / "tiny-smollm3-bf16.gguf"
    assert field_values(ours) == field_values(theirs)
    assert tensor_bytes(GgufFile.open(ours).tensors) == tensor_bytes(GgufFile.open(theirs).tensors)


def test_our_folder_is_the_one_that_was_converted(tiny_smollm3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "back"
    convert_files(tiny_smollm3 / "tiny-smollm3-bf16.gguf", folder)
    ours, original = open_checkpoint(folder), open_checkpoint(tiny_smollm3)
    names = ("model.safetensors", "chat_template.jinja")
    for name in names:
        assert (folder / name).read_bytes() == (tiny_smollm3 / name).read_bytes()
    assert ours.config == original.config
    assert ours.chat_template == original.chat_template
    again = tmp_path / "again.gguf"
    convert_files(folder, again)
    assert field_values(again) == field_values(tiny_smollm3 / "tiny-smollm3-bf16.gguf")


def test_the_real_model_goes_to_a_folder_and_back(real_model: Path, tmp_path: Path) -> None:
    folder, gguf_path = tmp_path / "SmolLM2-135M-Instruct", tmp_path / "m.gguf"
    convert_files(real_model, folder, WeightType.BF16)
    convert_files(folder, gguf_path)
    ours, original = field_values(gguf_path), field_values(real_model)
    file_type = ours.pop("general.file_type")
    assert file_type[1] == 32
    assert original.pop("general.file_type")[1] == 3
    # Since the file was made, transformers fills this in for every Llama.
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        assert ours.pop(key) == ([gguf.GGUFValueType.UINT32], 64)
    assert ours == original


# -- any model there and back -------------------------------------------------------------------


@settings(max_examples=40)
@given(config=configs(), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_a_folder_survives_gguf(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, dtype: WeightType, seed: int
) -> None:
    place = tmp_path_factory.mktemp("trip")
    tensors = random_weights(config, seed, dtype)
    save_folder(config, tensors, place / "one")
    convert_files(place / "one", place / "two.gguf")
    convert_files(place / "two.gguf", place / "three")
    convert_files(place / "three", place / "four.gguf")
    three = open_checkpoint(place / "three")
    assert tensor_bytes(three.tensors) == tensor_bytes(tensors)
    assert without_tokens(three.config) == without_tokens(config)
    two, four = GgufFile.open(place / "two.gguf"), GgufFile.open(place / "four.gguf")
    assert tensor_bytes(four.tensors) == tensor_bytes(two.tensors)
    assert {**metadata_of(four), "general.name": 0} == {**metadata_of(two), "general.name": 0}


def test_rows_of_q_and_k_stand_interleaved(tmp_path: Path) -> None:
    config = small_config(attention_bias=True)
    tensors = random_weights(config, 1)
    save_folder(config, tensors, tmp_path / "folder")
    convert_files(tmp_path / "folder", tmp_path / "m.gguf")
    file = GgufFile.open(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        expected = tensor_values(tensor)
        if "q_proj" in name or "k_proj" in name:
            # Stored row 2i+j of a head holds row j*(head_dim/2)+i.
            heads = expected.reshape(-1, 2, config.head_dim // 2, *expected.shape[1:])
            expected = heads.swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_array_equal(tensor_values(file.tensors[gguf_name(name)]), expected)
    order = interleaved_rows(256, 64)
    assert (order[source_rows(256, 64)] == np.arange(256)).all()


@pytest.mark.parametrize("source_type", FLOATS)
@pytest.mark.parametrize("target_type", FLOATS)
def test_types_are_rounded_to_nearest_and_norms_kept(
    tmp_path: Path,
    source_type: WeightType,
    target_type: WeightType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convert_module, "_CHUNK", 200)  # rows are 64 and 96 wide
    tensors = random_weights(small_config(), 2, source_type)
    save_folder(small_config(), tensors, tmp_path / "folder")
    convert_files(tmp_path / "folder", tmp_path / "m.gguf", target_type)
    convert_files(tmp_path / "folder", tmp_path / "other", target_type)
    in_gguf = open_checkpoint(tmp_path / "m.gguf")
    in_folder = open_checkpoint(tmp_path / "other")
    for name, tensor in tensors.items():
        expected = converted(tensor, target_type) if len(tensor.shape) > 1 else tensor
        for found in (in_gguf.tensors[name], in_folder.tensors[name]):
            np.testing.assert_array_equal(tensor_values(found), tensor_values(expected))
        if len(tensor.shape) == 1:
            assert in_gguf.tensors[name].type is WeightType.F32
        else:
            assert in_gguf.tensors[name].type is in_folder.tensors[name].type is target_type
    assert in_gguf.metadata["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[target_type]
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert in_folder.metadata["dtype"] == names[target_type]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("target_type", [None, WeightType.F16])
def test_quantized_weights_are_dequantized(
    tmp_path: Path, kind: str, target_type: WeightType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "_CHUNK", 1000)
    path = quantized(tmp_path, kind)
    convert_files(path, tmp_path / "folder", target_type)
    convert_files(path, tmp_path / "float.gguf", target_type)
    folder, again = open_checkpoint(tmp_path / "folder"), open_checkpoint(tmp_path / "float.gguf")
    config = folder.config
    for stored in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(stored.data, stored.tensor_type)
        if "attn_q" in stored.name or "attn_k" in stored.name:
            heads = values.reshape(-1, config.head_dim // 2, 2, values.shape[-1])
            values = heads.swapaxes(1, 2).reshape(values.shape)
        if target_type is not None and values.ndim > 1:
            values = values.astype(np.float16).astype(np.float32)
        name = next(name for name in folder.tensors if gguf_name(name) == stored.name)
        np.testing.assert_array_equal(tensor_values(folder.tensors[name]), values)
        np.testing.assert_array_equal(tensor_values(again.tensors[name]), values)
    assert folder.tensors["model.embed_tokens.weight"].type is (target_type or WeightType.F32)


def quantized(folder: Path, kind: str, poison: bool = False) -> Path:
    """A GGUF file whose matrices the gguf package quantized."""
    config = small_config()
    save_folder(config, random_weights(config, 4), folder / "float")
    convert_files(folder / "float", folder / "float-source.gguf")
    source = GgufFile.open(folder / "float-source.gguf")
    infos, data = [], []
    for tensor in source.tensors.values():
        info = TensorInfo(tensor.name, tensor.type, tensor.shape)
        content = tensor.data.copy()
        if len(tensor.shape) > 1:
            info = replace(info, type=WeightType(kind))
            values = tensor.data.view("<f4").reshape(tensor.shape)
            content = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
        if poison and "ffn_up" in tensor.name:
            content.reshape(-1)[-WeightType(kind).block_bytes :][:2] = (0, 0x7C)  # inf
        infos.append(info)
        data.append(content)
    path = folder / f"{kind}.gguf"
    with GgufWriter(path, metadata_of(source), infos) as writer:
        for content in data:
            writer.write(content)
    return path


# -- what GGUF can not say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"no_rope_layers": (0, 1, 1, 1)}, "smolrun.no_rope_layers", [0, 1, 1, 1]),
        ({"no_rope_layers": (1, 1, 1, 1)}, "smolrun.no_rope_layers", [1, 1, 1, 1]),
        (
            {"rope_scaling": RopeScaling("yarn", 2.0, 64, truncate=False)},
            "smolrun.rope_scaling.truncate",
            False,
        ),
    ],
)
def test_own_keys_are_read_back_and_warned_of(
    tmp_path: Path,
    changes: dict[str, Any],
    key: str,
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config(**changes)
    save_folder(config, random_weights(config, 1), tmp_path / "folder")
    with caplog.at_level(logging.WARNING, logger="smolrun"):
        convert_files(tmp_path / "folder", tmp_path / "m.gguf")
    assert f"{key}, which other programs ignore" in caplog.text
    file = open_checkpoint(tmp_path / "m.gguf")
    assert file.metadata[key] == value
    assert without_tokens(file.config) == without_tokens(config)


def test_the_usual_pattern_needs_no_key_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_folder(small_config(), random_weights(small_config(), 1), tmp_path / "folder")
    convert_files(tmp_path / "folder", tmp_path / "m.gguf")
    metadata = GgufFile.open(tmp_path / "m.gguf").metadata
    # The end of sequence has its usual key in the tokenizer's metadata, which there is none of.
    assert [key for key in metadata if "smolrun" in key] == ["smolrun.eos_token_ids"]
    assert caplog.text == ""


def test_several_ends_of_sequence_are_kept(tmp_path: Path) -> None:
    config = small_config(eos_token_ids=(2, 7))
    save_folder(config, random_weights(config, 1), tmp_path / "folder")
    convert_files(tmp_path / "folder", tmp_path / "m.gguf")
    convert_files(tmp_path / "m.gguf", tmp_path / "back")
    assert set(open_checkpoint(tmp_path / "m.gguf").config.eos_token_ids) == {2, 7}
    assert set(open_checkpoint(tmp_path / "back").config.eos_token_ids) == {2, 7}


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    config = small_config()
    folder = save_folder(config, random_weights(config, 1), tmp_path / "folder")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a\ud800b"}))
    with pytest.raises(ModelFormatError, match=r"surrogate pair in what would be tokenizer\.chat"):
        convert_files(folder, tmp_path / "m.gguf")


def test_sampling_settings_that_their_types_can_not_hold_are_left_out(tmp_path: Path) -> None:
    config = small_config()
    folder = save_folder(config, random_weights(config, 1), tmp_path / "folder")
    odd = {"top_k": 1 << 31, "mirostat": True, "mirostat_tau": 1e300, "penalty_last_n": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    convert_files(folder, tmp_path / "m.gguf")
    assert not [key for key in field_values(tmp_path / "m.gguf") if "sampling" in key]


def test_sampling_settings_are_kept(tmp_path: Path) -> None:
    config = small_config()
    folder = save_folder(config, random_weights(config, 1), tmp_path / "folder")
    wanted = {"temperature": 0.5, "top_k": 40, "top_p": 0.75, "repetition_penalty": 1.25}
    (folder / "generation_config.json").write_text(json.dumps({**wanted, "do_sample": True}))
    convert_files(folder, tmp_path / "m.gguf")
    fields = field_values(tmp_path / "m.gguf")
    assert fields["general.sampling.temp"] == ([gguf.GGUFValueType.FLOAT32], 0.5)
    assert fields["general.sampling.top_k"] == ([gguf.GGUFValueType.INT32], 40)
    convert_files(tmp_path / "m.gguf", tmp_path / "back")

    def used(checkpoint: Checkpoint) -> dict[str, object]:
        return {key: checkpoint.generation.get(key) for key in wanted}

    assert used(open_checkpoint(tmp_path / "m.gguf")) == wanted
    assert used(open_checkpoint(tmp_path / "back")) == wanted
