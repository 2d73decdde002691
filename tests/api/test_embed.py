"""`Model.embed`: the mean of the hidden states, against the NumPy reading."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from smolrun import AsyncModel, ContextLengthError, Model, RequestError
from smolrun.model.llama import build
from smolrun.model.random import random_weights
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.models import values_of
from tests.waiting import eventually

TEXTS = ["The sky is blue", "a", "A small model answers in small words. " * 8]


@pytest.fixture(scope="module")
def oracle(model: Model) -> ReferenceRunner:
    weights = values_of(random_weights(model.config, 3, WeightType.F32))
    return ReferenceRunner(build(model.config), weights, rounded_kv=True)


def test_embed_is_the_reference(model: Model, oracle: ReferenceRunner) -> None:
    found = model.embed(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (3, model.config.hidden_size)
    for vector, text in zip(found, TEXTS, strict=True):
        oracle.clear()
        oracle.forward(model.tokenize(text))
        mean = oracle.hidden.mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-4)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert np.array_equal(vector, model.embed(text))  # alone, and of shape (hidden_size,)
        assert np.array_equal(vector, model.embed([model.tokenize(text)])[0])


def test_embed_on_an_event_loop(model: Model) -> None:
    async def main() -> None:
        asynchronous = AsyncModel(model)
        assert np.array_equal(await asynchronous.embed(TEXTS), model.embed(TEXTS))
        assert np.array_equal(await asynchronous.embed("a"), model.embed("a"))
        with pytest.raises(RequestError, match="^prompt: "):
            await asynchronous.embed(["a", ""])

    asyncio.run(main())


def test_what_can_not_be_embedded(model: Model) -> None:
    cases: list[Any] = [[], "", [""], [[]], [["a"]], 5, None]
    for wrong in cases:
        with pytest.raises(RequestError, match="^prompt: "):
            model.embed(wrong)
    with pytest.raises(ContextLengthError):
        model.embed("x " * 1000)
    assert eventually(lambda: model.statistics()["kv_blocks_held"] == 0)  # earlier tests' too
