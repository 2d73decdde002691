"""POST /v1/completions: text that goes on from a prompt, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from smolrun.api import EndEvent, Event, ProgressEvent, Result, Terms, TextEvent, TokenLogprob
from smolrun.api.asynchronous import AsyncModel
from smolrun.engine.places import Places
from smolrun.server import replies
from smolrun.server.endpoint import EventStream, client_of, json_reply, prompts_of, read_body
from smolrun.server.errors import invalid
from smolrun.server.fields import sampling_of, seeds_of, structure_of
from smolrun.server.schema import CompletionRequest
from smolrun.server.service import Service
from smolrun.server.work import Finished, Work, while_connected


@dataclass(frozen=True)
class Echo:
    """A prompt as it is sent back."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()  # of its tokens, if asked for


async def completions(request: Request, service: Service) -> Response:
    """Continue prompts, whole or piece by piece."""
    raw, body = await read_body(request, service, CompletionRequest)
    model = service.model(body.model)
    count = body.n or 1
    if body.best_of not in (None, count):
        raise invalid("best_of", f"only n answers are made, and n is {count}", "contradiction")
    arguments = sampling_of(body) | structure_of(body)
    only_prompt = arguments.get("max_tokens") == 0
    if only_prompt and not body.echo:
        raise invalid("max_tokens", "expected at least 1 without echo, got 0")
    if only_prompt:
        arguments["max_tokens"] = 1
    prompts = prompts_of(raw["prompt"])
    asked = [(prompt, seed) for prompt in prompts for seed in seeds_of(body, count)]
    param = "prompt" if len(prompts) > 1 else "n"
    terms = service.terms(body, client_of(request), len(asked), param)
    streams = [
        model.stream_text(prompt, terms=one, **{**arguments, "seed": seed})
        for one, (prompt, seed) in zip(terms, asked, strict=True)
    ]
    work = service.work(streams, terms, count)
    wants_logprobs = body.logprobs is not None
    try:
        echoes = [Echo()] * len(prompts)
        if body.echo:
            top = body.logprobs
            # The answers have places in the queue; what is read for them needs no other.
            read = [service.reading_terms(client_of(request), Places().take()[0]) for _ in prompts]
            echoes = [
                await while_connected(request, _echo(model, prompt, top, one))
                for prompt, one in zip(prompts, read, strict=True)
            ]
        await while_connected(request, work.start())
    except BaseException:
        work.close()
        raise
    reply = _Reply(service, body, echoes, only_prompt)
    if body.stream:
        return EventStream(request, reply.chunks(work), work)
    finished = await while_connected(request, work.all_finished(wants_logprobs))
    return json_reply(reply.whole(finished))


async def _echo(model: AsyncModel, prompt: str | list[int], top: int | None, terms: Terms) -> Echo:
    if top is None:
        text = prompt if isinstance(prompt, str) else await model.detokenize(prompt)
        return Echo(text)
    first, *others = await model.prompt_logprobs(prompt, top_logprobs=top, terms=terms)
    tokens = (first, *others)
    text = b"".join(token.bytes for token in tokens).decode("utf-8", "replace")
    return Echo(prompt if isinstance(prompt, str) else text, tokens)


class LegacyLogprobs:
    """Log-probabilities in the shape of the older API, with each token's place in the text."""

    def __init__(self) -> None:
        self._before = b""  # bytes of the tokens so far

    def shaped(self, tokens: Iterable[TokenLogprob], *, first_unknown: bool = False) -> Any:
        """The members for more tokens. Of a prompt, nothing is known about the first."""
        found: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token in tokens:
            unknown = first_unknown and not found["tokens"]
            top: dict[str, float] = {}
            for other in token.top:  # the likeliest first: of equal texts it stays
                top.setdefault(replies.token_name(other.bytes), replies.logprob(other.logprob))
            found["tokens"].append(replies.token_name(token.bytes))
            found["token_logprobs"].append(None if unknown else replies.logprob(token.logprob))
            found["top_logprobs"].append(None if unknown else top)
            found["text_offset"].append(len(self._before.decode("utf-8", "ignore")))
            self._before += token.bytes
        return found


class _Reply:
    """Writes the replies to one request."""

    def __init__(
        self, service: Service, body: CompletionRequest, echoes: Sequence[Echo], only_prompt: bool
    ) -> None:
        self._body = body
        self._count = body.n or 1
        self._echoes = echoes
        self._only_prompt = only_prompt
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or service.names[0],
            "system_fingerprint": service.fingerprint,
        }
        self._wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._events = replies.EventWriter(self._head, _choice, self._wants_usage)
        self._started = time.monotonic()

    def whole(self, finished: list[Finished]) -> dict[str, Any]:
        """The reply to a request that wants no stream."""
        results = [one.result for one in finished]
        return {
            **self._head,
            "choices": [self._choice(index, one) for index, one in enumerate(finished)],
            "usage": self._usage(results),
            "timings": replies.all_timings(results),
        }

    def _usage(self, results: Sequence[Result]) -> dict[str, Any]:
        return replies.usage([result.usage for result in results], self._count)

    def _choice(self, index: int, finished: Finished) -> dict[str, Any]:
        echo, result = self._echoes[index // self._count], finished.result
        logprobs = None
        if self._body.logprobs is not None:
            shape = LegacyLogprobs()
            logprobs = shape.shaped(echo.logprobs, first_unknown=True)
            if not self._only_prompt:
                for name, values in shape.shaped(finished.logprobs).items():
                    logprobs[name] += values
        choice = {
            "index": index,
            "text": echo.text + ("" if self._only_prompt else result.text),
            "logprobs": logprobs,
            "finish_reason": replies.finish_reason(result),
        }
        return choice | self._extras(result)

    def _extras(self, result: Result) -> dict[str, Any]:
        if not self._body.return_tokens:
            return {}
        return {"tokens": [] if self._only_prompt else list(result.token_ids)}

    async def chunks(self, work: Work) -> AsyncIterator[bytes]:
        """Server-sent events: prompts where they are echoed, pieces, ends, usage."""
        answers = len(self._echoes) * self._count
        shapes = [LegacyLogprobs() for _ in range(answers)]
        wants_logprobs = self._body.logprobs is not None
        results: dict[int, Result] = {}
        if self._body.echo:
            for index in range(answers):
                echo = self._echoes[index // self._count]
                logprobs = (
                    shapes[index].shaped(echo.logprobs, first_unknown=True)
                    if wants_logprobs
                    else None
                )
                yield self._chunk(index, echo.text, logprobs)
        async for events in work.events():
            pieces = [self._piece(*event, shapes, work) for event in events]
            if data := b"".join(pieces) if events else replies.PING:
                yield data
            results |= {i: event.result for i, event in events if isinstance(event, EndEvent)}
        if self._wants_usage:
            usage = self._usage([results[index] for index in range(answers)])
            yield self._events.event({"choices": [], "usage": usage})

    def _piece(
        self, index: int, event: Event, shapes: Sequence[LegacyLogprobs], work: Work
    ) -> bytes:
        body = self._body
        if isinstance(event, TextEvent) and not self._only_prompt:
            if body.logprobs is None and not body.timings_per_token:
                return self._events.text(index, event.text)
            given = body.logprobs is not None
            logprobs = shapes[index].shaped(event.logprobs) if given else None
            timings = work.timings(index) if body.timings_per_token else None
            return self._chunk(index, event.text, logprobs, timings)
        if isinstance(event, ProgressEvent) and self._body.return_progress:
            return self._progress(event)
        return self._end(index, event.result) if isinstance(event, EndEvent) else b""

    def _progress(self, event: ProgressEvent) -> bytes:
        time_ms = round(1000 * (time.monotonic() - self._started))
        progress = {"total": event.total, "processed": event.done, "time_ms": time_ms}
        return self._events.event({"choices": [], "prompt_progress": progress})

    def _end(self, index: int, result: Result) -> bytes:
        choice = {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": replies.finish_reason(result),
            **self._extras(result),
        }
        timings = replies.timings(result.timings, result.usage.cached_tokens)
        return self._events.event({"choices": [choice], "timings": timings})

    def _chunk(self, index: int, text: str, logprobs: Any, timings: Any = None) -> bytes:
        members: dict[str, Any] = {"choices": [_choice(index, text, logprobs)]}
        if timings is not None:
            members["timings"] = timings
        return self._events.event(members)


def _choice(index: int, text: str, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
