"""From tokens to text: characters, stop strings, reasoning, log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from smolrun.engine.answer import (
    Answer,
    EndEvent,
    Event,
    ReasoningEvent,
    Result,
    TextEvent,
)
from smolrun.engine.sampling import SampledToken, SamplingParameters, sampling_parameters
from smolrun.engine.sequence import Ending, FinishReason, Timings
from smolrun.errors import RequestError
from smolrun.text.tokenizer import Tokenizer
from tests.text.support import byte_tokenizer

WORDS = ["ab", "abc", "cd", "bcd", "STOP", "ST", "OP", "xS", "TOPy"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer(user_defined=["<think>", "</think>"], words=WORDS)


def ids_of(tokenizer: Tokenizer, pieces: Sequence[str | bytes | int]) -> list[int]:
    """Pieces that are tokens become one; others one token per byte."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    ids: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        data = piece.encode() if isinstance(piece, str) else piece
        whole = by_bytes.get(data)
        ids += [whole] if whole is not None else [by_bytes[bytes([byte])] for byte in data]
    return ids


def ending(tokens: int, reason: FinishReason = "length") -> Ending:
    return Ending(reason, 3, 0, tokens, 7, Timings(0, 1, 1, 3, tokens))


def run(
    tokenizer: Tokenizer,
    ids: list[int],
    *,
    prompt: Sequence[int] = (),
    chat: bool = False,
    **arguments: Any,
) -> tuple[list[Event], Result, bool]:
    """Events, result, and whether a stop string ended it before the tokens did."""
    parameters = sampling_parameters(arguments, SamplingParameters(), tokenizer.vocab_size)
    answer = Answer(tokenizer, prompt, parameters, chat=chat)
    events: list[Event] = []
    stopped = False
    pushed = 0
    for token in ids:
        pushed += 1
        more, stopped = answer.push(SampledToken(token, -0.5, ((token, -0.5), (1, -2.0))))
        events += more
        if stopped:
            break
    *more, end = answer.finish(ending(pushed, "stop" if stopped else "length"))
    events += more
    assert isinstance(end, EndEvent)
    texts = [event.text for event in events if isinstance(event, TextEvent)]
    assert all(texts)
    assert "".join(texts) == end.result.text
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningEvent))
    assert reasoning == (end.result.reasoning or "")
    return events, end.result, stopped


@pytest.mark.parametrize("text", ["👍🏽", "中文", "é́", "🇩🇰🇨🇳", "a👨‍👩‍👧b"])
@pytest.mark.parametrize("chat", [False, True])
def test_no_character_is_ever_cut(tokenizer: Tokenizer, text: str, chat: bool) -> None:
    ids = ids_of(tokenizer, [text])
    events, result, _ = run(tokenizer, ids, chat=chat)
    assert result.text == text
    assert not any("\ufffd" in event.text for event in events if isinstance(event, TextEvent))
    for cut in range(1, len(ids)):
        _, result, _ = run(tokenizer, ids[:cut], chat=chat)
        assert result.text == tokenizer.decode(ids[:cut])
        assert result.token_ids == tuple(ids[:cut])


def test_invalid_bytes_do_not_stall(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, [b"\xff", "a", b"\x80", b"\xe4", "b"])
    events, result, _ = run(tokenizer, ids)
    assert result.text == "\ufffda\ufffd\ufffdb"
    assert events[0] == TextEvent("\ufffd")


STOPS: list[tuple[list[str | bytes | int], list[str], str, bool]] = [
    (["a", "STOP", "b"], ["STOP"], "a", True),  # a whole token
    (["a", "ST", "OP", "b"], ["STOP"], "a", True),  # across two
    (["a", "S", "T", "O", "P", "b"], ["STOP"], "a", True),  # across four
    (["xS", "TOPy"], ["STOP"], "x", True),  # starts and ends inside of tokens
    (["STOP", "b"], ["STOP"], "", True),  # at the first token
    (["a", "STOP"], ["STOP"], "a", True),  # at the end
    (["a", "ST"], ["STOP"], "aST", False),  # only its beginning
    (["abc", "d"], ["abcd", "b"], "", True),  # the one that begins first
    (["ab", "cd"], ["cd", "bcd"], "a", True),  # overlapping
    (["ab", "x"], ["ab", "abc"], "", True),  # one begins another
    (["ab"], ["ab", "abc"], "", True),  # ... at the end of the text
    (["x中文"], ["文"], "x中", True),  # bytes
    (["aSTOPb"], ["nothing", "STOP"], "a", True),
]


@pytest.mark.parametrize(("pieces", "stop", "expected", "stopped"), STOPS, ids=str)
@pytest.mark.parametrize("chat", [False, True])
def test_stop_strings(
    tokenizer: Tokenizer,
    pieces: list[str | bytes | int],
    stop: list[str],
    expected: str,
    stopped: bool,
    chat: bool,
) -> None:
    _, result, _ = run(tokenizer, ids_of(tokenizer, pieces), stop=stop, chat=chat)
    assert result.text == expected
    assert result.finish_reason == ("stop" if stopped else "length")


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    im_end = tokenizer.id_of("<|im_end|>")
    assert im_end is not None
    for chat in (False, True):
        _, result, _ = run(tokenizer, ids_of(tokenizer, ["a", im_end, "b"]), chat=chat)
        assert result.text == "ab"


def test_reasoning_apart_from_the_answer(tokenizer: Tokenizer) -> None:
    opened, closed = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    assert opened is not None
    assert closed is not None
    generated = ids_of(tokenizer, [opened, "\nwhy STOP\n", closed, "\nso", "STOP"])
    _, result, _ = run(tokenizer, generated, chat=True, stop=["STOP"])
    assert (result.reasoning, result.text) == ("why STOP", "so")
    assert result.usage.reasoning_tokens == len(ids_of(tokenizer, ["\nwhy STOP\n"])) + 2
    _, result, _ = run(tokenizer, generated[1:], prompt=[opened], chat=True)
    assert (result.reasoning, result.text) == ("why STOP", "soSTOP")
    _, result, _ = run(tokenizer, ids_of(tokenizer, ["so"]), prompt=[opened, closed], chat=True)
    assert (result.reasoning, result.text) == (None, "so")
    _, result, _ = run(tokenizer, generated, chat=False)
    assert result.reasoning is None
    assert result.text == "<think>\nwhy STOP\n</think>\nsoSTOP"


def test_logprobs_cover_every_token(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, ["ab", "中", "x"])
    _, result, _ = run(tokenizer, ids, logprobs=True, top_logprobs=2)
    assert result.logprobs is not None
    assert b"".join(token.bytes for token in result.logprobs) == "ab中x".encode()
    first = result.logprobs[0]
    assert (first.id, first.text, first.logprob) == (ids[0], "ab", -0.5)
    assert [(other.id, other.logprob) for other in first.top] == [(ids[0], -0.5), (1, -2.0)]
    assert run(tokenizer, ids)[1].logprobs is None


def test_logprobs_come_with_the_text_of_their_tokens(tokenizer: Tokenizer) -> None:
    opened, closed = tokenizer.id_of("<think>"), tokenizer.id_of("</think>")
    assert opened is not None
    assert closed is not None
    pieces: list[str | bytes | int] = [
        opened,
        "\n",
        "ab",
        "中\n",
        closed,
        "\n",
        "\n",
        "so\n",
        "STOP",
    ]
    events, result, _ = run(tokenizer, ids_of(tokenizer, pieces), chat=True, logprobs=True)
    told: dict[type, bytes] = {ReasoningEvent: b"", TextEvent: b""}
    for event in events:
        if isinstance(event, (ReasoningEvent, TextEvent)):
            assert event.logprobs
            told[type(event)] += b"".join(token.bytes for token in event.logprobs)
    assert told == {ReasoningEvent: "ab中".encode(), TextEvent: result.text.encode()}
    assert not any(getattr(event, "logprobs", ()) for event in run(tokenizer, [5, 6])[0])


def test_without_a_tokenizer() -> None:
    answer = Answer(None, [1], SamplingParameters(), chat=False)
    assert answer.push(SampledToken(5)) == ([], False)
    (end,) = answer.finish(ending(1))
    assert isinstance(end, EndEvent)
    assert (end.result.text, end.result.token_ids) == ("", (5,))
    with pytest.raises(RequestError, match="^stop: "):
        Answer(None, [1], SamplingParameters(stop=("x",)), chat=False)


def test_results_are_plain_data(tokenizer: Tokenizer) -> None:
    _, result, _ = run(tokenizer, ids_of(tokenizer, ["ab"]), logprobs=True, top_logprobs=2)
    assert dataclasses.asdict(result)["usage"]["completion_tokens"] == 1
    assert str(result) == "ab"
    assert result.usage.total_tokens == 4
