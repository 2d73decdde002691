"""What converting refuses, what it leaves where it fails, and what it replaces."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from smolrun import RequestError, convert
from smolrun.errors import ModelFormatError, OutputError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.convert import convert_files
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.files.test_convert import quantized, tensor_bytes
from tests.models import save_folder, small_config

CONFIG = small_config()
POISONED = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(CONFIG, random_weights(CONFIG, 1), tmp_path / "folder")


@pytest.fixture(params=["new.gguf", "new"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "out"
    place.mkdir()
    return place / str(request.param)


def poisoned(tmp_path: Path, dtype: WeightType, value: float) -> Path:
    tensors = random_weights(CONFIG, 1, WeightType.F32)
    tensors[POISONED].data.view("<f4")[77] = value
    if dtype is WeightType.BF16:
        tensors[POISONED].data.view("<u4")[:] &= 0xFFFF0000
    return save_folder(CONFIG, tensors, tmp_path / "poisoned")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight_type", [None, WeightType.BF16])
def test_weights_that_are_not_finite(
    tmp_path: Path, target: Path, value: float, weight_type: WeightType | None
) -> None:
    source = poisoned(tmp_path, WeightType.F32, value)
    with pytest.raises(ModelFormatError, match=f"{POISONED}: 1 of .* not finite"):
        convert_files(source, target, weight_type)
    assert os.listdir(target.parent) == []


def test_a_scale_that_is_not_finite(tmp_path: Path, target: Path) -> None:
    path = quantized(tmp_path, "Q8_0", poison=True)
    with pytest.raises(ModelFormatError, match=r"blk\.\d\.ffn_up\.weight: 32 of .* not finite"):
        convert_files(path, target)
    assert os.listdir(target.parent) == []


def test_a_weight_too_large_for_the_type(tmp_path: Path, target: Path) -> None:
    source = poisoned(tmp_path, WeightType.F32, 1e5)
    with pytest.raises(ModelFormatError, match=f"{POISONED}: the weight 100000 is too large for F"):
        convert_files(source, target, WeightType.F16)
    assert os.listdir(target.parent) == []


def test_a_target_that_is_there_is_replaced_only_if_asked(folder: Path, target: Path) -> None:
    convert_files(folder, target)
    before = open_checkpoint(target).file_bytes
    with pytest.raises(OutputError, match="is there already; --force"):
        convert_files(folder, target, WeightType.BF16)
    assert open_checkpoint(target).file_bytes == before
    convert_files(folder, target, WeightType.BF16, overwrite=True)
    assert open_checkpoint(target).file_bytes < before
    assert os.listdir(target.parent) == [target.name]


def test_an_empty_folder_needs_no_force(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert_files(folder, tmp_path / "empty")
    assert open_checkpoint(tmp_path / "empty").config == CONFIG


def test_a_model_may_replace_itself(folder: Path) -> None:
    before = tensor_bytes(open_checkpoint(folder).tensors)
    convert_files(folder, folder, overwrite=True)
    assert tensor_bytes(open_checkpoint(folder).tensors) == before


def test_force_keeps_what_is_no_part_of_a_model(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_files(folder, target, max_shard_bytes=40_000)
    assert (target / "model.safetensors.index.json").exists()
    (target / "README.md").write_text("mine")
    (target / "notes").mkdir()
    (target / "chat_template.json").write_text("{}")
    convert_files(folder, target, overwrite=True)
    assert sorted(os.listdir(target)) == ["README.md", "config.json", "model.safetensors", "notes"]
    assert (target / "README.md").read_text() == "mine"
    open_checkpoint(target)


@pytest.mark.parametrize("max_shard_bytes", [1, 30_000, 100_000, 1 << 30])
def test_shards(folder: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    from safetensors import safe_open

    target = tmp_path / "target"
    convert_files(folder, target, max_shard_bytes=max_shard_bytes)
    original = open_checkpoint(folder)
    found = open_checkpoint(target)
    assert tensor_bytes(found.tensors) == tensor_bytes(original.tensors)
    files = sorted(target.glob("*.safetensors"))
    if len(files) > 1:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == original.tensors.keys()
        total = sum(tensor.data.nbytes for tensor in original.tensors.values())
        assert index["metadata"]["total_size"] == total
        assert [f.name for f in files] == [
            f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
        ]
    else:
        assert max_shard_bytes == 1 << 30
    for file in files:
        with safe_open(file, framework="numpy") as opened:
            names = opened.keys()
            size = sum(original.tensors[name].data.nbytes for name in names)
            assert size <= max_shard_bytes or len(names) == 1
            for name in names:
                assert opened.get_tensor(name).tobytes() == original.tensors[name].data.tobytes()


def test_an_interrupted_conversion_leaves_nothing(folder: Path, target: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_files(folder, target, progress=stop)
    assert os.listdir(target.parent) == []
    convert_files(folder, target)
    before = open_checkpoint(target).file_bytes
    with pytest.raises(KeyboardInterrupt):
        convert_files(folder, target, WeightType.F16, overwrite=True, progress=stop)
    assert open_checkpoint(target).file_bytes == before
    assert os.listdir(target.parent) == [target.name]


def test_progress_counts_every_byte(folder: Path, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert_files(folder, target, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.data.nbytes for t in open_checkpoint(folder).tensors.values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_full_disk(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(OutputError, match=r"needs .* MB, its disk has 0\.1 MB left"):
        convert_files(folder, target)
    assert os.listdir(target.parent) == []


def test_places_that_can_not_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, message in [
        ("nowhere/new.gguf", "make the folder first"),
        ("nowhere/new", "make the folder first"),
        ("file/new", "folder"),
        ("file", "is no folder"),
    ]:
        with pytest.raises(OutputError, match=message):
            convert_files(folder, tmp_path / name, overwrite=True)


def test_arguments(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    converted = convert(folder, path, dtype="bf16")
    assert (converted.path, converted.dtype) == (path, WeightType.BF16)
    assert converted.nbytes == path.stat().st_size
    with pytest.raises(RequestError, match="dtype"):
        convert(folder, path, dtype="q8_0")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="target"):
        convert(folder, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected F32"):
        convert_files(folder, path, WeightType.Q8_0)
