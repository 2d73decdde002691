"""Reasoning and answer are told apart, by token ids where the tags are tokens, else by text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.text.thinking import ReasoningParser
from smolrun.text.tokenizer import Tokenizer

from .support import byte_tokenizer

BY_ID = byte_tokenizer(user_defined=["<think>", "</think>"])
BY_TEXT = byte_tokenizer()
TURN = "<|im_start|>assistant\n"


def run(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> tuple[str, str, ReasoningParser]:
    parser = ReasoningParser(tokenizer, prompt)
    pieces = [*map(parser.push, ids), parser.flush()]
    reasoning = "".join(piece.reasoning for piece in pieces)
    return reasoning, "".join(piece.text for piece in pieces), parser


@pytest.mark.parametrize("tokenizer", [BY_ID, BY_TEXT], ids=["ids", "text"])
@pytest.mark.parametrize(
    ("prompt", "generated", "reasoning", "text"),
    [
        (TURN, "<think>\nhm\n</think>\n\nHello\n", "hm", "Hello\n"),
        (TURN, "<think>hm</think>Hello", "hm", "Hello"),
        (TURN, "<think>\n\n\n</think>Hello", "", "Hello"),
        (TURN, "<think>\n a\n\nb \n\n</think>\n Hello", " a\n\nb ", " Hello"),
        (TURN, "\n<think>hm</think>Hello", "hm", "Hello"),
        (TURN, "Hello", "", "Hello"),
        (TURN, "\n\nHello", "", "\n\nHello"),
        (TURN, "\n", "", "\n"),
        (TURN, "", "", ""),
        (TURN, "<th", "", "<th"),
        (TURN, "<thing>", "", "<thing>"),
        (TURN, "<think>never closed\n", "never closed", ""),
        (TURN, "<think>a </thin", "a </thin", ""),
        (TURN, "<think>a\n</thi b</think>c", "a\n</thi b", "c"),
        (TURN, "<think>a</think>b\n</think", "a", "b\n</think"),
        (TURN + "<think>", "\nhm\n</think>\nHello", "hm", "Hello"),
        (TURN + "<think>\n", "hm</think>Hello", "hm", "Hello"),
        (TURN + "<think>\nFirst,", "\nhm</think>Hello", "\nhm", "Hello"),
        (TURN + "<think>\n\n</think>\n", "Hello", "", "Hello"),
        (TURN + "<think>\n\n</think>\n", "\n\nHello\n", "", "Hello\n"),
        # Blocks of earlier turns do not matter.
        ("<|im_start|>user\n<think><|im_end|>\n" + TURN, "Hello", "", "Hello"),
        (TURN + "<think>a</think>b<|im_end|>\n" + TURN, "<think>c</think>d", "c", "d"),
    ],
)
def test_splitting(
    tokenizer: Tokenizer, prompt: str, generated: str, reasoning: str, text: str
) -> None:
    found = run(tokenizer, prompt, tokenizer.encode(generated))
    assert found[:2] == (reasoning, text)
    ids = tokenizer.encode(prompt)
    parser = ReasoningParser(tokenizer, ids)
    assert parser.in_reasoning == ReasoningParser(tokenizer, prompt).in_reasoning


def test_start_states() -> None:
    for tokenizer in (BY_ID, BY_TEXT):
        assert ReasoningParser(tokenizer, TURN + "<think>\n").in_reasoning
        assert not ReasoningParser(tokenizer, TURN + "<think>\n\n</think>\n").in_reasoning
        assert not ReasoningParser(tokenizer, TURN).in_reasoning
        assert not ReasoningParser(tokenizer, []).in_reasoning


def test_text_that_spells_a_tag_is_no_tag_where_tags_are_tokens() -> None:
    spelled = BY_TEXT.encode("<think>a</think>b")  # the bytes one by one
    ids = [token_id + 2 for token_id in spelled]  # two more tokens stand before the bytes
    assert run(BY_ID, TURN, ids)[:2] == ("", "<think>a</think>b")
    opened = BY_ID.id_of("<think>")
    assert opened is not None
    assert run(BY_ID, TURN, [opened, *ids])[:2] == ("<think>a</think>b", "")


def test_a_close_tag_with_nothing_open_is_dropped() -> None:
    assert run(BY_ID, TURN + "<think></think>", BY_ID.encode("a</think>\nb"))[:2] == ("", "a\nb")


def test_later_tags_in_text_are_text() -> None:
    generated = "a<think>b</think>"
    assert run(BY_TEXT, TURN, BY_TEXT.encode(generated))[:2] == ("", generated)


def test_a_second_block_by_token_is_reasoning_again() -> None:
    ids = BY_ID.encode("<think>a</think>b<think>c</think>d")
    assert run(BY_ID, TURN, ids)[:2] == ("ac", "bd")


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "generated", "count"),
    [
        (BY_ID, TURN, "<think>abc</think>xy", 5),
        (BY_ID, TURN, "xy", 0),
        (BY_ID, TURN + "<think>", "abc</think>xy", 4),
        (BY_ID, TURN, "<think>abc", 4),
        (BY_ID, TURN, "\n<think>abc", 5),
        (BY_TEXT, TURN, "<think>abc</think>xy", 18),
        (BY_TEXT, TURN, "xy", 0),
        (BY_TEXT, TURN, "<thxy", 0),
    ],
)
def test_reasoning_tokens(tokenizer: Tokenizer, prompt: str, generated: str, count: int) -> None:
    assert run(tokenizer, prompt, tokenizer.encode(generated))[2].reasoning_tokens == count


def test_control_tokens_and_cut_characters() -> None:
    ids = BY_ID.encode("<think>é")
    ids = [*ids[:-1], *BY_ID.encode("</think>ü<|im_end|>")]
    assert run(BY_ID, TURN, ids)[:2] == ("\ufffd", "ü")


@settings(max_examples=300)
@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "</thi", "\n", "é", "a", " "])),
    by_id=st.booleans(),
)
def test_nothing_but_tags_and_line_breaks_is_lost(parts: list[str], by_id: bool) -> None:
    tokenizer = BY_ID if by_id else BY_TEXT
    reasoning, text, parser = run(tokenizer, TURN, tokenizer.encode("".join(parts)))
    kept = "".join(parts).replace("<think>", "").replace("</think>", "")
    plain = (reasoning + text).replace("<think>", "").replace("</think>", "")
    # Reasoning may come again after text, so the order of the two is not that of the stream.
    assert sorted("".join(plain.split())) == sorted("".join(kept.split()))
    assert not reasoning or parser.reasoning_tokens > 0
