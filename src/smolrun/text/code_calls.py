"""Calls of tools that a model writes as Python between `<code>` and `</code>`.

SmolLM3 does so where its template was given `python_tools`; beside these it may have others, which
it calls in JSON. The code is only read, never run: it counts as calls where it is nothing but calls
of these tools with literal arguments, and stays text where it is anything else.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import textwrap
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolrun.text.tool_calls import CallDelta, ToolCallParser, begins_tag
from smolrun.text.tools import CODE_CLOSE, CODE_OPEN, ToolCall

if TYPE_CHECKING:
    from smolrun.text.tokenizer import Tokenizer

MAX_CODE = 64 << 10  # characters of a block that is read
_MAX_DEPTH = 64  # of brackets; Python's own parser was not made for strangers
_SPELLED = {"true": True, "false": False, "null": None}  # JSON's words, which models mix in
_DEFINITION = re.compile(r"\s*(?:async\s+)?(?:def\s+)?([A-Za-z_]\w*)\s*\(")

Signatures = Mapping[str, "Sequence[str] | None"]
"""Names of tools, each with those of its parameters in order; None where they are not known."""


class _NotCallsError(Exception):
    """The code is more than calls with literal arguments."""


def signatures_of(tools: Sequence[object]) -> dict[str, Sequence[str] | None]:
    """What `python_tools` define: Python functions as text, or JSON Schema objects."""
    found: dict[str, Sequence[str] | None] = {}
    for tool in tools:
        if isinstance(tool, Mapping):
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str):
                parameters = function.get("parameters")
                properties = (
                    parameters.get("properties") if isinstance(parameters, Mapping) else None
                )
                found[name] = list(properties) if isinstance(properties, Mapping) else None
        elif isinstance(tool, str):
            found |= _defined(tool)
    return found


def _defined(text: str) -> dict[str, Sequence[str] | None]:
    text = textwrap.dedent(text).strip()
    for source in (text, text + ": ...", text + "\n    ..."):  # a signature may stand alone
        try:
            body = _parsed(source).body
        except _NotCallsError:
            continue
        functions = [f for f in body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
        if functions:
            return {f.name: [a.arg for a in (*f.args.posonlyargs, *f.args.args)] for f in functions}
    named = _DEFINITION.match(text)
    return {named[1]: None} if named else {}


def calls_in(code: str, signatures: Signatures) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of the calls that code is made of; None where it is anything else.

    A call may be assigned to a name that nobody uses, or printed.
    """
    try:
        found = [
            each
            for statement in _parsed(textwrap.dedent(code).strip()).body
            for each in _calls(statement, signatures)
        ]
    except _NotCallsError:
        return None
    return found or None


def _parsed(code: str) -> ast.Module:
    depth = deepest = 0
    for character in code:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if len(code) > MAX_CODE or deepest > _MAX_DEPTH:
        raise _NotCallsError
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        raise _NotCallsError from None


def _calls(statement: ast.stmt, signatures: Signatures) -> list[tuple[str, dict[str, Any]]]:
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Assign):
        if not all(isinstance(target, ast.Name) for target in statement.targets):
            raise _NotCallsError
    elif not isinstance(statement, ast.Expr):
        raise _NotCallsError
    if not isinstance(value, ast.Call):
        raise _NotCallsError
    prints = isinstance(value.func, ast.Name) and value.func.id == "print"
    if prints and "print" not in signatures:
        if value.keywords or not value.args:
            raise _NotCallsError
        return [_call(argument, signatures) for argument in value.args]
    return [_call(value, signatures)]


def _call(value: ast.expr, signatures: Signatures) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, ast.Call) or not isinstance(value.func, (ast.Name, ast.Attribute)):
        raise _NotCallsError
    name = _dotted(value.func)
    if name not in signatures:
        raise _NotCallsError
    parameters = signatures[name] or ()
    if len(value.args) > len(parameters):
        raise _NotCallsError
    arguments = {p: _literal(a) for p, a in zip(parameters, value.args, strict=False)}
    for given in value.keywords:
        if given.arg is None or given.arg in arguments:
            raise _NotCallsError
        arguments[given.arg] = _literal(given.value)
    return name, arguments


def _dotted(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return f"{_dotted(function.value)}.{function.attr}"
    if isinstance(function, ast.Name):
        return function.id
    raise _NotCallsError


def _literal(value: ast.expr) -> Any:
    """What JSON can say of a literal."""
    if isinstance(value, ast.Constant):
        plain = value.value
        if plain is None or isinstance(plain, (str, bool, int)):
            return plain
        if isinstance(plain, float) and plain - plain == 0:  # finite
            return plain
    elif isinstance(value, ast.Name) and value.id in _SPELLED:
        return _SPELLED[value.id]
    elif isinstance(value, ast.UnaryOp) and isinstance(value.op, (ast.USub, ast.UAdd)):
        number = _literal(value.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number if isinstance(value.op, ast.USub) else number
    elif isinstance(value, (ast.List, ast.Tuple)):
        return [_literal(item) for item in value.elts]
    elif isinstance(value, ast.Dict):
        keys = [None if key is None else _literal(key) for key in value.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, value.values), strict=True))
    raise _NotCallsError


class CodeCallParser:
    """Takes calls out of an answer's text, token by token, as `ToolCallParser` does.

    A block is held back until it is whole. One that is more than calls, or never whole, is text.

    Args:
        tokenizer: of the model.
        signatures: of the tools.
    """

    def __init__(self, tokenizer: Tokenizer, signatures: Signatures) -> None:
        self.calls: list[ToolCall] = []
        """Complete calls so far."""
        self._signatures = signatures
        opened, closed = tokenizer.added_id_of(CODE_OPEN), tokenizer.added_id_of(CODE_CLOSE)
        as_tokens = opened is not None and closed is not None
        self._ids = (opened, closed) if as_tokens else None
        self._held = ""  # white space before what comes, and the open block
        self._block: int | None = None  # where the code begins in it

    def push(self, token_id: int, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the text of the next token; text to pass on, and then more of calls."""
        self._held += text
        passed = ""
        deltas: list[CallDelta] = []
        while True:
            if self._block is None:
                place = self._find(CODE_OPEN, 0, token_id)
                end = len(self._held) if place < 0 else place
                keep = len(self._held[:end].rstrip())
                if place < 0 and self._ids is None:
                    keep = len(self._held[: begins_tag(self._held, CODE_OPEN)].rstrip())
                passed += self._held[:keep]
                self._held = self._held[keep:]
                if place < 0:
                    return passed, deltas
                self._block = place - keep + len(CODE_OPEN)
            place = self._find(CODE_CLOSE, self._block, token_id)
            if place < 0:
                return passed, deltas
            code, after = self._held[self._block : place], self._held[place + len(CODE_CLOSE) :]
            self._block = None
            calls = calls_in(code, self._signatures)
            if calls is None:
                passed += self._held[: len(self._held) - len(after)]
            else:
                deltas += self._made(calls)
            self._held = after

    def flush(self) -> str:
        """Text that was held back, at the end of the stream."""
        held, self._held, self._block = self._held, "", None
        return "" if self.calls and not held.strip() else held

    def _find(self, tag: str, start: int, token_id: int) -> int:
        """Where a tag is in what is held; its token, where it is one, is the last there."""
        if self._ids is None:
            return self._held.find(tag, start)
        if token_id != self._ids[tag == CODE_CLOSE]:
            return -1
        place = len(self._held) - len(tag)
        return place if place >= start and self._held.endswith(tag) else -1

    def _made(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> list[CallDelta]:
        deltas = []
        for name, arguments in calls:
            written = json.dumps(arguments, ensure_ascii=False)
            index, call_id = len(self.calls), f"call_{uuid.uuid4().hex[:24]}"
            self.calls.append(ToolCall(name, arguments, call_id, written))
            deltas += [
                CallDelta(index, call_id, name, ""),
                CallDelta(index, call_id, name, written),
            ]
        return deltas


class MixedCallParser:
    """Takes calls written as Python, and calls written as JSON after them, out of an answer's text.

    Args:
        tokenizer: of the model.
        signatures: of the tools that are called from Python.
    """

    def __init__(self, tokenizer: Tokenizer, signatures: Signatures) -> None:
        self._json = ToolCallParser(tokenizer)
        self._code = CodeCallParser(tokenizer, signatures)
        self._places: dict[str, int] = {}  # of calls that have begun, by id

    @property
    def calls(self) -> list[ToolCall]:
        """Complete calls so far."""
        found = [*self._code.calls, *self._json.calls]
        return sorted(found, key=lambda call: self._places[call.id or ""])

    def push(self, token_id: int, text: str) -> tuple[str, list[CallDelta]]:
        """Takes the text of the next token; text to pass on, and then more of calls."""
        text, later = self._json.push(token_id, text)
        text, deltas = self._code.push(token_id, text)
        return text, [
            dataclasses.replace(delta, index=self._places.setdefault(delta.id, len(self._places)))
            for delta in (*deltas, *later)
        ]

    def flush(self) -> str:
        """Text that was held back, at the end of the stream."""
        passed, _ = self._code.push(-1, self._json.flush())
        return passed + self._code.flush()
