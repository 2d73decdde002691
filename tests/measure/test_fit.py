"""Types chosen to fit a size."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolrun import Model
from smolrun.errors import OutputError, RequestError
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.gguf import GgufFile
from smolrun.files.quantize import quantize_files
from smolrun.measure.divergence import kl_divergence
from smolrun.measure.fit import Fit, Fitting, Size, better, quantize_to_fit
from smolrun.model.random import random_weights
from smolrun.quant.mixes import MIXES
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


def test_losses_are_those_of_the_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Fitting(checkpoint)
    job.measure(TEXT, threads=2)
    fit = job.choose(sizes(checkpoint, 6.5))
    coarse = replace(fit, types=dict.fromkeys(fit.types, WeightType.Q4_0))
    alike = replace(fit, types=dict.fromkeys(fit.types, WeightType.F32))
    found = job.losses([fit, coarse, alike], threads=2)
    assert all(losses.shape == (len(TEXT),) for losses in found)
    assert 0 < found[0].mean() < found[1].mean()
    np.testing.assert_allclose(found[2], 0, atol=1e-6)
    quantize_files(checkpoint.path, tmp_path / "coarse.gguf", MIXES["Q4_0"],
                   overrides=[(".", WeightType.Q4_0)], importance=fit.importance)  # fmt: skip
    ids = np.array([TEXT], np.int32)
    with Model(checkpoint.path) as base, Model(tmp_path / "coarse.gguf") as other:
        logits = [
            model.forward(ids, all_positions=True)[0] for model in (base, other)
        ]  # fmt: skip
    expected = kl_divergence(*logits)
    assert found[1].mean() == pytest.approx(expected.mean(), rel=0.05)


def test_near_mixes_are_those_predicted_to_lose_little_more(checkpoint: Checkpoint) -> None:
    job = Fitting(checkpoint)
    job.measure(TEXT, threads=2)
    fit = job.choose(sizes(checkpoint, 8.5))
    near = job.near(fit)
    assert near[0].mix is MIXES["BF16"], "loses least, whether it fits or not"
    assert {fit.mix for fit in near} >= {MIXES["Q8_0"], MIXES["BF16"]}
    assert MIXES["Q4_0"] not in {fit.mix for fit in near}
    assert all(a.predicted_kl <= b.predicted_kl for a, b in itertools.pairwise(near))
    assert near[-1].predicted_kl <= 2 * fit.predicted_kl


def test_better_is_what_is_clearly_so() -> None:
    random = np.random.default_rng(2)
    mix = 1e-3 * random.random(1000)
    assert better(0.9 * mix, mix)
    assert not better(mix, mix)
    assert not better(1.1 * mix, mix)
    noise = random.standard_normal(1000)
    noise = (noise - noise.mean()) / noise.std()
    for errors, is_better in ((1, False), (3, True)):
        gain = noise + errors / np.sqrt(1000)
        assert better(mix - 1e-4 * gain, mix) == is_better


@pytest.mark.parametrize("worse", [False, True])
def test_a_mix_is_taken_unless_the_choice_is_clearly_better(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: bool
) -> None:
    source = shared_data / "tiny-smollm3" / "tiny-smollm3-bf16.gguf"
    named = quantize_files(source, tmp_path / "named.gguf", MIXES["Q8_0"])

    def losses(self: Fitting, fits: Sequence[Fit], **how: object) -> list[np.ndarray]:
        assert fits[0].mix is None
        return [np.full(9, 1.0 if (fit.mix is None) == worse else 0.5) for fit in fits]

    monkeypatch.setattr(Fitting, "losses", losses)
    monkeypatch.setattr("smolrun.measure.fit._NEAR", 10)  # Q8_0 is far from the best here
    words = "The quick brown fox jumps over the lazy dog. " * 10
    made, fit = quantize_to_fit(
        source, tmp_path / "fit.gguf", Size(named.nbytes), words, "words", threads=2
    )
    assert made.nbytes <= named.nbytes
    assert (made.mix, fit.mix) == (("Q8_0", MIXES["Q8_0"]) if worse else ("FIT", None))
    if worse:
        files = GgufFile.open(named.path), GgufFile.open(made.path)
        for name, tensor in files[0].tensors.items():
            np.testing.assert_array_equal(files[1].tensors[name].data, tensor.data)


def test_progress(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    Fitting(checkpoint).measure(TEXT, threads=1, progress=lambda *done: told.append(done))
    assert told == [(i, len(told)) for i in range(len(told))]


def test_what_does_not_fit(checkpoint: Checkpoint) -> None:
    job = Fitting(checkpoint)
    with pytest.raises(
        RequestError, match="does not fit: its matrices take .* at least"
    ) as refused:
        job.check(sizes(checkpoint, 2))
    found = re.search(r"make SIZE (\d+) bytes larger", str(refused.value))
    assert found is not None
    job.check(sizes(checkpoint, 2) + int(found[1]))
    with pytest.raises(RequestError):
        job.check(sizes(checkpoint, 2) + int(found[1]) - 1)
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


def test_where_the_file_can_not_be_is_told_before_anything_is_measured(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_data / "tiny-smollm3" / "tiny-smollm3-bf16.gguf"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(Fitting, "measure")
    Path("tiny-smollm3-bf16.FIT.gguf").write_bytes(b"kept")
    for target, words in (
        (None, "--force"),
        ("tiny-smollm3-bf16.FIT.gguf", "--force"),
        ("no/such/out.gguf", "make the folder first"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(OutputError, match=words):
            quantize_to_fit(
                source, target, Size(10_000_000), "a", "a", overwrite=target == tmp_path
            )


def test_the_name_does_not_depend_on_what_is_found(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_data / "tiny-smollm3" / "tiny-smollm3-bf16.gguf"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smolrun.measure.fit.better", lambda *_: False)
    monkeypatch.setattr("smolrun.measure.fit._NEAR", 10)
    words = "The quick brown fox jumps over the lazy dog. " * 10
    made, fit = quantize_to_fit(source, None, Size(bits_per_weight=8.6), words, "words", threads=2)
    assert fit.mix is not None
    assert made.path == Path("tiny-smollm3-bf16.FIT.gguf")
    assert made.path.is_file()


def test_a_file_that_fits(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tiny-smollm3" / "tiny-smollm3-bf16.gguf"
    words = "The quick brown fox jumps over the lazy dog. " * 10
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
