"""Budgets of reasoning: where it ends, who ended it, and that an answer always follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun.engine.answer import Answer, EndEvent, Result
from smolrun.engine.engine import Engine
from smolrun.engine.guide import ChatGuide
from smolrun.engine.runner import Float32Array
from smolrun.engine.sampling import SamplingParameters, sampling_parameters
from smolrun.engine.thinking import (
    LOOP_TOKENS,
    RepetitionFinder,
    ThinkingLimiter,
    tokens_for_thinking,
)
from smolrun.text.tokenizer import Tokenizer
from tests.text.support import byte_tokenizer

from .fakes import FakeRunner

BY_ID = byte_tokenizer(user_defined=["<think>", "</think>"])
BY_TEXT = byte_tokenizer()
CONTEXT = 512
TURN = "<|im_start|>assistant\n"
Logits = Callable[[npt.NDArray[np.int64], Float32Array], None]


class Speaker(FakeRunner):
    """Prefers what `wish` raises; a little noise decides among the rest."""

    def __init__(self, tokenizer: Tokenizer, wish: Logits) -> None:
        super().__init__(64, tokenizer.vocab_size)
        self.wish = wish

    def logits_of(self, tokens: npt.NDArray[np.int64]) -> Float32Array:
        logits = super().logits_of(tokens)
        self.wish(tokens, logits)
        return logits


def answer(
    tokenizer: Tokenizer,
    wish: Logits,
    budget: int | None,
    *,
    prompt: str = TURN,
    **arguments: Any,
) -> Result:
    ids = tokenizer.encode(prompt)
    parameters = sampling_parameters(arguments, SamplingParameters(), tokenizer.vocab_size)
    room = min(parameters.max_tokens or CONTEXT, CONTEXT - len(ids))
    stops = tokenizer.stop_ids()
    limiter = ThinkingLimiter(tokenizer, tokens_for_thinking(budget, room), stops)
    guide = ChatGuide(tokenizer, ids, limiter, None)
    output = Answer(tokenizer, ids, parameters, chat=True, guide=guide)
    engine = Engine(
        Speaker(tokenizer, wish),
        vocab_size=tokenizer.vocab_size,
        hidden_size=1,
        context_size=CONTEXT,
        kv_blocks=64,
    )
    try:
        *_, end = engine.submit(ids, parameters, output, stop_ids=stops, constraint=guide)
    finally:
        engine.close()
    assert isinstance(end, EndEvent)
    return end.result


def words(tokenizer: Tokenizer, text: str, *, then: Sequence[str] = ()) -> Logits:
    """Thinks `text` over and over and never closes; after a close tag it says `then`."""
    begun = len(tokenizer.encode(TURN))

    def wish(tokens: npt.NDArray[np.int64], logits: Float32Array) -> None:
        said = tokenizer.decode(tokens[begun:].tolist())
        if "</think>" in said:
            rest = "".join(then)[len(said.partition("</think>")[2]) :]
        else:
            full = "<think>" + text * CONTEXT
            rest = full[len(said) :]
        if rest:
            logits[tokenizer.encode(rest[:32])[0]] += 50

    return wish


SENTENCES = [f"Now {a}{b}{c}." for a in "abcdef" for b in "mnopq" for c in "xyz"]
THOUGHTS = " ".join(SENTENCES)
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "seed": 5},
    {"temperature": 1, "seed": 6, "top_p": 0.5, "top_k": 20},
]
BOTH = pytest.mark.parametrize("tokenizer", [BY_ID, BY_TEXT], ids=["ids", "text"])


@BOTH
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("budget", [20, 40, 64, 100, 200])
def test_a_budget_lands_and_an_answer_follows(
    tokenizer: Tokenizer, budget: int, setting: dict[str, Any]
) -> None:
    result = answer(
        tokenizer, words(tokenizer, THOUGHTS, then="So."), budget, max_tokens=300, **setting
    )
    assert result.usage.reasoning_tokens <= budget
    assert result.thinking_stopped_by == "budget"
    assert result.reasoning
    assert result.text.startswith("So.")


@BOTH
def test_it_lands_on_the_end_of_a_sentence_where_there_is_one(tokenizer: Tokenizer) -> None:
    for budget in range(100, 170, 7):
        result = answer(
            tokenizer, words(tokenizer, THOUGHTS), budget, max_tokens=300, temperature=0
        )
        assert result.reasoning is not None
        assert result.reasoning.rstrip().endswith(".")
        assert result.thinking_stopped_by == "budget"
        assert budget * 0.75 <= result.usage.reasoning_tokens <= budget


def test_without_ends_of_sentences_it_uses_the_whole_budget() -> None:
    result = answer(
        BY_ID,
        words(BY_ID, "".join(map(chr, range(0x4E00, 0x4E80)))),
        60,
        max_tokens=100,
        temperature=0,
    )
    assert result.usage.reasoning_tokens == 60


@BOTH
def test_a_model_that_closes_by_itself_is_left_alone(tokenizer: Tokenizer) -> None:
    spoken = "<think>Well. Hm.</think>Yes. No."
    prompt = len(tokenizer.encode(TURN))

    def wish(tokens: npt.NDArray[np.int64], logits: Float32Array) -> None:
        said = tokenizer.decode(tokens[prompt:].tolist())
        rest = spoken[len(said) :] or "<|im_end|>"
        logits[tokenizer.encode(rest)[0]] += 50

    result = answer(tokenizer, wish, 200, temperature=0)
    assert (result.reasoning, result.text) == ("Well. Hm.", "Yes. No.")
    assert (result.thinking_stopped_by, result.finish_reason) == ("model", "stop")


@pytest.mark.parametrize("passage", ["!", "ab", "Wait, no. ", "12345 and then again, 0123456789, "])
def test_a_loop_is_broken(passage: str) -> None:
    wish = words(BY_ID, passage, then="So.")
    result = answer(BY_ID, wish, None, max_tokens=400, temperature=0)
    assert result.thinking_stopped_by == "loop"
    assert result.usage.reasoning_tokens < max(LOOP_TOKENS, 4 * len(passage)) + len(passage) + 3
    assert result.text.startswith("So.")


def test_what_varies_is_no_loop() -> None:
    for text in (THOUGHTS, "0123456789" * 3 + "abc", "".join(f"\n{n}. so" for n in range(99))):
        finder = RepetitionFinder()
        assert not any(finder.push(byte) for byte in text.encode())


@pytest.mark.parametrize("period", [1, 2, 7, 40, 256])
def test_loops_of_every_length_are_found_when_they_are_complete(period: int) -> None:
    finder = RepetitionFinder()
    passage = np.random.default_rng(period).permutation(1000)[:period].tolist()
    assert not any(finder.push(token) for token in (2000, 2001, 2002))
    found = [finder.push(token) for token in passage * (4 + 64 // period)]
    assert found.index(True) + 1 == max(4 * period, 64)


@BOTH
def test_no_answer_is_empty(tokenizer: Tokenizer) -> None:
    """Not of a model that always wants to end, or to close, or to say nothing."""
    eos = tokenizer.id_of("<|im_end|>")
    blank, newline = tokenizer.encode(" ")[0], tokenizer.encode("\n")[0]
    close = tokenizer.encode("</think>")[0]
    for favourites in ([eos], [close, eos], [blank], [newline, eos], [close, blank, newline, eos]):

        def wish(
            tokens: npt.NDArray[np.int64],
            logits: Float32Array,
            favourites: list[Any] = favourites,
        ) -> None:
            for place, token in enumerate(favourites):
                logits[token] += 90 - 10 * place

        for prompt in (TURN, TURN + "<think>\n"):
            for budget in (1, 9, 30):
                result = answer(
                    tokenizer, wish, budget, prompt=prompt, max_tokens=60, temperature=0
                )
                assert (result.text + (result.reasoning or "")).strip()
                if result.thinking_stopped_by:
                    assert result.text.strip()


@pytest.mark.parametrize("max_tokens", range(1, 24))
def test_room_for_the_answer_is_kept_out_of_max_tokens(max_tokens: int) -> None:
    wish = words(BY_ID, THOUGHTS, then="So it is, and so it stays.")
    result = answer(BY_ID, wish, None, max_tokens=max_tokens, temperature=0)
    assert result.usage.completion_tokens == max_tokens
    assert result.text.strip()


def test_the_room_that_is_kept() -> None:
    assert tokens_for_thinking(None, 10_000) == 10_000 - 256
    assert tokens_for_thinking(2000, 10_000) == 2000
    assert tokens_for_thinking(100, 100) == 75
    assert tokens_for_thinking(None, 8) == 4
    assert tokens_for_thinking(None, 3) == 0


def test_a_model_that_wants_to_end_inside_of_its_reasoning_closes_it() -> None:
    spoken = "<think>Hm"
    eos = BY_ID.id_of("<|im_end|>")
    prompt = len(BY_ID.encode(TURN))

    def wish(tokens: npt.NDArray[np.int64], logits: Float32Array) -> None:
        said = BY_ID.decode(tokens[prompt:].tolist())
        if said.startswith("<think>Hm</think>"):
            logits[ord("y") - ord("!") + 5] += 50
        else:
            rest = spoken[len(said) :]
            logits[BY_ID.encode(rest)[0] if rest else eos] += 50

    result = answer(BY_ID, wish, 100, max_tokens=200, temperature=0)
    assert (result.reasoning, result.thinking_stopped_by) == ("Hm", "model")
    assert result.text.startswith("yyy")


def test_a_repeated_close_tag_is_swallowed_without_a_limit_too() -> None:
    for tokenizer in (BY_ID, BY_TEXT):
        output = Answer(tokenizer, [], SamplingParameters(), chat=True)
        from smolrun.engine.sampling import SampledToken
        from smolrun.engine.sequence import Ending, Timings

        for token in tokenizer.encode("<think>a</think>\n</think>\n\n</think>b</"):
            output.push(SampledToken(token))
        *_, end = output.finish(Ending("stop", 1, 0, 9, 0, Timings(0, 0, 0, 1, 9)))
        assert isinstance(end, EndEvent)
        assert (end.result.reasoning, end.result.text) == ("a", "b</")
        assert end.result.thinking_stopped_by == "model"
