"""Chat messages as users give them, made into what chat templates expect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smolrun.errors import RequestError
from smolrun.text.tools import ToolCallStyle, read_tool_call, write_tool_calls

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}
_FIELDS = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content"}
)
# Clients send an answer back as they received it; these fields of answers say nothing to a model.
_IGNORED = frozenset({"refusal", "annotations"})

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class MessageStyle:
    """What a template does by itself, and what must be written into the content for it.

    Attributes:
        reads_tool_calls: the template renders `tool_calls` of past messages itself.
        tool_calls: how past calls are written into the content otherwise.
        code: names of tools whose past calls are written as code whatever the others are.
        thinks: the model reasons, so `</think>` in an answer ends its reasoning.
    """

    reads_tool_calls: bool = False
    tool_calls: ToolCallStyle = "objects"
    code: frozenset[str] = frozenset()
    thinks: bool = False


def normalize_messages(
    messages: object, style: MessageStyle, *, keep_reasoning: bool = False
) -> list[dict[str, object]]:
    """Checked copies of the messages, with text as content.

    Lists of text parts are joined, `developer` becomes `system`, past tool calls are written into
    the content, and the reasoning of past answers is dropped: the text after its last close tag
    stays. With `keep_reasoning` it stays, or is put back from the field `reasoning`.

    Raises:
        RequestError: naming the field and the message's index.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages: expected a list of messages, found {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("messages: expected at least one message, found none")
    return [
        _normalize(message, f"messages[{index}]", style, keep_reasoning)
        for index, message in enumerate(messages)
    ]


def _normalize(
    message: object, field: str, style: MessageStyle, keep_reasoning: bool
) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{field}: expected an object, found {type(message).__name__}")
    for name, value in message.items():
        if name not in _FIELDS and name not in _IGNORED and value is not None:
            raise RequestError(f"{field}.{name}: unknown field; known are {sorted(_FIELDS)}")
    given = message.get("role")
    role = _ALIASES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise RequestError(f"{field}.role: expected one of {', '.join(ROLES)}, found {given!r}")
    calls = message.get("tool_calls")
    if calls is not None and (isinstance(calls, (str, bytes)) or not isinstance(calls, Sequence)):
        raise RequestError(f"{field}.tool_calls: expected a list, found {type(calls).__name__}")
    if calls and role != "assistant":
        raise RequestError(f"{field}.tool_calls: only an assistant calls tools, not {role!r}")
    content = _content(message.get("content"), f"{field}.content", optional=bool(calls))
    made: dict[str, object] = {"role": role}
    for name in ("name", "tool_call_id"):
        value = message.get(name)
        if value is not None:
            made[name] = _text(value, f"{field}.{name}")
    if role == "assistant":
        reasoning = _reasoning(message, field)
        if keep_reasoning:
            if reasoning and THINK_CLOSE not in content:
                content = f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{content}"
        elif style.thinks or content.lstrip().startswith(THINK_OPEN):
            content = strip_reasoning(content)
    if calls:
        read = [read_tool_call(c, f"{field}.tool_calls[{i}]") for i, c in enumerate(calls)]
        if style.reads_tool_calls:
            made["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.name, "arguments": dict(call.arguments)},
                }
                for call in read
            ]
        else:
            runs = itertools.groupby(
                read, lambda call: "code" if call.name in style.code else style.tool_calls
            )
            written = "\n".join(write_tool_calls(list(run), how) for how, run in runs)
            content = f"{content}\n{written}" if content else written
    made["content"] = content
    return made


def strip_reasoning(content: str) -> str:
    """An answer without its reasoning, also where that was cut off before its close tag."""
    before, close, after = content.rpartition(THINK_CLOSE)
    if close:
        return after.lstrip("\n")
    return "" if content.lstrip().startswith(THINK_OPEN) else content


def _reasoning(message: Mapping[str, object], field: str) -> str:
    for name in ("reasoning_content", "reasoning"):
        value = message.get(name)
        if value is not None:
            return _text(value, f"{field}.{name}").strip("\n")
    return ""


def _content(value: object, field: str, *, optional: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        if optional:
            return ""
        raise RequestError(f"{field}: expected text, found nothing")
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(
            f"{field}: expected text or a list of text parts, found {type(value).__name__}"
        )
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise RequestError(
                f"{field}[{index}]: expected a text part, found {type(part).__name__}"
            )
        if part.get("type") != "text":
            raise RequestError(
                f"{field}[{index}].type: expected 'text', found {part.get('type')!r}; "
                "these models read text only"
            )
        texts.append(_text(part.get("text"), f"{field}[{index}].text"))
    return "".join(texts)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{field}: expected text, found {type(value).__name__}")
    return value
