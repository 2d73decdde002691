"""One setting behind think, thinking_budget and reasoning_effort."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.errors import RequestError
from smolrun.text.thinking import EFFORT_BUDGETS, Thinking, thinking_of

SETTINGS: list[tuple[dict[str, Any], Thinking]] = [
    ({}, Thinking(None)),
    ({"think": True}, Thinking(True)),
    ({"think": False}, Thinking(False)),
    ({"thinking_budget": 0}, Thinking(False)),
    ({"thinking_budget": 0, "think": False, "reasoning_effort": "none"}, Thinking(False)),
    ({"thinking_budget": 7}, Thinking(True, True, 7)),
    ({"thinking_budget": 7, "think": True}, Thinking(True, True, 7)),
    ({"thinking_budget": -1}, Thinking(True, True, None)),
    ({"reasoning_effort": "none"}, Thinking(False)),
    ({"reasoning_effort": "low"}, Thinking(True, True, EFFORT_BUDGETS["low"])),
    ({"reasoning_effort": "high", "think": True}, Thinking(True, True, None)),
    ({"reasoning_effort": "high", "thinking_budget": -1}, Thinking(True, True, None)),
]


@pytest.mark.parametrize(("arguments", "expected"), SETTINGS, ids=str)
def test_they_are_one_setting(arguments: dict[str, Any], expected: Thinking) -> None:
    assert thinking_of(**arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"think": 1}, "think"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"thinking_budget": 2**31}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"thinking_budget": 1.0}, "thinking_budget"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"think": False, "thinking_budget": 5}, "think and thinking_budget"),
        ({"think": True, "thinking_budget": 0}, "think and thinking_budget"),
        ({"think": True, "reasoning_effort": "none"}, "think and reasoning_effort"),
        ({"thinking_budget": 9, "reasoning_effort": "none"}, "thinking_budget and reasoning"),
        ({"thinking_budget": 9, "reasoning_effort": "low"}, "thinking_budget and reasoning"),
    ],
    ids=str,
)
def test_what_is_wrong_or_contradicts_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=f"^{named}"):
        thinking_of(**arguments)
