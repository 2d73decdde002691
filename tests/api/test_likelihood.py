"""Perplexity of texts and scores of continuations, against plain sums over `forward`."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smolrun import ContextLengthError, Model, RequestError
from smolrun.engine.likelihood import Window, text_windows
from tests.api.tiny import TEXT


def log_probabilities(model: Model, ids: list[int]) -> list[float]:
    """Of ids[1:], each after all before it, by the definition."""
    logits = model.forward(np.array([ids]), all_positions=True)[0].astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [float(np.log(softmax[i - 1, ids[i]])) for i in range(1, len(ids))]


def test_windows_follow_each_other_and_half_of_each_counts() -> None:
    assert text_windows(25, 8) == [Window(0, 5, 8), Window(8, 13, 16), Window(16, 21, 24)]
    assert sum(window.scored for window in text_windows(25, 8)) == 9


def test_windows_with_a_stride_score_every_token_once() -> None:
    windows = text_windows(20, 8, 3)
    scored = [place for window in windows for place in range(window.first, window.end)]
    assert scored == list(range(5, 5 + len(scored)))
    assert all(window.end - window.start == 8 and window.end <= 20 for window in windows)
    assert text_windows(8, 8, 3) == [Window(0, 5, 8)]


@pytest.mark.parametrize(
    ("count", "size", "stride", "words"),
    [
        (7, 8, None, "7 tokens, and a window 8"),
        (9, 3, None, "at least 4"),
        (9, 8, 0, "stride"),
        (9, 8, 8, "stride"),
    ],
)
def test_windows_that_make_no_sense(count: int, size: int, stride: int | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        text_windows(count, size, stride)


@pytest.mark.parametrize(("context", "stride"), [(16, None), (17, None), (24, 5)])
def test_perplexity_is_the_mean_over_what_counts(
    model: Model, context: int, stride: int | None
) -> None:
    ids = model.tokenize(TEXT)
    expected = []
    for window in text_windows(len(ids), context, stride):
        piece = ids[window.start : window.end]
        expected += log_probabilities(model, piece)[window.first - window.start - 1 :]
    found = model.perplexity(TEXT, context=context, stride=stride)
    assert found.tokens == len(expected)
    assert found.value == pytest.approx(np.exp(-np.mean(expected)), rel=1e-6)
    deviation = np.std(expected, ddof=1) / np.sqrt(len(expected))
    assert found.error == pytest.approx(found.value * deviation, rel=1e-5)
    assert model.perplexity(ids, context=context, stride=stride) == found


def test_perplexity_of_a_text_of_many_rows(model: Model) -> None:
    """More rows than are held in memory at a time."""
    ids = np.random.default_rng(0).integers(3, 300, 400).tolist()
    expected = log_probabilities(model, ids)[200:]
    assert model.perplexity(ids, context=400).value == pytest.approx(
        np.exp(-np.mean(expected)), rel=1e-6
    )


def test_perplexity_of_tokens_that_do_not_exist(model: Model) -> None:
    with pytest.raises(RequestError, match="token -1 is not in the vocabulary"):
        model.perplexity([*[5] * 15, -1], context=16)


def test_progress_and_control_tokens(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    text = "<|im_end|>" * 20  # text here, not twenty tokens
    model.perplexity(text, context=8, progress=lambda done, total: seen.append((done, total)))
    windows = len(model.tokenize(text, parse_special=False)) // 8
    assert seen == [(done, windows) for done in range(1, windows + 1)]
    assert windows > 5


def test_a_window_longer_than_the_context(model: Model) -> None:
    with pytest.raises(ContextLengthError):
        model.perplexity([5] * 2000, context=1000)


def test_scores_are_those_of_each_choice_alone(model: Model) -> None:
    prompt = "The sky is"
    choices = [" blue because air", " small", " 中文", "."]
    found = model.score(prompt, choices)
    for choice, score in zip(choices, found, strict=True):
        ids, start = model.tokenize(prompt + choice), len(model.tokenize(prompt))
        expected = log_probabilities(model, ids)[start - 1 :]
        assert score.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert score.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert model.score(prompt, [choice]) == [score], "what is shared must not matter"


def test_what_the_model_would_write_is_greedy(model: Model) -> None:
    ids = model.tokenize("The sky is")
    written = model.generate(ids, max_tokens=4, temperature=0, ignore_eos=True).token_ids
    other = [*written[:-1], (written[-1] + 1) % 300]
    best, worse = model.score(ids, [written, other])
    assert best.greedy
    assert not worse.greedy
    assert best.logprob > worse.logprob


def test_choices_that_share_nothing_with_a_prompt_of_one_token(model: Model) -> None:
    first, second = model.score([5], [[7], [8, 9]])
    assert first.token_logprobs == pytest.approx(log_probabilities(model, [5, 7]), abs=1e-5)
    assert second.token_logprobs == pytest.approx(log_probabilities(model, [5, 8, 9]), abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "choices", "words"),
    [
        ("a", [], "choices: expected at least one"),
        ("", ["a"], "prompt: expected at least one token"),
        ("a", ["b", ""], r"choices\[1\]: expected at least one token"),
        ("a", ["b", [5]], r"choices\[1\]: text or token ids"),
        ([5], ["b"], r"choices\[0\]: text or token ids"),
        ([5], [[100000]], "token 100000 is not in the vocabulary"),
    ],
)
def test_scores_that_make_no_sense(
    model: Model, prompt: object, choices: object, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        model.score(prompt, choices)  # type: ignore[arg-type]


def test_the_users_cache_is_left_alone(model: Model, tiny_folder: Path) -> None:
    with Model(tiny_folder) as other:
        other.forward(np.array([[5, 6, 7]]))
        expected = other.forward(np.array([[8]]), 3)
        other.forward(np.array([[5, 6, 7]]))
        other.perplexity(TEXT, context=16)
        other.score("a", [" b", " c"])
        assert (other.forward(np.array([[8]]), 3) == expected).all()


def test_scores_beside_answers_and_in_several_threads(model: Model, tiny_folder: Path) -> None:
    """They share steps, a cache and a queue, and change nothing about each other."""
    prompt, choices = "The sky is " * 12, [" blue because air", " small", "."]
    asked: dict[str, Any] = {"max_tokens": 40, "seed": 3, "ignore_eos": True}
    expected = (
        model.score(prompt, choices),
        model.perplexity(TEXT, context=16),
        [token.logprob for token in model.prompt_logprobs(prompt, top_logprobs=2)][1:],
        model.generate("x", **asked).token_ids,
    )
    with Model(tiny_folder, threads=1) as other, ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # the second time, the prefix cache knows the prompt
            found: list[Future[Any]] = [
                pool.submit(other.score, prompt, choices),
                pool.submit(other.perplexity, TEXT, context=16),
                pool.submit(other.prompt_logprobs, prompt, top_logprobs=2),
                pool.submit(lambda: other.generate("x", **asked)),
            ]
            scores, perplexity, logprobs, answer = (one.result(60) for one in found)
            told = [token.logprob for token in logprobs][1:]
            assert (scores, perplexity, told, answer.token_ids) == expected
        assert other.statistics()["kv_blocks_held"] == 0
