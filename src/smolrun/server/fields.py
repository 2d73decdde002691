"""What the fields of a request ask of the model. Fields that say the same thing must agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from smolrun.server.errors import ApiError, invalid, unsupported
from smolrun.server.schema import (
    REFUSED,
    ChatRequest,
    CompletionRequest,
    Generation,
    Strict,
    Structured,
    TemplateArguments,
    ThinkingFields,
)

T = TypeVar("T", bound=Strict)

_COPIED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed",
    "stop", "ignore_eos",
)  # fmt: skip


def checked(value: Any, kind: type[T]) -> T:
    """A request's body as `kind`.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise ApiError(
            400, f"The body is not a JSON object but {_json_type(value)}.", "invalid_json"
        )
    for name, why in REFUSED.items():
        if value.get(name) is not None and name not in kind.model_fields:
            raise unsupported(name, why)
    given = {k: v for k, v in value.items() if v is not None or k not in REFUSED}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _first(error) from None


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first(error: ValidationError) -> ApiError:
    """The error that says most: unknown fields come first, then what is deepest in a union."""
    found = error.errors(include_url=False, include_context=False, include_input=True)
    unknown = [item for item in found if item["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else max(found, key=lambda item: -found.index(item))
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field", "unknown_parameter", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing", "missing_required_parameter", param=param)
    found_value = (
        "" if isinstance(first["input"], (dict, list)) else f", got {first['input']!r:.80}"
    )
    message = first["msg"][0].lower() + first["msg"][1:]
    return invalid(param, f"{message}{found_value}")


def _path(location: Iterable[int | str]) -> str:
    """`messages[0].content`; names of a union's members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and not _names_a_type(part):
            path += f".{part}" if path else part
    return path


def _names_a_type(part: str) -> bool:
    """Whether a part of a location is a member of a union: a type, a model or its tag."""
    return part[0].isupper() or part in ("str", "bool", "int", "float", "json_object", "text")


def agreed(values: dict[str, Any]) -> Any:
    """The one value that fields, by name, have if they are given. ApiError where they differ."""
    given = [(name, value) for name, value in values.items() if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise invalid(
                name, f"{value!r} contradicts {given[0][0]}: {given[0][1]!r}", "contradiction"
            )
    return given[0][1] if given else None


def sampling_of(body: Generation) -> dict[str, Any]:
    """Arguments of the engine; those that are not given are left to the model."""
    limits = {"max_tokens": body.max_tokens}
    if isinstance(body, ChatRequest):
        limits["max_completion_tokens"] = body.max_completion_tokens
    arguments = {name: getattr(body, name) for name in _COPIED}
    arguments["max_tokens"] = agreed(limits)
    arguments["repeat_penalty"] = agreed(
        {
            "repeat_penalty": body.repeat_penalty,
            "repetition_penalty": body.repetition_penalty,
        }
    )
    if body.logit_bias is not None:
        arguments["logit_bias"] = {int(key): value for key, value in body.logit_bias.items()}
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true", "contradiction")
        arguments["logprobs"] = body.logprobs
        arguments["top_logprobs"] = body.top_logprobs
    elif isinstance(body, CompletionRequest) and body.logprobs is not None:
        arguments["logprobs"] = True
        arguments["top_logprobs"] = body.logprobs
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs stream to be true", "contradiction")
    return {name: value for name, value in arguments.items() if value is not None}


def seeds_of(body: Generation, choices: int) -> list[int | None]:
    """A seed for each choice: the request's, then those after it."""
    if body.seed is None:
        return [None] * choices
    return [(body.seed + index) % 2**64 for index in range(choices)]


_BUDGETS = (
    "thinking_budget", "thinking_budget_tokens", "thinking_token_budget",
    "reasoning_budget_tokens",
)  # fmt: skip
_MORE_THAN_HIGH = ("xhigh", "max")


def thinking_of(
    body: ThinkingFields, template_arguments: TemplateArguments | None
) -> dict[str, Any]:
    """The arguments `think`, `thinking_budget` and `reasoning_effort` behind all their spellings.

    The engine sees to it that these three agree.
    """
    switches: dict[str, Any] = {}
    if template_arguments is not None:
        switches["chat_template_kwargs.enable_thinking"] = template_arguments.enable_thinking
    efforts: dict[str, Any] = {
        "reasoning_effort": body.reasoning_effort,
        "reasoning.effort": body.reasoning.effort if body.reasoning else None,
    }
    (switches if isinstance(body.think, bool) else efforts)["think"] = body.think
    budgets: dict[str, Any] = {name: getattr(body, name) for name in _BUDGETS}
    if body.thinking is not None:
        switches["thinking.type"] = body.thinking.type == "enabled"
        budgets["thinking.budget_tokens"] = body.thinking.budget_tokens
    effort = agreed(efforts)
    found = {
        "think": agreed(switches),
        "thinking_budget": agreed(budgets),
        "reasoning_effort": "high" if effort in _MORE_THAN_HIGH else effort,
    }
    return {name: value for name, value in found.items() if value is not None}


def structure_of(body: Structured) -> dict[str, Any]:
    """The arguments `response_format`, `regex`, `grammar` and `choices`, by all their names."""
    schema = agreed({"guided_json": body.guided_json, "json_schema": body.json_schema})
    form = body.response_format
    if form is not None and schema is not None:
        raise invalid("response_format", "contradicts a schema beside it", "contradiction")
    found = {
        "response_format": schema
        if form is None
        else form.model_dump(by_alias=True, exclude_none=True),
        "regex": agreed({"regex": body.regex, "guided_regex": body.guided_regex}),
        "grammar": agreed({"grammar": body.grammar, "guided_grammar": body.guided_grammar}),
        "choices": agreed({"choices": body.choices, "guided_choice": body.guided_choice}),
    }
    if form is not None and form.type == "text":
        del found["response_format"]
    return {name: value for name, value in found.items() if value is not None}
