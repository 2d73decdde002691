"""Tool calls as the models of the family write them.

SmolLM3 writes each call as one JSON object between `<tool_call>` and `</tool_call>`, or as Python
between `<code>` and `</code>`; SmolLM2 writes one JSON list of all calls.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smolrun.errors import RequestError

ToolCallStyle = Literal["objects", "list", "code"]
TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<tool_call>", "</tool_call>"
CODE_OPEN, CODE_CLOSE = "<code>", "</code>"


@dataclass(frozen=True)
class ToolCall:
    """One call: the function's name and its arguments by name."""

    name: str
    arguments: Mapping[str, object]
    id: str | None = None
    arguments_json: str | None = None  # the arguments as the model wrote them


def read_tool_call(value: object, field: str) -> ToolCall:
    """A call of a past message, as `{"function": {"name", "arguments"}}` or without the wrapper.

    Args:
        value: the call; its arguments are an object, or the JSON text of one.
        field: where it stands, for error messages.

    Raises:
        RequestError: naming `field` and what is wrong.
    """
    if not isinstance(value, Mapping):
        raise RequestError(f"{field}: expected an object, found {type(value).__name__}")
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        raise RequestError(f"{field}.function: expected an object, found {type(function).__name__}")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{field}: expected the function's name as text, found {name!r}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{field}: the arguments are not JSON: {error}") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"{field}: expected the arguments as an object, found {type(arguments).__name__}"
        )
    call_id = value.get("id")
    return ToolCall(name, arguments, call_id if isinstance(call_id, str) else None)


def write_tool_calls(calls: Sequence[ToolCall], style: ToolCallStyle) -> str:
    """The text by which the model itself would have made these calls."""
    if style == "code":
        lines = "".join(f"{_code(call)}\n" for call in calls)
        return f"{CODE_OPEN}\n{lines}{CODE_CLOSE}"
    values = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if style == "list":
        return f"{TOOL_CALL_OPEN}{_json(values)}{TOOL_CALL_CLOSE}"
    return "\n".join(f"{TOOL_CALL_OPEN}\n{_json(value)}\n{TOOL_CALL_CLOSE}" for value in values)


def _code(call: ToolCall) -> str:
    arguments = dict(call.arguments)
    if all(name.isidentifier() and not keyword.iskeyword(name) for name in arguments):
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    else:
        given = f"**{arguments!r}"
    return f"{call.name}({given})"


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"tool_calls: the arguments can not be written as JSON: {error}"
        ) from None
