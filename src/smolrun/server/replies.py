"""The shapes of replies, under the names that clients of OpenAI, llama.cpp and vLLM know."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from smolrun.api import Result, Timings, TokenLogprob, ToolCall, ToolCallEvent, Usage

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON can not say


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dumped(value: Any) -> bytes:
    """JSON in UTF-8. ValueError for NaN and infinity, which are a defect of ours."""
    return _ENCODER.encode(value).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"


_TEXT = "\0"  # stands for the text of a prepared event
_TEXT_MARK = json.dumps(_TEXT).encode()


class EventWriter:
    """Writes the events of one stream.

    Args:
        head: members that all of them begin with.
        text: the choice with a piece of text, of its number and that text. All but the text is
            written once: an event for each token takes a core from the model that makes the next.
        usage: each tells that there is no usage yet.
    """

    def __init__(
        self, head: Mapping[str, Any], text: Callable[[int, str], dict[str, Any]], usage: bool
    ) -> None:
        self._begun = b"data: " + dumped(head)[:-1] + b","
        self._text = text
        self._usage = usage
        self._prepared: dict[int, tuple[bytes, bytes]] = {}  # before a choice's text, and after

    def event(self, members: dict[str, Any]) -> bytes:
        """An event with members of its own."""
        if self._usage:
            members.setdefault("usage", None)
        return self._begun + dumped(members)[1:] + b"\n\n"

    def text(self, index: int, text: str) -> bytes:
        """More text of a choice, and nothing else."""
        prepared = self._prepared.get(index)
        if prepared is None:
            before, _, after = self.event({"choices": [self._text(index, _TEXT)]}).rpartition(
                _TEXT_MARK
            )
            prepared = self._prepared[index] = (before, after)
        encoded = json.encoder.encode_basestring(text).encode("utf-8", "replace")
        return prepared[0] + encoded + prepared[1]


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def usage(results: Sequence[Usage], choices: int = 1) -> dict[str, Any]:
    """Tokens of a request's answers; each prompt counts once, whatever `choices` it had."""
    prompt = sum(one.prompt_tokens for one in results[::choices])
    cached = sum(one.cached_tokens for one in results[::choices])
    completion = sum(one.completion_tokens for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(one.reasoning_tokens for one in results)
        },
    }


def timings(one: Timings, cached_tokens: int) -> dict[str, Any]:
    """llama.cpp's `timings`. The rate leaves the first token out, whose time is the prompt's."""
    return {
        "cache_n": cached_tokens,
        "prompt_n": one.prompt_n,
        "prompt_ms": one.prompt_ms,
        "prompt_per_token_ms": one.prompt_ms / one.prompt_n if one.prompt_n else 0.0,
        "prompt_per_second": one.prompt_per_second,
        "predicted_n": one.predicted_n,
        "predicted_ms": one.predicted_ms,
        "predicted_per_token_ms": one.predicted_ms / one.predicted_n if one.predicted_n else 0.0,
        "predicted_per_second": one.predicted_per_second,
    }


def all_timings(results: Sequence[Result]) -> dict[str, Any]:
    """Timings of a request: of its answer, or of the one of several that took longest."""
    slowest = max(results, key=lambda one: one.timings.prompt_ms + one.timings.predicted_ms)
    return timings(slowest.timings, slowest.usage.cached_tokens)


def finish_reason(result: Result) -> str:
    """Why an answer ended. One that was cancelled has nobody to tell it to."""
    return "stop" if result.finish_reason == "cancelled" else result.finish_reason


def logprob(value: float) -> float:
    """A logarithm that JSON can say."""
    return LOWEST_LOGPROB if math.isinf(value) else max(value, LOWEST_LOGPROB)


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def described(token: TokenLogprob) -> dict[str, Any]:
        return {
            "token": token.text,
            "logprob": logprob(token.logprob),
            "bytes": list(token.bytes),
        }

    content = [
        {**described(token), "top_logprobs": [described(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def token_name(data: bytes) -> str:
    r"""A token's text as the key of an object; bytes that are no text as `bytes:\xe2\x80`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A complete call of a tool."""
    arguments = call.arguments_json
    if arguments is None:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def tool_call_delta(event: ToolCallEvent) -> dict[str, Any]:
    """More of a call: the first piece, which has no arguments yet, names it."""
    if event.arguments_delta:
        return {"index": event.index, "function": {"arguments": event.arguments_delta}}
    return {
        "index": event.index,
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }
