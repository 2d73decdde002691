"""Hidden states and likelihoods of given tokens, beside requests that generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smolrun.engine.likelihood import MOST_ROWS, log_probabilities
from smolrun.engine.reading import TokenLikelihoods
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


def scores(tokens: list[int], first: int) -> list[float]:
    """The definition: ln p of tokens[first:], each after those before it."""
    engine = fake_engine()
    found = []
    for place in range(first, len(tokens)):
        logits = fake_of(engine).logits_of(np.array(tokens[:place]))[None]
        found += log_probabilities(logits, np.array(tokens[place : place + 1], np.int32)).tolist()
    return found


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_likelihoods_are_the_same_beside_others_and_in_any_chunks(chunk: int) -> None:
    engine = fake_engine(kv_blocks=128, max_step_tokens=chunk)
    fake_of(engine).hold()
    given = [([*text, 5, 6], max(1, len(text) // (1 + n % 3))) for n, text in enumerate(texts(8))]
    answers = [engine.submit([n] * 40, parameters(max_tokens=30), TokenOutput()) for n in range(3)]
    readings = [engine.read(tokens) for tokens, _ in given[:2]]
    requests = [engine.score(*one, Terms(key=str(n % 2))) for n, one in enumerate(given)]
    fake_of(engine).go_on()
    for (tokens, first), request in zip(given, requests, strict=True):
        (found,) = request
        assert found.logprobs.tolist() == scores(tokens, first)
    for (tokens, _), reading in zip(given, readings, strict=False):
        np.testing.assert_allclose(next(reading), expected(tokens), rtol=1e-5, atol=1e-7)
    for n, answer in enumerate(answers):
        assert collect(answer)[0] == solo([n] * 40, {"max_tokens": 30})
    assert engine.statistics()["kv_blocks_held"] == 0
    engine.close()


def test_a_prefix_is_scored_from_the_cache_and_into_it() -> None:
    engine = fake_engine()
    text = np.random.default_rng(1).integers(0, VOCABULARY, 150).tolist()
    (first,) = engine.score(text, 100)
    steps = fake_of(engine).steps
    computed = sum(tokens for tokens, _ in steps)
    (again,) = engine.score([*text[:120], 8, 9], 119)
    # What is wanted is computed, whatever the cache knows: all but three blocks of 32.
    assert sum(tokens for tokens, _ in steps) - computed == 121 - 96
    assert again.logprobs.tolist() == scores([*text[:120], 8, 9], 119)
    assert first.logprobs.tolist()[:19] == scores(text, 100)[:19]
    assert engine.statistics()["cached_tokens"] == 96
    tokens, ending = collect(engine.submit(text[:80], parameters(max_tokens=3), TokenOutput()))
    assert (tokens, ending.cached_tokens) == (solo(text[:80], {"max_tokens": 3}), 64)
    engine.close()


def test_rows_of_logits_in_memory_are_bounded() -> None:
    engine = fake_engine(kv_blocks=128)
    rows: list[int] = []
    fake_of(engine).hold()
    step = engine.runner.step

    def counted(*arrays: Any) -> None:
        rows.append(len(arrays[4]))
        step(*arrays)

    engine.runner.step = counted  # type: ignore[assignment, method-assign]
    given = np.random.default_rng(1).integers(0, VOCABULARY, (5, 250)).tolist()
    requests = [engine.score(tokens, 1) for tokens in given]
    fake_of(engine).go_on()
    for tokens, request in zip(given, requests, strict=True):
        assert next(request).logprobs.tolist() == scores(tokens, 1)
    assert max(rows) == MOST_ROWS
    engine.close()


def test_likelihoods_tell_tokens_and_whether_they_are_the_likeliest() -> None:
    engine = fake_engine()
    written = [token.id for token in solo([3, 4], {"max_tokens": 4, "temperature": 0})]
    (found,) = engine.score([3, 4, *written], 2)
    assert found.greedy
    (other,) = engine.score([3, 4, *written[:-1], (written[-1] + 1) % VOCABULARY], 2)
    assert not other.greedy
    (told,) = engine.score([3, 4, *written], 2, top_logprobs=2)
    assert isinstance(told, TokenLikelihoods)
    assert [token.id for token in told.tokens] == written
    assert [token.logprob for token in told.tokens] == pytest.approx(found.logprobs.tolist())
    assert all(token.top_logprobs[0] == (token.id, token.logprob) for token in told.tokens)
    engine.close()


def test_what_can_not_be_scored() -> None:
    engine = fake_engine(context_size=64)
    with pytest.raises(ContextLengthError):
        engine.score([1] * 66, 1)
    assert len(next(engine.score([1] * 65, 1)).logprobs) == 64  # the last one predicts nothing
    fake_of(engine).poison = {7}
    with pytest.raises(NonFiniteError):
        next(engine.score([7] * 40, 1))
    assert engine.statistics()["corrupted"] == 1
    fake_of(engine).poison = set()
    assert next(engine.score([7] * 40, 1)).logprobs.tolist() == scores([7] * 40, 1)
    fake_of(engine).hold()
    request = engine.score([1] * 60, 1)
    request.cancel()
    fake_of(engine).go_on()
    assert len(list(request)) <= 1
    assert engine.statistics()["kv_blocks_held"] == 0
    engine.close()
