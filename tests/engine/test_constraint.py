"""What a request's constraint may do to the logits, and that it stays with its request."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun.engine.sampling import Float32Array, Sampler
from smolrun.errors import SmolrunError

from .fakes import VOCABULARY, TokenOutput, collect, fake_engine, parameters, solo


class Only:
    """Allows the tokens of a set, or forces one; remembers what was drawn."""

    def __init__(self, allowed: set[int], forced: dict[int, int] | None = None) -> None:
        self.allowed = sorted(allowed)
        self.forced = forced or {}
        self.drawn: list[int] = []

    def adjust(self, logits: Float32Array) -> Float32Array | int:
        if len(self.drawn) in self.forced:
            return self.forced[len(self.drawn)]
        masked = np.full_like(logits, -np.inf)
        masked[self.allowed] = logits[self.allowed]
        return masked

    def accept(self, token: int) -> None:
        self.drawn.append(token)


class Failing:
    def adjust(self, logits: Float32Array) -> Float32Array | int:
        raise ValueError("stuck")

    def accept(self, token: int) -> None: ...


SETTINGS = [
    {"temperature": 0},
    {"temperature": 1, "seed": 3},
    {"temperature": 2, "seed": 4, "top_k": 5},
    {"temperature": 2, "seed": 5, "top_p": 0.9},
    {"temperature": 2, "seed": 6, "min_p": 0.1, "repeat_penalty": 1.5, "presence_penalty": 1},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_only_allowed_tokens_are_drawn_and_each_is_told(setting: dict[str, float]) -> None:
    engine = fake_engine()
    constraint = Only({5, 77, 300, 301}, forced={3: 9, 4: 10})
    request = engine.submit(
        [1, 2], parameters(max_tokens=40, **setting), TokenOutput(), constraint=constraint
    )
    tokens = [token.id for token in collect(request)[0]]
    engine.close()
    assert tokens == constraint.drawn
    assert tokens[3:5] == [9, 10]
    assert set(tokens) - {9, 10} <= {5, 77, 300, 301}
    assert len(set(tokens)) > 3


def test_a_token_that_bias_favours_stays_forbidden() -> None:
    sampler = Sampler(parameters(logit_bias={7: 100}), constraint=Only({3, 4}))
    assert sampler.sample(np.zeros(VOCABULARY, np.float32), 0).id == 3


def test_log_probabilities_are_those_of_the_models_own_logits() -> None:
    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    free = Sampler(parameters(logprobs=True, top_logprobs=3))
    bound = Sampler(parameters(logprobs=True, top_logprobs=3), constraint=Only({11}))
    first, second = free.sample(logits, 0), bound.sample(logits, 0)
    assert second.id == 11
    assert second.top_logprobs == first.top_logprobs
    wide = logits.astype(np.float64)
    assert second.logprob == pytest.approx(wide[11] - np.log(np.exp(wide).sum()), abs=1e-5)


def test_the_stop_token_is_told_too() -> None:
    engine = fake_engine()
    constraint = Only({5}, forced={2: 8})
    request = engine.submit([1], parameters(), TokenOutput(), stop_ids=[8], constraint=constraint)
    tokens, ending = collect(request)
    engine.close()
    assert ([token.id for token in tokens], constraint.drawn) == ([5, 5], [5, 5, 8])
    assert ending.finish_reason == "stop"


def test_an_error_stays_with_its_request_and_others_are_as_alone() -> None:
    engine = fake_engine()
    arguments = {"max_tokens": 30, "temperature": 1.0, "seed": 1}
    failing = engine.submit([1, 2], parameters(), TokenOutput(), constraint=Failing())
    bound = engine.submit([3], parameters(**arguments), TokenOutput(), constraint=Only({5, 6}))
    free = engine.submit([4, 5], parameters(**arguments), TokenOutput())
    with pytest.raises(SmolrunError, match="ValueError: stuck"):
        list(failing)
    assert {token.id for token in collect(bound)[0]} == {5, 6}
    assert collect(free)[0] == solo([4, 5], arguments)
    engine.close()
