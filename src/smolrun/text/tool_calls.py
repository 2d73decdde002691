"""Calls of tools in what a model writes: the grammar that they follow, and their parser."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolrun.errors import RequestError
from smolrun.text.functions import function_tool
from smolrun.text.structure import LINE_OPTIONS, Structure, json_part, quoted
from smolrun.text.tools import (
    CODE_CLOSE,
    CODE_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    ToolCall,
    ToolCallStyle,
)

if TYPE_CHECKING:
    from smolrun.text.grammar import GrammarCompiler, Matcher
    from smolrun.text.tokenizer import Tokenizer

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class ToolPlan:
    """Which tools an answer may call, and whether it must."""

    tools: Mapping[str, Any]  # name: JSON Schema of its arguments
    required: bool
    parallel: bool  # several calls in one answer


def as_tools(tools: Any) -> list[Any] | None:
    """Tools, with Python functions among them as objects. Errors as of `function_tool`."""
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError(f"tools: expected a list of tools, found {type(tools).__name__}")
    return [function_tool(tool) if callable(tool) else tool for tool in tools]


def described_tools(tools: Any) -> list[Any] | None:
    """`xml_tools` of a template's arguments where all are objects that describe a function."""
    if not isinstance(tools, list):
        return None
    try:
        names = {_definition(tool, "xml_tools")[0] for tool in tools}
    except RequestError:
        return None
    return tools if len(names) == len(tools) else None


def tool_plan(
    tools: Sequence[Mapping[str, Any]] | None, choice: Any = None, parallel: Any = None
) -> ToolPlan | None:
    """What `tools`, `tool_choice` and `parallel_tool_calls` come to; None: no tool is called.

    Args:
        tools: functions with JSON Schemas, in OpenAI's wrapper or without it.
        choice: "auto", "none", "required", the name of a tool, or OpenAI's object that names one.
        parallel: whether one answer may make several calls; None: yes.

    Raises:
        RequestError: naming what is wrong.
    """
    if parallel is not None and not isinstance(parallel, bool):
        raise RequestError(f"parallel_tool_calls: expected True or False, got {parallel!r:.80}")
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(choice, str):
            raise RequestError("tool_choice: expected the name of a function in the object")
    elif choice is not None and not isinstance(choice, str):
        raise RequestError(f"tool_choice: expected a text, got {choice!r:.80}")
    if not tools:
        if choice not in (None, "auto", "none"):
            raise RequestError(f"tool_choice: {choice!r:.80} needs tools, there are none")
        return None
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: at most {MAX_TOOLS}, got {len(tools)}")
    found: dict[str, Any] = {}
    for index, tool in enumerate(tools):
        name, parameters = _definition(tool, f"tools[{index}]")
        if name in found:
            raise RequestError(f"tools[{index}]: a second tool named {name!r}")
        found[name] = parameters
    if choice == "none":
        return None
    several = parallel is not False
    if choice in (None, "auto", "required"):
        return ToolPlan(found, choice == "required", several)
    if choice not in found:
        raise RequestError(
            f"tool_choice: expected auto, none, required or the name of a tool "
            f"({', '.join(found):.200}), got {choice!r:.80}"
        )
    return ToolPlan({choice: found[choice]}, True, several)


def _definition(tool: Any, field: str) -> tuple[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{field}: expected an object, found {type(tool).__name__}")
    function = tool.get("function", tool)
    if function is not tool:
        field += ".function"
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.match(name):
        raise RequestError(
            f"{field}.name: expected up to 64 letters, digits, _, . and -, got {name!r:.80}"
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise RequestError(
            f"{field}.parameters: expected a JSON Schema, found {type(parameters).__name__}"
        )
    if parameters.get("type") == "object":  # what a schema does not name is no argument
        parameters = {"additionalProperties": False, **parameters}
    return name, parameters


def tool_matcher(
    grammars: GrammarCompiler,
    tokenizer: Tokenizer,
    plan: ToolPlan,
    style: ToolCallStyle,
    structure: Structure | None,
    *,
    code: bool = False,
) -> Matcher:
    """What an answer may be: text and then calls, or calls alone; or a structure, or calls.

    Args:
        grammars: compile it.
        tokenizer: of the model.
        plan: what may be called.
        style: how calls are written.
        structure: of an answer that calls nothing.
        code: the text may have tags of code, where these are tokens.

    Raises:
        RequestError: naming the tool whose schema is broken.
    """
    lines = []
    for number, (name, parameters) in enumerate(plan.tools.items()):
        field = f"tools: {name}: parameters"
        arguments = json_part(parameters, field, LINE_OPTIONS)
        grammars.compile(f"start: {arguments}", field)  # alone, for an error that names it
        head = quoted(f'{{"name": {json.dumps(name)}, "arguments": ')
        lines.append(f'tool_{number}: {head} {arguments} "}}"')
    lines.append("call: " + " | ".join(f"tool_{number}" for number in range(len(lines))))
    as_tokens = tool_call_ids(tokenizer) is not None
    opened, closed = (
        (tag if as_tokens else quoted(tag)) for tag in (TOOL_CALL_OPEN, TOOL_CALL_CLOSE)
    )
    if style == "list":
        more = ' (", " call)*' if plan.parallel else ""
        calls = f"call{more}" if plan.required else f"(call{more})?"  # an empty list: none
        body = f'"[" {calls} "]" {closed}'
        again = ""
    else:
        body = f'"\\n" call "\\n" {closed}'
        again = f' ("\\n" {opened} {body})*' if plan.parallel else ""
    tags = [tag for tag in (CODE_OPEN, CODE_CLOSE) if tokenizer.added_id_of(tag) is not None]
    before = f"(TEXT ({' | '.join(tags)}))* " if code and tags else ""
    parts = {}
    if plan.required:
        lines.insert(0, f"start: {opened} {body}{again}")
    elif structure is not None:
        parts["answer"] = structure.lark
        lines.insert(0, f"start: @answer | {opened} {body}{again}")
    elif as_tokens:
        lines.insert(0, f"start: {before}TEXT | {before}TEXT {opened} {body}{again}")
        lines.append(f"TEXT: {_TEXT}")
    else:
        lines.insert(0, f"start: {before}TEXT | {before}head {body}{again}")
        lines += [f"head[lazy]: TEXT {opened}", f"TEXT: {_TEXT}"]
    return grammars.compile("\n".join(lines), "tools", parts)


def tool_call_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The tokens around a call, where they are tokens."""
    opened = tokenizer.added_id_of(TOOL_CALL_OPEN)
    closed = tokenizer.added_id_of(TOOL_CALL_CLOSE)
    return None if opened is None or closed is None else (opened, closed)


@dataclass(frozen=True)
class CallDelta:
    """More of a call; the first of a call has no arguments yet."""

    index: int
    id: str
    name: str
    arguments: str


_HEAD = re.compile(r'[\s\[,]*\{"name": "([^"]*)", "arguments": ')
_NO_CALL = re.compile(r"\s*\[\s*\]\s*" + re.escape(TOOL_CALL_CLOSE))
_AFTER = re.compile(r"\s*\}\s*(?:(,)|\]?\s*" + re.escape(TOOL_CALL_CLOSE) + ")")


class ToolCallParser:
    """Takes calls out of an answer's text, token by token. They follow `tool_matcher`'s grammar.

    Where `<tool_call>` is a token only that counts, never text that spells it. White space between
    text and a call is dropped.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.calls: list[ToolCall] = []
        """Complete calls so far."""
        ids = tool_call_ids(tokenizer)
        self._open_id = None if ids is None else ids[0]
        self._inside = False
        self._held = ""  # what is not decided yet
        self._call: tuple[str, str] | None = None  # id and name of the call whose arguments come
        self._arguments = ""
        self._depth = 0  # of the arguments' JSON; they are an object, so 0 is before or after it
        self._quoted = self._escaped = False
        self._begun = 0

    def push(self, token_id: int, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the text of the next token; text to pass on, and then more of calls."""
        self._held += text
        if self._inside:
            return "", self._read()
        if self._open_id is not None:
            found = token_id == self._open_id
            place = len(self._held) - len(TOOL_CALL_OPEN) if found else -1
        else:
            place = self._held.find(TOOL_CALL_OPEN)
        if place >= 0:
            before, self._held = self._held[:place], self._held[place + len(TOOL_CALL_OPEN) :]
            self._inside = True
            return before.rstrip(), self._read()
        keep = len(self._held.rstrip())
        if self._open_id is None:
            keep = min(keep, begins_tag(self._held, TOOL_CALL_OPEN))
            keep = len(self._held[:keep].rstrip())
        passed, self._held = self._held[:keep], self._held[keep:]
        return passed, []

    def flush(self) -> str:
        """Text that was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return "" if self._inside or (self.calls and not held.strip()) else held

    def _read(self) -> list[CallDelta]:
        """Reads on inside of calls as far as the held text goes."""
        deltas: list[CallDelta] = []
        while self._inside:
            if self._call is None:
                head = _HEAD.match(self._held)
                if none := _NO_CALL.match(self._held):
                    self._held, self._inside = self._held[none.end() :], False
                if head is None:
                    return deltas
                self._held = self._held[head.end() :]
                self._call = (f"call_{uuid.uuid4().hex[:24]}", head[1])
                self._arguments = ""
                deltas.append(CallDelta(self._begun, *self._call, ""))
                self._begun += 1
            if not self._complete:
                end = self._end_of_arguments()
                delta, self._held = self._held[:end], self._held[end:]
                self._arguments += delta
                if delta:
                    deltas.append(CallDelta(self._begun - 1, *self._call, delta))
                if not self._complete:
                    return deltas
            after = _AFTER.match(self._held)
            if after is None:
                return deltas
            self._held = self._held[after.end() :]
            self._inside = after[1] is not None
            call_id, name = self._call
            self.calls.append(ToolCall(name, json.loads(self._arguments), call_id, self._arguments))
            self._call = None
        return deltas

    @property
    def _complete(self) -> bool:
        return bool(self._arguments) and self._depth == 0

    def _end_of_arguments(self) -> int:
        """How much of the held text is of the arguments."""
        for place, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                else:
                    self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return len(self._held)


def begins_tag(text: str, tag: str) -> int:
    """Where the end of `text` may begin a tag."""
    for count in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:count]):
            return len(text) - count
    return len(text)
