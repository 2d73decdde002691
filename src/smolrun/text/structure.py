"""What form a text must have: as a request says it, and as a grammar in Lark's notation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from smolrun.errors import RequestError
from smolrun.text.grammar import llguidance

MAX_BYTES = 256 << 10  # of a schema, expression or grammar
MAX_CHOICES = 1000
MAX_MULTIPLE = 10_000  # of multipleOf: its automaton has as many states

# White space between the parts of a JSON text: a space, or a line break with some indentation. A
# model that may write as much as it likes sometimes never stops.
_WHITESPACE = r"( |\n {0,16}|\n\t{0,8})?"
# What is set here holds whatever the schema itself asks of llguidance.
_JSON_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "json_allow_general_unicode_escapes": True,
    "lenient": False,
}
# One line, spaced as Python's json module does it: calls of tools, as templates show them.
LINE_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allow_general_unicode_escapes": True,
    "lenient": False,
}


@dataclass(frozen=True)
class Structure:
    """A grammar, and the argument that it comes from."""

    lark: str  # its rule `start` is the whole text
    field: str  # for error messages


def structure_of(
    response_format: Any = None, regex: Any = None, grammar: Any = None, choices: Any = None
) -> Structure | None:
    """What a request's arguments ask of a text; None where that is nothing.

    Args:
        response_format: `{"type": "text"}`, `{"type": "json_object"}`, `{"type": "json_schema",
            "json_schema": {"schema": ...}}`, a JSON Schema, or a class with `model_json_schema()`.
        regex: of the whole text, in Rust's syntax, but that a digit is one of ASCII.
        grammar: in Lark's notation, or in llama.cpp's (GBNF).
        choices: texts, of which it must be one.

    Raises:
        RequestError: a value of the wrong kind or size, or more than one of them. What a grammar
            says is checked when it is compiled.
    """
    given = {
        "response_format": response_format,
        "regex": regex,
        "grammar": grammar,
        "choices": choices,
    }
    names = [name for name, value in given.items() if value is not None]
    if isinstance(response_format, Mapping) and response_format.get("type") == "text":
        if set(response_format) != {"type"}:
            raise RequestError("response_format: the type 'text' takes no other field")
        names.remove("response_format")
    if len(names) > 1:
        raise RequestError(f"{' and '.join(names)}: a text can have one form only")
    if not names:
        return None
    if names == ["response_format"]:
        return _of_format(response_format)
    if names == ["regex"]:
        expression = llguidance("regex").regex_to_lark(_text(regex, "regex"), "d")
        return Structure(f"start: /{expression}/", "regex")
    if names == ["grammar"]:
        return Structure(_lark(_text(grammar, "grammar")), "grammar")
    return Structure(_of_choices(choices), "choices")


def schema_text(schema: Any, field: str) -> str:
    """A JSON Schema as text. RequestError naming `field` where it is none, or too large."""
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(f"{field}: expected a JSON Schema, found {type(schema).__name__}")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{field}: this schema is not JSON: {error}") from None
    if len(text) > MAX_BYTES:
        raise RequestError(f"{field}: at most {MAX_BYTES} bytes of schema, got {len(text)}")
    pending: list[Any] = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            multiple = part.get("multipleOf")
            if isinstance(multiple, bool):
                multiple = None  # an int to Python; llguidance says that it is no number
            if isinstance(multiple, (int, float)) and not _is_small_multiple(multiple):
                raise RequestError(
                    f"{field}: multipleOf: expected a number above 0 and, its point left out, "
                    f"at most {MAX_MULTIPLE}, got {multiple!r:.40}"
                )
            pending += part.values()
        elif isinstance(part, (list, tuple)):
            pending += part
    return text


def json_part(schema: Any, field: str, options: Mapping[str, Any] = _JSON_OPTIONS) -> str:
    """Texts that a JSON Schema admits, as a part of a Lark grammar. RequestError: see above."""
    checked = json.loads(schema_text(schema, field))
    if isinstance(checked, bool):
        checked = {} if checked else {"not": {}}
    return "%json " + json.dumps({**checked, "x-guidance": options})


def _is_small_multiple(multiple: float) -> bool:
    sign, digits, exponent = Decimal(repr(multiple)).normalize().as_tuple()
    if sign or not isinstance(exponent, int) or len(digits) + exponent > 9:
        return False
    whole: int = int("".join(map(str, digits))) * 10 ** max(exponent, 0)
    return 0 < whole <= MAX_MULTIPLE


def _of_format(value: Any) -> Structure:
    field = "response_format"
    schema: Any
    if isinstance(value, type) and hasattr(value, "model_json_schema"):
        schema = value.model_json_schema()
    elif not isinstance(value, Mapping):
        raise RequestError(
            f"{field}: expected an object or a class with model_json_schema(), got {value!r:.80}"
        )
    elif value.get("type") == "json_object":
        _check_fields(value, ("type", "schema"), field)
        schema = value.get("schema", {"type": "object"})
        field += ".schema"
    elif value.get("type") == "json_schema":
        _check_fields(value, ("type", "json_schema"), field)
        field += ".json_schema"
        inner = value.get("json_schema")
        if not isinstance(inner, Mapping):
            raise RequestError(f"{field}: expected an object, found {type(inner).__name__}")
        _check_fields(inner, ("name", "description", "schema", "strict"), field)
        field += ".schema"
        schema = inner.get("schema")
    else:
        schema = value
    return Structure(f"start: {json_part(schema, field)}", field)


def _check_fields(value: Mapping[str, Any], known: Sequence[str], field: str) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"{field}.{name!s:.40}: unknown field; known are {', '.join(known)}")


def _of_choices(choices: Any) -> str:
    if isinstance(choices, (str, bytes, Mapping)) or not isinstance(choices, Sequence):
        raise RequestError(f"choices: expected a list of texts, found {type(choices).__name__}")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise RequestError(f"choices: expected 1 to {MAX_CHOICES} texts, got {len(choices)}")
    for index, choice in enumerate(choices):
        _text(choice, f"choices[{index}]")
    if sum(map(len, choices)) > MAX_BYTES:
        raise RequestError(f"choices: at most {MAX_BYTES} characters in all")
    return "start: " + " | ".join(map(quoted, choices))


def quoted(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(f"{field}: expected a text that is not empty, got {value!r:.80}")
    if len(value) > MAX_BYTES:
        raise RequestError(f"{field}: at most {MAX_BYTES} characters, got {len(value)}")
    return value


def _lark(text: str) -> str:
    """A grammar in Lark's notation; GBNF is told by its `::=`."""
    if "::=" not in text:
        return text
    library = llguidance("grammar")
    try:
        found: str = library.gbnf_to_lark.gbnf_to_lark(text)
        return found
    except Exception as error:  # it says what is wrong by exceptions of every kind
        problem = " ".join(str(error).split())
        raise RequestError(f"grammar: not GBNF that can be read: {problem:.200}") from None
