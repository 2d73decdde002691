"""Stop strings: the earliest in the whole text wins, however the text is cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import RequestError
from smolrun.text.stop import StopStrings


def stream(strings: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stop = StopStrings(strings)
    emitted = []
    for piece in pieces:
        text, stopped = stop.push(piece)
        emitted.append(text)
        if stopped:
            return emitted, True
    text, stopped = stop.flush()
    return [*emitted, text], stopped


@pytest.mark.parametrize(
    ("strings", "pieces", "text", "stopped"),
    [
        (["STOP"], ["a ", "STOP", " b"], "a ", True),  # a whole token
        (["STOP"], ["a S", "TOP b"], "a ", True),  # across two
        (["STOP"], ["a", "S", "T", "O", "P"], "a", True),  # across five
        (["STOP"], ["abcST", "OPdef"], "abc", True),  # starting in a token
        (["STOP"], ["abcSTOPdef"], "abc", True),  # inside of a token
        (["ab", "abc"], ["xab", "c"], "x", True),  # one is a prefix of another
        (["abc", "ab"], ["xabd"], "x", True),
        (["bcd", "cx"], ["abc", "x"], "ab", True),  # overlapping
        (["abcd", "c"], ["xabc", "d"], "x", True),  # the longer one begins earlier
        (["abcd", "c"], ["xabc", "e"], "xab", True),  # ... or not after all
        (["abcd", "c"], ["xabc"], "xab", True),
        (["aab"], ["aaaab"], "aa", True),
        (["停止"], ["中文", "停", "止了"], "中文", True),  # multibyte
        (["\U0001f44d"], ["a\U0001f44e\U0001f44d"], "a\U0001f44e", True),
        (["STOP"], ["STOP"], "", True),  # at the first token
        (["STOP"], ["text", "ST", "OP"], "text", True),  # equal to the end
        (["STOP"], ["text", "STO"], "textSTO", False),  # only begun
        (["STOP"], ["STSTO", "P"], "ST", True),
        (["\n\n"], ["a\n", "\nb"], "a", True),
        (["a", "b"], ["xxb", "a"], "xx", True),
        ([], ["a", "b"], "ab", False),
    ],
)
def test_table(strings: list[str], pieces: list[str], text: str, stopped: bool) -> None:
    emitted, found = stream(strings, pieces)
    assert ("".join(emitted), found) == (text, stopped)


@settings(max_examples=500)
@given(
    strings=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    pieces=st.lists(st.text("abcd", max_size=4), max_size=12),
)
def test_pieces_do_not_matter(strings: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    places = [place for place in map(whole.find, strings) if place >= 0]
    emitted, stopped = stream(strings, pieces)
    if stopped:
        # It may stop before all pieces have come, never elsewhere than over the whole text.
        assert places
        assert "".join(emitted) == whole[: min(places)]
    else:
        assert not places
        assert "".join(emitted) == whole


def test_text_is_not_held_back_without_need() -> None:
    stop = StopStrings(["STOP"])
    assert stop.push("Hello S") == ("Hello ", False)
    assert stop.push("un") == ("Sun", False)
    assert stop.push("STOP") == ("", True)
    assert stop.stopped
    assert stop.push("more") == ("", True)
    assert stop.flush() == ("", True)


def test_one_string_and_none() -> None:
    assert StopStrings("ab").push("xaby") == ("x", True)
    assert StopStrings(None).push("x") == ("x", False)


@pytest.mark.parametrize(
    ("strings", "named"),
    [
        ([""], r"stop\[0\]"),
        ("", "stop"),
        (["a", 7], r"stop\[1\].*int"),
        (7, "stop"),
        ({"a": 1}, "stop"),
        (["a"] * 65, "at most 64"),
        (["a" * 1025], r"stop\[0\]"),
    ],
)
def test_bad_stop_strings(strings: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        StopStrings(strings)
