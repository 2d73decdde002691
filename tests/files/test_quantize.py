"""Quantized files: the right bytes under the right names, or nothing at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolrun import RequestError, UnsupportedError, quantize
from smolrun.errors import ModelFormatError, OutputError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.convert import convert_files
from smolrun.files.gguf import GgufFile
from smolrun.files.imatrix import ImportanceMatrix, write_imatrix
from smolrun.files.quantize import Quantized
from smolrun.model.config import ModelConfig
from smolrun.model.random import random_weights
from smolrun.quant import native
from smolrun.quant.types import WeightType
from tests.models import save_folder, small_config

# Rows of 256 and of 96: K types fit some weights and not others.
CONFIG = small_config(hidden_size=96, intermediate_size=256, head_dim=24, vocab_size=96)
POISONED = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(CONFIG, random_weights(CONFIG, 1, WeightType.BF16), tmp_path / "folder")


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "source.gguf"
    convert_files(folder, path)
    return path


def tensor_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    file = GgufFile.open(path)
    return {name: (t.type.value, t.data.tobytes()) for name, t in file.tensors.items()}


def test_every_tensor_is_its_rows_quantized(source: Path, tmp_path: Path) -> None:
    made = quantize(source, tmp_path / "out.gguf", "q4_k_m")
    old, new = GgufFile.open(source), GgufFile.open(made.path)
    assert list(old.tensors) == list(new.tensors)
    kinds = set()
    for name, tensor in new.tensors.items():
        before = old.tensors[name]
        expected = native.quantize(before.data, before.type, before.columns, tensor.type)
        np.testing.assert_array_equal(tensor.data, expected.reshape(-1))
        kinds.add(tensor.type.value)
    assert kinds == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert made.nbytes == made.path.stat().st_size
    assert open_checkpoint(made.path).config == open_checkpoint(source).config


def test_metadata_says_what_was_done(source: Path, tmp_path: Path) -> None:
    made = quantize(source, tmp_path / "out.gguf", "q4_k_m")
    metadata, before = GgufFile.open(made.path).metadata, GgufFile.open(source).metadata
    assert metadata["general.file_type"] == 15
    assert metadata["general.quantization_version"] == 2
    assert metadata["smolrun.quantize.type"] == "Q4_K_M"
    assert metadata["smolrun.quantize.bits_per_weight"] == pytest.approx(made.bits_per_weight)
    assert metadata["smolrun.quantize.substitutions"] == [
        f"{s.name}: {s.wanted.value} -> {s.type.value}" for s in made.substitutions
    ]
    changed = ("general.file_type", "general.quantization_version")
    assert {k: v for k, v in before.items() if k not in changed}.items() <= metadata.items()
    again = quantize(made.path, tmp_path / "again.gguf", "q8_0")
    metadata = GgufFile.open(again.path).metadata
    assert metadata["smolrun.quantize.type"] == "Q8_0"
    assert metadata["smolrun.quantize.substitutions"] == []


def test_report(source: Path, tmp_path: Path) -> None:
    made = quantize(source, tmp_path / "out.gguf", "q4_k_m")
    found = {s.name: (s.columns, s.wanted.value, s.type.value) for s in made.substitutions}
    assert found["token_embd.weight"] == (96, "Q6_K", "Q8_0")
    assert found["blk.1.attn_q.weight"] == (96, "Q4_K", "Q5_0")
    assert "blk.1.ffn_down.weight" not in found
    file = GgufFile.open(made.path)
    tensors = file.tensors.values()
    weights = sum(t.rows * t.columns for t in tensors)
    assert made.weights == weights == sum(made.types.values())
    assert made.bits_per_weight == pytest.approx(8 * sum(t.data.nbytes for t in tensors) / weights)
    assert made.requantized == 0


def test_from_a_folder_as_from_gguf(folder: Path, source: Path, tmp_path: Path) -> None:
    one = quantize(source, tmp_path / "one.gguf", "q5_k_m", threads=1)
    other = quantize(folder, tmp_path / "other.gguf", "q5_k_m", threads=3)
    assert tensor_bytes(one.path) == tensor_bytes(other.path)


def test_chunks_do_not_show(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quantize(source, tmp_path / "one.gguf", "q3_k_m", threads=1)
    monkeypatch.setattr("smolrun.files.quantize._CHUNK", 700)
    progress: list[tuple[int, int]] = []
    other = quantize(
        source, tmp_path / "other.gguf", "q3_k_m", threads=4,
        progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert one.path.read_bytes() == other.path.read_bytes()
    assert len(progress) > 50
    assert progress == sorted(progress)
    assert progress[-1][0] == progress[-1][1]


def test_biases_move_with_their_rows(tmp_path: Path) -> None:
    config = replace(CONFIG, attention_bias=True)
    folder = save_folder(config, random_weights(config, 3), tmp_path / "folder")
    convert_files(folder, tmp_path / "source.gguf")
    made = quantize(folder, tmp_path / "out.gguf", "q8_0")
    before, after = GgufFile.open(tmp_path / "source.gguf"), GgufFile.open(made.path)
    for name in ("blk.0.attn_q.bias", "blk.1.attn_k.bias"):
        np.testing.assert_array_equal(before.tensors[name].data, after.tensors[name].data)


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    said = quantize(source, target, "q4_k_m", dry_run=True)
    assert not target.exists()
    assert quantize(source, target, "q4_k_m") == said
    assert quantize(source, target, "q4_k_m", dry_run=True) == said  # it is there already


def test_strict(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"token_embd.weight for one: rows of 96 .* Q6_K"):
        quantize(source, tmp_path / "out.gguf", "q4_k_m", strict=True)
    assert not (tmp_path / "out.gguf").exists()
    assert quantize(source, tmp_path / "out.gguf", "q8_0", strict=True).substitutions == ()


def test_types_of_single_weights(source: Path, tmp_path: Path) -> None:
    types = {r"blk\.[01]\.attn": "q8_0", "attn_v": "f16", "ffn_down": "q2_k"}
    made = quantize(source, tmp_path / "out.gguf", "q4_0", tensor_types=types)
    found = {name: kind for name, (kind, _) in tensor_bytes(made.path).items()}
    assert found["blk.1.attn_v.weight"] == "Q8_0"
    assert found["blk.2.attn_v.weight"] == "F16"
    assert found["blk.3.ffn_down.weight"] == "Q2_K"
    assert found["blk.3.attn_q.weight"] == "Q4_0"
    assert found["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"type": "q9"}, "there is no type 'q9'"),
        ({"type": "q4_0", "tensor_types": {"a": "q9"}}, "no weight type 'q9'"),
        ({"type": "q4_0", "tensor_types": {"(": "q8_0"}}, "tensor_types: '\\('"),
        # Vectors stay as they are, so that this would change nothing.
        ({"type": "q4_0", "tensor_types": {"attn_norm": "q8_0"}}, "'attn_norm' is found in no"),
        ({"type": "q4_0", "threads": 0}, "threads"),
    ],
)
def test_wrong_arguments(
    source: Path, tmp_path: Path, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        quantize(source, tmp_path / "out.gguf", **arguments)  # type: ignore[arg-type]


def test_what_is_there_stays(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("old")
    with pytest.raises(OutputError, match="is there already; --force replaces it"):
        quantize(source, target, "q8_0")
    assert target.read_text() == "old"
    quantize(source, target, "q8_0", overwrite=True)
    assert GgufFile.open(target).metadata["general.file_type"] == 7


def test_source_replaced_by_itself(source: Path) -> None:
    quantize(source, source, "q8_0", overwrite=True)
    assert GgufFile.open(source).metadata["general.file_type"] == 7


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("dtype", [WeightType.F32, WeightType.BF16])
def test_a_weight_that_is_not_finite(
    tmp_path: Path, value: float, shown: str, dtype: WeightType
) -> None:
    weights = random_weights(CONFIG, 1, dtype)
    view = weights[POISONED].data.view("<f4" if dtype is WeightType.F32 else "<u2")
    bits = np.array([value], "<f4").view("<u4")[0] >> 16
    view[96 * 5 + 7] = value if dtype is WeightType.F32 else bits
    folder = save_folder(CONFIG, weights, tmp_path / "folder")
    target = tmp_path / "out.gguf"
    target.write_text("old")
    words = rf"model.layers.2.mlp.up_proj.weight: .*row 5, column 7: {shown}"
    with pytest.raises(ModelFormatError, match=words):
        quantize(folder, target, "q4_k_m", overwrite=True)
    assert [p.name for p in tmp_path.iterdir() if p.name != "folder"] == ["out.gguf"]
    assert target.read_text() == "old"


def test_a_weight_too_large(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, 1, WeightType.F32)
    weights[POISONED].data.view("<f4")[99] = 1e30
    folder = save_folder(CONFIG, weights, tmp_path / "folder")
    with pytest.raises(ModelFormatError, match=r"up_proj.weight: .*too large for Q5_0"):
        quantize(folder, tmp_path / "out.gguf", "q4_k_m")


def test_quantized_sources(source: Path, tmp_path: Path) -> None:
    first = quantize(source, tmp_path / "first.gguf", "q8_0")
    again = quantize(first.path, tmp_path / "again.gguf", "q8_0")
    assert tensor_bytes(first.path) == tensor_bytes(again.path)
    assert again.requantized == 0
    assert quantize(first.path, tmp_path / "third.gguf", "q4_0").requantized > 0


def test_default_names(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    assert quantize(source, None, "q8_0").path == Path("source.Q8_0.gguf")
    assert quantize("source.Q8_0.gguf", None, "q4_0").path == Path("source.Q4_0.gguf")
    assert quantize(folder, None, "q4_k").path == Path("folder.Q4_K_M.gguf")
    assert sorted(path.name for path in place.iterdir()) == [
        "folder.Q4_K_M.gguf", "source.Q4_0.gguf", "source.Q8_0.gguf",
    ]  # fmt: skip


# -- importance --------------------------------------------------------------------------------


def importance_file(source: Path, path: Path, config: ModelConfig = CONFIG) -> Path:
    random = np.random.default_rng(1)
    sums = {
        name: random.random(tensor.columns, np.float32)
        for name, tensor in GgufFile.open(source).tensors.items()
        if name.startswith("blk.") and len(tensor.shape) == 2
    }
    write_imatrix(path, ImportanceMatrix(sums, dict.fromkeys(sums, 1), ("words.txt",), 4, 512))
    return path


def made_with(source: Path, tmp_path: Path, **arguments: object) -> Quantized:
    return quantize(source, tmp_path / "with.gguf", "q4_0", **arguments)  # type: ignore[arg-type]


def test_importance_reaches_the_blocks(source: Path, tmp_path: Path) -> None:
    imatrix = importance_file(source, tmp_path / "i.gguf")
    made = made_with(source, tmp_path, imatrix=imatrix)
    assert made.without_importance == ("token_embd.weight",)
    plain = tensor_bytes(quantize(source, tmp_path / "without.gguf", "q4_0").path)
    found = tensor_bytes(made.path)
    assert found["token_embd.weight"] == plain["token_embd.weight"]
    assert found["blk.2.attn_q.weight"] != plain["blk.2.attn_q.weight"]
    metadata = GgufFile.open(made.path).metadata
    assert metadata["quantize.imatrix.file"] == "i.gguf"
    assert metadata["quantize.imatrix.dataset"] == "words.txt"
    assert metadata["quantize.imatrix.chunks_count"] == 4
    assert metadata["quantize.imatrix.entries_count"] == 28


def test_importance_of_another_model(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    name = "blk.0.attn_q.weight"
    write_imatrix(other, ImportanceMatrix({name: np.ones(64, np.float32)}, {name: 1}))
    with pytest.raises(RequestError, match=r"blk.0.attn_q.weight: 64 columns, the weight has 96"):
        made_with(source, tmp_path, imatrix=other)
    write_imatrix(other, ImportanceMatrix({"x": np.ones(64, np.float32)}, {"x": 1}))
    with pytest.raises(RequestError, match="names no weight of this model"):
        made_with(source, tmp_path, imatrix=other)
