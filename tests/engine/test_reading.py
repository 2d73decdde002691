"""Hidden states of given tokens, beside requests that generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smolrun.engine.sequence import Terms
from smolrun.errors import ContextLengthError, NonFiniteError, RequestError
from tests.engine.fakes import (
    HIDDEN_SIZE,
    VOCABULARY,
    TokenOutput,
    collect,
    fake_engine,
    fake_of,
    parameters,
    solo,
)


def expected(tokens: list[int]) -> Any:
    """The definition: the mean of the hidden states, of length 1."""
    engine = fake_engine()
    rows = [fake_of(engine).logits_of(np.array(tokens[: n + 1])) for n in range(len(tokens))]
    mean = np.array(rows, np.float64)[:, :HIDDEN_SIZE].mean(axis=0)
    return mean / np.linalg.norm(mean)


def texts(count: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [
        generator.integers(0, VOCABULARY, generator.integers(1, 200)).tolist() for _ in range(count)
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_the_same_bits_beside_others_and_in_any_chunks(chunk: int) -> None:
    engine = fake_engine(kv_blocks=128, max_step_tokens=chunk)
    fake_of(engine).hold()
    answers = [engine.submit([n] * 40, parameters(max_tokens=30), TokenOutput()) for n in range(3)]
    readings = [engine.read(text, Terms(key=str(n % 2))) for n, text in enumerate(texts(8))]
    fake_of(engine).go_on()
    for text, reading in zip(texts(8), readings, strict=True):
        (vector,) = reading
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, expected(text), rtol=1e-5, atol=1e-7)
        alone = fake_engine()
        assert np.array_equal(vector, next(alone.read(text)))
        alone.close()
    for n, answer in enumerate(answers):
        assert collect(answer)[0] == solo([n] * 40, {"max_tokens": 30})
    assert engine.statistics()["kv_blocks_held"] == 0
    engine.close()


def test_the_prefix_cache_is_neither_read_nor_written() -> None:
    """It holds no hidden states; and what was read without logits was not found finite by them."""
    engine = fake_engine()
    text = texts(3)[2] * 2
    collect(engine.submit(text[:100], parameters(max_tokens=1), TokenOutput()))
    cached = engine.pool.cached
    for _ in range(2):
        np.testing.assert_allclose(next(engine.read(text[:100])), expected(text[:100]), rtol=1e-5)
    assert engine.pool.cached == cached
    engine.close()


def test_what_can_not_be_read() -> None:
    engine = fake_engine(context_size=64)
    with pytest.raises(RequestError, match="^prompt: "):
        engine.read([])
    with pytest.raises(RequestError, match="^prompt: token 512"):
        engine.read([VOCABULARY])
    with pytest.raises(ContextLengthError):
        engine.read([1] * 65)
    np.testing.assert_allclose(next(engine.read([1] * 64)), expected([1] * 64), rtol=1e-5)
    fake_of(engine).poison = {7}
    with pytest.raises(NonFiniteError, match="tokens 0 to 9"):
        next(engine.read([7] * 10))
    assert engine.statistics()["corrupted"] == 1
    np.testing.assert_allclose(next(engine.read([1] * 64)), expected([1] * 64), rtol=1e-5)
    reading = engine.read([1] * 64)
    reading.cancel()
    assert len(list(reading)) <= 1
    engine.close()
