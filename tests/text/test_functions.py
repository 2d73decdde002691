"""Python functions as tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from smolrun.errors import RequestError
from smolrun.text.functions import function_tool
from smolrun.text.tool_calls import as_tools, tool_plan


def get_weather(
    city: str,
    days: int = 1,
    unit: Literal["c", "f"] = "c",
    places: list[float] | None = None,
    extra: dict[str, bool] | None = None,
) -> str:
    """The weather of a city,
    as it will be.

    Args:
        city: its name,
            in English: or not.
        days (int, optional): how many.
        unit: of temperatures.

    Returns:
        city: a text.
    """
    return ""


def test_signature_and_docstring() -> None:
    assert function_tool(get_weather) == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, as it will be.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name, in English: or not."},
                    "days": {"type": "integer", "description": "how many."},
                    "unit": {"enum": ["c", "f"], "description": "of temperatures."},
                    "places": {
                        "anyOf": [
                            {"type": "array", "items": {"type": "number"}},
                            {"type": "null"},
                        ]
                    },
                    "extra": {
                        "anyOf": [
                            {"type": "object", "additionalProperties": {"type": "boolean"}},
                            {"type": "null"},
                        ]
                    },
                },
                "required": ["city"],
            },
        },
    }


def test_it_is_a_tool_like_others() -> None:
    tools = as_tools([get_weather, {"name": "clock"}])
    plan = tool_plan(tools, "get_weather")
    assert plan is not None
    assert plan.tools["get_weather"]["additionalProperties"] is False
    assert as_tools(None) is None


def bare(x, y: Any): ...  # type: ignore[no-untyped-def]


def test_what_is_not_said_is_anything() -> None:
    found = function_tool(bare)["function"]
    assert found["parameters"]["properties"] == {"x": {}, "y": {}}
    assert found["description"] == ""


def variable(*cities: str) -> None: ...
def named(**cities: str) -> None: ...
def placed(city: str, /) -> None: ...
def strange(when: Callable[[], int]) -> None: ...
def missing(when: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (variable, "tools: variable: .*needs a name"),
        (named, "tools: named: .*needs a name"),
        (placed, "tools: placed: city: it can not be given by name"),
        (strange, "tools: strange: when: no JSON Schema stands for"),
        (missing, "tools: missing: its signature can not be read"),
    ],
)
def test_what_no_schema_can_say_is_refused(function: Any, message: str) -> None:
    with pytest.raises(RequestError, match="^" + message):
        function_tool(function)


@pytest.mark.parametrize("tools", [5, "x", {"name": "clock"}, {1}])
def test_tools_are_a_list(tools: Any) -> None:
    with pytest.raises(RequestError, match="^tools: expected a list"):
        as_tools(tools)
