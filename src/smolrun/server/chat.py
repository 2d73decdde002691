"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from smolrun.api import (
    EndEvent,
    Event,
    ProgressEvent,
    ReasoningEvent,
    Result,
    TextEvent,
    ToolCallEvent,
)
from smolrun.server import replies
from smolrun.server.endpoint import EventStream, client_of, json_reply, read_body
from smolrun.server.errors import invalid
from smolrun.server.fields import sampling_of, seeds_of, structure_of, thinking_of
from smolrun.server.schema import ChatRequest
from smolrun.server.service import Service
from smolrun.server.work import Finished, Work, while_connected


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer a conversation, whole or piece by piece."""
    raw, body = await read_body(request, service, ChatRequest)
    model = service.model(body.model)
    count = body.n or 1
    arguments = _arguments(raw, body)
    terms = service.terms(body, client_of(request), count)
    streams = [
        model.stream(raw["messages"], terms=one, **{**arguments, "seed": seed})
        for one, seed in zip(terms, seeds_of(body, count), strict=True)
    ]
    work = service.work(streams, terms, count)
    await while_connected(request, work.start())
    reply = _Reply(service, body)
    if body.stream:
        return EventStream(request, reply.chunks(work), work)
    finished = await while_connected(request, work.all_finished(bool(body.logprobs)))
    return json_reply(reply.whole(finished))


def _arguments(raw: dict[str, Any], body: ChatRequest) -> dict[str, Any]:
    """What the model is asked for, beside the messages."""
    arguments = sampling_of(body)
    if arguments.get("max_tokens") == 0:
        raise invalid("max_tokens", "expected at least 1, got 0")
    arguments |= thinking_of(body, body.chat_template_kwargs)
    arguments |= structure_of(body)
    if body.reasoning_format == "none":
        arguments["separate_reasoning"] = False
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise invalid(
                "add_generation_prompt", "contradicts continue_final_message", "contradiction"
            )
        arguments["continue_final_message"] = True
    elif body.add_generation_prompt is False:
        raise invalid("add_generation_prompt", "false needs continue_final_message to be true")
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        if raw.get(name) is not None:
            arguments[name] = raw[name]
    given = raw.get("chat_template_kwargs") or {}
    rest = {k: v for k, v in given.items() if k != "enable_thinking" and v is not None}
    if rest:
        arguments["template_arguments"] = rest
    return arguments


class _Reply:
    """Writes the replies to one request."""

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self._body = body
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model or service.names[0],
            "system_fingerprint": service.fingerprint,
        }
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._events = replies.EventWriter(
            {**self._head, "object": "chat.completion.chunk"}, _text_choice, self._wants_usage
        )
        self._started = time.monotonic()

    def whole(self, finished: list[Finished]) -> dict[str, Any]:
        """The reply to a request that wants no stream."""
        results = [one.result for one in finished]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(index, one) for index, one in enumerate(finished)],
            "usage": replies.usage([result.usage for result in results], len(results)),
            "timings": replies.all_timings(results),
        }

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        result = finished.result
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        if result.reasoning is not None:
            message["reasoning_content"] = result.reasoning
        if result.tool_calls:
            message["content"] = result.text or None
            message["tool_calls"] = [replies.tool_call(call) for call in result.tool_calls]
        choice = {
            "index": index,
            "message": message,
            "logprobs": replies.chat_logprobs(finished.logprobs) if self._body.logprobs else None,
            "finish_reason": replies.finish_reason(result),
        }
        return choice | self._extras(result)

    def _extras(self, result: Result) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if result.thinking_stopped_by is not None:
            extras["thinking_stopped_by"] = result.thinking_stopped_by
        if self._body.return_tokens:
            extras["tokens"] = list(result.token_ids)
        return extras

    async def chunks(self, work: Work) -> AsyncIterator[bytes]:
        """Server-sent events: roles, pieces, ends, usage."""
        for index in range(self._body.n or 1):
            role = _choice(index, {"role": "assistant", "content": ""})
            yield self._events.event({"choices": [role]})
        results: list[Result] = []
        async for events in work.events():
            pieces = [self._piece(*event, work) for event in events]
            if data := b"".join(pieces) if events else replies.PING:
                yield data
            results += [event.result for _, event in events if isinstance(event, EndEvent)]
        if self._wants_usage:
            usage = replies.usage([result.usage for result in results], len(results))
            yield self._events.event({"choices": [], "usage": usage})

    def _piece(self, index: int, event: Event, work: Work) -> bytes:
        body = self._body
        if isinstance(event, TextEvent):
            if not (body.logprobs or body.timings_per_token):
                return self._events.text(index, event.text)
            logprobs = replies.chat_logprobs(event.logprobs) if body.logprobs else None
            return self._chunk(index, {"content": event.text}, work, logprobs=logprobs)
        if isinstance(event, ReasoningEvent):
            return self._chunk(index, {"reasoning_content": event.text}, work)
        if isinstance(event, EndEvent):
            return self._end(index, event.result)
        if isinstance(event, ToolCallEvent):
            return self._chunk(index, {"tool_calls": [replies.tool_call_delta(event)]}, work)
        if isinstance(event, ProgressEvent) and self._body.return_progress:
            progress = {
                "total": event.total,
                "processed": event.done,
                "time_ms": round(1000 * (time.monotonic() - self._started)),
            }
            return self._events.event({"choices": [], "prompt_progress": progress})
        return b""

    def _end(self, index: int, result: Result) -> bytes:
        choice = {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": replies.finish_reason(result),
            **self._extras(result),
        }
        timings = replies.timings(result.timings, result.usage.cached_tokens)
        return self._events.event({"choices": [choice], "timings": timings})

    def _chunk(self, index: int, delta: dict[str, Any], work: Work, logprobs: Any = None) -> bytes:
        members: dict[str, Any] = {"choices": [_choice(index, delta, logprobs)]}
        if self._body.timings_per_token:
            members["timings"] = work.timings(index)
        return self._events.event(members)


def _choice(index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _text_choice(index: int, text: str) -> dict[str, Any]:
    return _choice(index, {"content": text})
