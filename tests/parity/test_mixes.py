"""Every weight has the type that llama.cpp's quantizer gives it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun.files.convert import convert_files
from smolrun.files.gguf import GgufFile
from smolrun.files.quantize import quantize_files
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights
from smolrun.quant.mixes import MIXES
from tests.models import save_folder, small_config

pytestmark = pytest.mark.parity


def llama_cpp_quantize(
    source: Path, target: Path, file_type: int, importance: Mapping[str, Any] | None = None
) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.allow_requantize = True
    parameters.nthread = 2
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance or {}) + 1))()  # ends with null
    for entry, (name, values) in zip(entries, (importance or {}).items(), strict=False):
        data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.name, entry.data, entry.size = name.encode(), data, values.size
    if importance:
        parameters.imatrix = entries
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    assert status == 0


def types_of(path: Path) -> dict[str, str]:
    file = GgufFile.open(path)
    try:
        return {name: tensor.type.value for name, tensor in file.tensors.items()}
    finally:
        file.close()


def shape(layers: int, hidden: int, ffn: int, group: int, tied: bool) -> ModelConfig:
    """Of rows like those of a real model, as far as blocks see them."""
    return small_config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12 // group,
        head_dim=32,
        tie_word_embeddings=tied,
        vocab_size=64,
    )


# Rows like those of: 135M and 360M; 1.7B; SmolLM3-3B; and untied.
SHAPES = [
    (layers, *rest)
    for rest in ((96, 256, 3, True), (256, 512, 1, True), (256, 256, 4, True), (256, 96, 3, False))
    for layers in (1, 7, 30, 36)
]


@pytest.mark.parametrize("values", SHAPES, ids=str)
def test_types(values: tuple[int, int, int, int, bool], tmp_path: Path) -> None:
    config = shape(*values)
    folder = save_folder(config, random_weights(config, 1), tmp_path / "model")
    source = tmp_path / "model.gguf"
    convert_files(folder, source)
    for mix in MIXES.values():
        theirs = tmp_path / "theirs.gguf"
        llama_cpp_quantize(source, theirs, mix.file_type)
        ours = quantize_files(source, tmp_path / "ours.gguf", mix, overwrite=True).path
        assert types_of(ours) == types_of(theirs), mix.name


@pytest.mark.parametrize("layers", [8, 30])
def test_types_with_importance(layers: int, tmp_path: Path) -> None:
    from smolrun.files.imatrix import ImportanceMatrix

    config = shape(layers, 256, 512, 4, True)
    folder = save_folder(config, random_weights(config, 1), tmp_path / "model")
    source = tmp_path / "model.gguf"
    convert_files(folder, source)
    file = GgufFile.open(source)
    sums = {
        name: np.ones(tensor.columns, np.float32)
        for name, tensor in file.tensors.items()
        if len(tensor.shape) == 2
    }
    matrix = ImportanceMatrix(sums, dict.fromkeys(sums, 1))
    for mix in MIXES.values():
        theirs = tmp_path / "theirs.gguf"
        llama_cpp_quantize(source, theirs, mix.file_type, sums)
        target = tmp_path / "ours.gguf"
        quantize_files(source, target, mix, importance=matrix, overwrite=True)
        assert types_of(target) == types_of(theirs), mix.name
