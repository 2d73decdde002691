"""Python functions as tools: a signature and a docstring become a JSON Schema."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smolrun.errors import RequestError

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    None: {"type": "null"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
    inspect.Parameter.empty: {},
}
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?):\s*\Z")


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a tool in OpenAI's form.

    Its docstring says what it does and, under `Args:` as Google's style has it, what each argument
    is. Arguments are of str, int, float, bool, list, dict, Literal, None and unions.

    Raises:
        RequestError: an argument of another type, or one that has no name.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function)
        signature = inspect.signature(function)
    except Exception as error:  # whatever an annotation does when it is looked up
        raise RequestError(f"tools: {name}: its signature can not be read: {error}") from None
    hints.pop("return", None)
    about, arguments = _described(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise RequestError(f"tools: {name}: {parameter}: an argument needs a name")
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise RequestError(f"tools: {name}: {parameter.name}: it can not be given by name")
        schema = _schema(hints.get(parameter.name, parameter.empty), f"{name}: {parameter.name}")
        if parameter.name in arguments:
            schema = {**schema, "description": arguments[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": described}


def _schema(hint: Any, field: str) -> dict[str, Any]:
    try:
        if hint in _PLAIN:
            return dict(_PLAIN[hint])
    except TypeError:  # not hashable: none of them
        pass
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part, field) for part in parts]}
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if origin in (list, Sequence) and len(parts) == 1:
        return {"type": "array", "items": _schema(parts[0], field)}
    if origin in (dict, Mapping) and len(parts) == 2 and parts[0] is str:
        return {"type": "object", "additionalProperties": _schema(parts[1], field)}
    raise RequestError(f"tools: {field}: no JSON Schema stands for {hint!r:.80}")


def _described(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each argument."""
    about: list[str] = []
    arguments: dict[str, str] = {}
    section, current, indent = "", "", 0
    for line in text.splitlines():
        found = _SECTION.match(line)
        if found is not None:
            section, current = found[1], ""
        elif not section:
            about.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            begun = re.match(r"\s*(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
            if begun is not None and (not current or depth <= indent):
                current, indent = begun[1], depth
                arguments[current] = begun[2].strip()
            elif current:
                arguments[current] = f"{arguments[current]} {line.strip()}".strip()
    return " ".join(" ".join(about).split()), arguments
