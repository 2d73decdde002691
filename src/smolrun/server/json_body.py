"""JSON of strangers: what two parsers could read differently is refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from smolrun.server.errors import INVALID, ApiError

# An escape that may be half of a pair.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(body: bytes, depth: int) -> Any:
    """The value of a request's body.

    Args:
        body: as it came.
        depth: arrays and objects may be nested so deep.

    Raises:
        ApiError: 400, for anything but one JSON text in UTF-8 of unique keys and finite numbers.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
    except RecursionError:
        raise _refused(f"nested more than {depth} deep") from None
    except json.JSONDecodeError as error:
        raise _refused(f"{error.msg} at character {error.pos}") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise _refused(str(error).partition(";")[0]) from None
    if body.count(b"[") + body.count(b"{") > depth:
        _check_depth(value, depth)
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"The body is not valid JSON: {reason}.", "invalid_json", kind=INVALID)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _refused(f"the key {key[:80]!r} occurs twice in one object")
            seen.add(key)
    return found


def _constant(name: str) -> NoReturn:
    raise _refused(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _refused(f"the number {text[:40]} is too large")
    return value


def _check_depth(value: Any, depth: int) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _refused(f"nested more than {depth} deep")


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise _refused(
                    f"half a surrogate pair, \\u{ord(item[error.start]):04x}, in a string"
                ) from None
