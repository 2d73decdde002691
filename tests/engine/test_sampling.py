"""Sampling against a plain definition in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun.engine.sampling import (
    Sampler,
    SamplingParameters,
    likeliest,
    sampling_parameters,
    uniform,
)
from smolrun.errors import NonFiniteError, RequestError

VOCABULARY = 1000


def made(**arguments: Any) -> SamplingParameters:
    return sampling_parameters(arguments, SamplingParameters(), VOCABULARY)


def some_logits(seed: int, scale: float = 3) -> npt.NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(VOCABULARY)).astype(np.float32)


def distribution(logits: npt.NDArray[np.float32], p: SamplingParameters) -> npt.NDArray[np.float64]:
    """The definition: sort everything, cut, normalize."""
    scaled = logits.astype(np.float64) / p.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    keep = np.ones(len(logits), bool)
    if p.top_k > 0:
        keep[order[p.top_k :]] = False
    probabilities[~keep] = 0
    probabilities /= probabilities.sum()
    if p.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= p.top_p]] = 0
    probabilities[probabilities < p.min_p * probabilities.max()] = 0
    normalized: npt.NDArray[np.float64] = probabilities / probabilities.sum()
    return normalized


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2.5, "top_p": 0.97},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1, "top_k": 5},
    {"temperature": 1, "top_k": 1},
    {"temperature": 1, "top_k": 5000, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1, "top_p": 1e-9},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [0.1, 3])
def test_draws_follow_the_definition(setting: dict[str, Any], scale: float) -> None:
    logits = some_logits(1, scale)
    parameters = made(seed=4, **setting)
    expected = distribution(logits, parameters)
    sampler = Sampler(parameters)
    draws = np.array([sampler.sample(logits, position).id for position in range(4000)])
    counts = np.bincount(draws, minlength=VOCABULARY)
    assert not counts[expected == 0].any()
    # Chi-square over cells of at least 20 expected draws.
    big = expected * len(draws) >= 20
    cells = [*expected[big], expected[~big].sum()]
    seen = [*counts[big], counts[~big].sum()]
    chi = sum((s - e * 4000) ** 2 / (e * 4000) for s, e in zip(seen, cells, strict=True) if e > 0)
    freedom = max(sum(e > 0 for e in cells) - 1, 1)
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("spread", [0, 0.1, 1, 3, 10])
@pytest.mark.parametrize("rounded", [False, True])
def test_large_vocabularies_are_cut_as_by_sorting(spread: float, rounded: bool) -> None:
    """Ties included, of which `rounded` makes many; of equal ones the first are kept."""
    generator = np.random.default_rng(3)
    for size in (1, 63, 64, 3000, 49152):
        logits = (spread * generator.standard_normal(size)).astype(np.float32)
        logits = np.round(logits) if rounded else logits
        order = np.argsort(-logits, kind="stable")
        for count in {1, 2, 40, 300, size // 2, size} & set(range(1, size + 1)):
            assert likeliest(logits, count).tolist() == sorted(order[:count].tolist())


def test_ties_are_broken_by_the_lower_id() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    assert Sampler(made()).sample(logits, 0).id == 0
    for setting in ({"top_k": 3}, {"top_p": 3 / VOCABULARY - 1e-9}):
        sampler = Sampler(made(temperature=1, seed=1, **setting))
        assert {sampler.sample(logits, position).id for position in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_the_same_seed_and_position_give_the_same_token(setting: dict[str, Any]) -> None:
    """Wherever the logits stand in memory, and whatever was drawn before."""
    parameters = made(seed=11, logprobs=True, top_logprobs=3, **setting)
    expected = [Sampler(parameters).sample(some_logits(p), p) for p in range(30)]
    shifted = np.empty(VOCABULARY + 16, np.float32)
    sampler = Sampler(parameters)
    for position in reversed(range(30)):
        view = shifted[position % 16 :][:VOCABULARY]
        view[:] = some_logits(position)
        assert sampler.sample(view, position) == expected[position]


def test_seeds_and_positions_differ() -> None:
    assert len({uniform(seed, position) for seed in range(30) for position in range(30)}) == 900
    assert uniform(2**64 - 1, 2**31) != uniform(2**64 - 2, 2**31)
    # Published by Philox's authors: the first word for an all-zero key and counter is the
    # generator's own; NumPy steps the counter before it draws, which is as good.
    values = np.array([uniform(3, position) for position in range(20000)])
    assert abs(values.mean() - 0.5) < 0.01
    assert 0 <= values.min() < values.max() < 1


def test_a_random_seed_is_told_and_reproduces() -> None:
    first = Sampler(made(temperature=1))
    tokens = [first.sample(some_logits(p), p).id for p in range(20)]
    second = Sampler(made(temperature=1, seed=first.seed))
    assert [second.sample(some_logits(p), p).id for p in range(20)] == tokens
    assert Sampler(made(temperature=1)).seed != first.seed


def test_logit_bias() -> None:
    logits = some_logits(2)
    best = int(logits.argmax())
    assert Sampler(made(logit_bias={7: 100})).sample(logits, 0).id == 7
    assert Sampler(made(logit_bias={best: -100.0})).sample(logits, 0).id != best
    assert logits.argmax() == best


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.full(VOCABULARY, -1.0, np.float32)
    logits[[3, 4]] = 2.0, 1.5
    assert Sampler(made(repeat_penalty=1.4), [3]).sample(logits, 0).id == 4
    assert Sampler(made(repeat_penalty=1.3), [3]).sample(logits, 0).id == 3
    assert Sampler(made(repeat_penalty=1.4), [3, *[9] * 64]).sample(logits, 0).id == 3
    logits[:] = -1.0
    assert Sampler(made(repeat_penalty=1.1), list(range(5))).sample(logits, 0).id == 5


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    logits = np.full(VOCABULARY, -9.0, np.float32)
    logits[:3] = 1.0, 0.8, 0.7
    greedy = Sampler(made(presence_penalty=0.25), [0, 0, 0])
    # 1.0 0.8 0.7 -> 0; 0.75 0.8 0.7 -> 1; 0.75 0.55 0.7 -> 0; then 0 again and again
    assert [greedy.sample(logits, p).id for p in range(5)] == [0, 1, 0, 0, 0]
    greedy = Sampler(made(frequency_penalty=0.25), [0, 0, 0])
    # 0; 0.75 0.8 0.7 -> 1; 0.75 0.55 0.7 -> 0; 0.5 0.55 0.7 -> 2; 0.5 0.55 0.45 -> 1; ...
    assert [greedy.sample(logits, p).id for p in range(6)] == [0, 1, 0, 2, 1, 0]


def test_logprobs_are_those_of_the_model() -> None:
    logits = some_logits(5)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    parameters = made(
        temperature=2, top_k=3, logit_bias={1: 3}, repeat_penalty=2, top_logprobs=20, seed=1
    )
    token = Sampler(parameters, [1, 2]).sample(logits, 9)
    assert token.logprob == pytest.approx(exact[token.id], abs=1e-5)
    assert [other for other, _ in token.top_logprobs] == np.argsort(-exact)[:20].tolist()
    for other, logprob in token.top_logprobs:
        assert logprob == pytest.approx(exact[other], abs=1e-5)
    assert Sampler(made()).sample(logits, 0).logprob is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("setting", [{}, {"temperature": 1, "top_p": 0.9}], ids=str)
def test_a_non_finite_logit_is_an_error(value: float, setting: dict[str, Any]) -> None:
    for place in (0, 500, VOCABULARY - 1):
        logits = some_logits(0)
        logits[place] = value
        with pytest.raises(NonFiniteError, match="position 6"):
            Sampler(made(**setting)).sample(logits, 7)


WRONG: list[tuple[str, Any]] = [
    *[("max_tokens", v) for v in (-1, 0, 2**63, 1.5, True, "2")],
    *[("temperature", v) for v in (-1, 1e309, math.nan, "nan", True, 101, [1])],
    *[("top_p", v) for v in (-0.1, 0, 1.1, math.nan, "0.5")],
    *[("top_k", v) for v in (-2, 2**31, 2.0, True)],
    *[("min_p", v) for v in (-0.1, 1.1)],
    *[("seed", v) for v in (2**64, -1, 1.0)],
    *[("top_logprobs", v) for v in (21, -1)],
    *[(f"{kind}_penalty", v) for kind in ("presence", "frequency") for v in (1e9, -1e9, -2.1)],
    *[("repeat_penalty", v) for v in (1e9, -1e9, 0, 5e-324)],
    *[("logit_bias", {token: 1}) for token in (-1, VOCABULARY, 2**63, True, "a")],
    ("logit_bias", []),
    *[("logit_bias", v) for v in ({1: 101}, {1: math.nan}, {1: "1"}, dict.fromkeys(range(301), 1))],
    *[("stop", v) for v in ([""], "", ["a"] * 17, "a" * 257, [1], 3, b"a")],
    *[("logprobs", v) for v in (1, "yes")],
    ("best_of", 2),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: repr(v)[:30])
def test_wrong_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}: "):
        made(**{name: value})


def test_arguments_over_defaults() -> None:
    defaults = SamplingParameters(temperature=0.6, top_p=0.95)
    parameters = sampling_parameters(
        {"top_p": None, "stop": "x", "top_k": np.int64(3), "temperature": np.float32(0.5)},
        defaults,
        VOCABULARY,
    )
    assert parameters == SamplingParameters(temperature=0.5, top_p=0.95, top_k=3, stop=("x",))
    assert made(top_logprobs=2).logprobs
    assert made(temperature=1e-6).greedy
