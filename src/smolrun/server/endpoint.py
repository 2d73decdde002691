"""What handlers of requests share: reading a body, and sending JSON or a stream of events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from smolrun.server import replies
from smolrun.server.errors import ApiError, api_error
from smolrun.server.fields import checked
from smolrun.server.json_body import parse_json
from smolrun.server.schema import Strict
from smolrun.server.service import Service
from smolrun.server.work import ClientGone, Work

T = TypeVar("T", bound=Strict)

logger = logging.getLogger("smolrun.server")

# A longer body is parsed on a thread: 2 MB of token ids take 0.1 s.
_SHORT_BODY = 32_768


async def read_body(request: Request, service: Service, kind: type[T]) -> tuple[dict[str, Any], T]:
    """The body of a request, as it is and checked.

    Raises:
        ApiError: it is not JSON, too large, too slow, or has fields that can not be.
        ClientGone: it does not come to its end.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415, f"Expected Content-Type: application/json, got {content_type[:100]!r}.",
            "unsupported_media_type",
        )  # fmt: skip
    try:
        body = await asyncio.wait_for(request.body(), service.limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"The body did not come within {service.limits.body_seconds:g} seconds.",
            "request_timeout", headers={"connection": "close"},
        ) from None  # fmt: skip
    except ClientDisconnect:
        raise ClientGone from None

    def parsed() -> tuple[dict[str, Any], T]:
        value = parse_json(body, service.limits.json_depth)
        return value, checked(value, kind)

    return parsed() if len(body) < _SHORT_BODY else await service.off_loop(parsed)


def prompts_of(value: Any) -> list[str | list[int]]:
    """Prompts of a checked request, each a text or token ids, whether one came or several."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)


def client_of(request: Request) -> str:
    """Whose request it is: a name made from its key, or nothing where no keys are needed."""
    return str(request.scope["state"].get("client", ""))


def json_reply(value: Any) -> Response:
    """A reply of 200."""
    return Response(replies.dumped(value), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events. An error on the way is told as an event, and ends them.

    Args:
        request: whose id an error tells.
        events: what is sent.
        work: whose answers end with this reply, however it ends.
    """

    def __init__(self, request: Request, events: AsyncIterator[bytes], work: Work) -> None:
        self._request = request
        self._work = work
        super().__init__(
            self._with_end(events),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Response`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.close()

    async def _with_end(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for event in events:
                yield event
        except Exception as error:
            told = api_error(error)
            self._request.scope["state"]["error"] = told.code
            if told.code == "internal_error":
                logger.error("stream failed", exc_info=error)
            yield replies.event(told.body(self._request.scope["state"].get("request_id")))
        yield replies.DONE
