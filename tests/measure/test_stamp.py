"""The correctness stamp must tell right from wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from smolrun import Model
from smolrun.measure import stamp as stamps
from smolrun.measure.stamp import Stamp, prompt_tokens, stamp
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import small_config

CONFIG = small_config(vocab_size=400)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.from_config(CONFIG, seed=3, threads=2) as model:
        yield model


def test_the_model_agrees_with_the_reference(model: Model) -> None:
    found = stamp(model.loaded.engine, model.loaded.program, random_weights(CONFIG, 3))
    assert found.correct
    assert found.agreed == len(found.tokens) == stamps.TOKENS
    assert found.nmse < 1e-6
    assert found.reference == "NumPy, float64"
    again = stamp(model.loaded.engine, model.loaded.program, random_weights(CONFIG, 3))
    assert again == found
    assert again.digest == found.digest


def test_other_weights_are_found_out(model: Model) -> None:
    tensors = dict(random_weights(CONFIG, 3))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = random_weights(CONFIG, 4)[name]
    found = stamp(model.loaded.engine, model.loaded.program, tensors)
    assert not found.correct


def test_a_large_model_gets_a_short_check(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "LARGE", 1)
    found = stamp(model.loaded.engine, model.loaded.program, random_weights(CONFIG, 3))
    assert len(found.tokens) == found.agreed == stamps.TOKENS_OF_LARGE
    assert "float32" in found.reference
    assert "short" in str(found)


def test_the_verdict() -> None:
    good = Stamp((1, 2), 1, stamps.TOLERANCE / 2, 1e-4, "NumPy")
    bad = Stamp((1, 3), 1, stamps.TOLERANCE * 2, 1e-4, "NumPy")
    assert not Stamp((1, 2), 2, 0.0, 0.1, "NumPy").correct, "the same tokens, but other logits"
    assert not Stamp((1, 2), 2, float("nan"), 0.0, "NumPy").correct
    assert not Stamp((1, 2), 2, 0.0, float("nan"), "NumPy").correct
    assert good.correct
    assert str(good).startswith("as the reference: 1 of 2")
    assert not bad.correct
    assert str(bad).startswith("NOT as the reference")
    assert good.digest != bad.digest
    assert len(good.digest) == 16


def test_other_weights_of_a_block_give_other_tokens() -> None:
    with Model.from_config(CONFIG, seed=5, threads=1) as other:
        found = stamp(other.loaded.engine, other.loaded.program, random_weights(CONFIG, 3))
    assert found.agreed < len(found.tokens)
    assert not found.correct


@pytest.mark.parametrize("vocabulary", [40, 400, 49152, 128256])
def test_prompts_stay_within_the_vocabulary(vocabulary: int) -> None:
    tokens = prompt_tokens(vocabulary, 600)
    assert tokens.dtype == np.int32
    assert 0 <= tokens.min() <= tokens.max() < vocabulary
    assert len(set(tokens.tolist())) > 15
    np.testing.assert_array_equal(tokens[:10], prompt_tokens(vocabulary, 10))


def test_weights_of_every_float_type_are_read(model: Model) -> None:
    tensors = random_weights(CONFIG, 3, WeightType.F16)
    found = stamp(model.loaded.engine, model.loaded.program, tensors)
    assert found.nmse < 1e-4


def test_large_matrices_are_read_piece_by_piece(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stamp(model.loaded.engine, model.loaded.program, random_weights(CONFIG, 3))
    monkeypatch.setattr(stamps, "ROWS_AT_A_TIME", 7)
    assert stamp(model.loaded.engine, model.loaded.program, random_weights(CONFIG, 3)) == whole
