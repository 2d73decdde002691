"""Types chosen to fit a size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolrun.errors import OutputError, RequestError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.gguf import GgufFile
from smolrun.measure.fit import Fitting, Size, quantize_to_fit
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import save_folder, small_config

CONFIG = small_config(hidden_size=96, intermediate_size=256, head_dim=24, num_hidden_layers=3)
TEXT = [int(token) for token in np.random.default_rng(1).integers(0, CONFIG.vocab_size, 128)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    weights = random_weights(CONFIG, 1, WeightType.F32)
    return open_checkpoint(save_folder(CONFIG, weights, tmp_path_factory.mktemp("fit") / "model"))


def sizes(checkpoint: Checkpoint, bits: float) -> int:
    return int(bits * sum(t.rows * t.columns for t in checkpoint.tensors.values()) / 8)


def test_types_fit_and_more_room_loses_less(checkpoint: Checkpoint) -> None:
    from smolrun.files.gguf_names import gguf_name

    job = Fitting(checkpoint)
    job.measure(TEXT, threads=2)
    losses = []
    for bits in (5.2, 6.5, 9.0, 17.5):
        room = sizes(checkpoint, bits)
        fit = job.choose(room)
        taken = sum(
            tensor.rows * fit.types[gguf_name(name)].row_bytes(tensor.columns)
            if len(tensor.shape) == 2
            else 4 * tensor.columns
            for name, tensor in checkpoint.tensors.items()
        )
        assert 0.9 * room < taken <= room
        losses.append(fit.predicted_kl)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100
    assert set(fit.types.values()) == {WeightType.BF16}


def test_progress(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    Fitting(checkpoint).measure(TEXT, threads=1, progress=lambda *done: told.append(done))
    assert told == [(i, len(told)) for i in range(len(told))]


def test_what_does_not_fit(checkpoint: Checkpoint) -> None:
    with pytest.raises(RequestError, match="does not fit: its matrices take .* at least"):
        Fitting(checkpoint).check(sizes(checkpoint, 2))
    with pytest.raises(RequestError, match="the text has 5 tokens"):
        Fitting(checkpoint).measure(TEXT[:5], threads=1)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80MB", Size(80_000_000)), ("1.5 GB", Size(1_500_000_000)), ("2KiB", Size(2048)),
        ("12345", Size(12345)), ("4.5bpw", Size(bits_per_weight=4.5)),
    ],
)  # fmt: skip
def test_sizes(text: str, size: Size) -> None:
    assert Size.parse(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "4 bits", "1e9", "4.5.5MB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        Size.parse(text)


def test_a_file_that_fits(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tiny-smollm3" / "tiny-smollm3-bf16.gguf"
    words = "The quick brown fox jumps over the lazy dog. " * 40
    target = tmp_path / "out.gguf"
    for size in (Size(int(0.62 * source.stat().st_size)), Size(bits_per_weight=8.0)):
        made, fit = quantize_to_fit(source, target, size, words, "words", overwrite=True)
        file = GgufFile.open(target)
        assert made.path == target
        if size.bits_per_weight is None:
            assert 0.8 * size.nbytes < target.stat().st_size <= size.nbytes
        else:
            assert made.bits_per_weight <= 8.0
        assert {name: file.tensors[name].type for name in fit.types} == fit.types
        assert file.metadata["smolrun.quantize.type"] == "FIT"
        assert file.metadata["quantize.imatrix.dataset"] == "words"
    with pytest.raises(OutputError, match="--force"):
        quantize_to_fit(source, target, size, words, "words")
