"""What every request passes on its way in and out: its id, who sends it, how large it is, the log.

An error of any kind leaves here as an OpenAI error object.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from smolrun.server import replies
from smolrun.server.errors import ApiError, api_error
from smolrun.server.service import Service
from smolrun.server.work import ClientGone

PUBLIC_PATHS = frozenset({"/health", "/ready"})
"""Paths that need no key."""

logger = logging.getLogger("smolrun.server")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_GONE = 499  # nginx's status for a client that left; nobody reads it but the log


class Edge:
    """An ASGI application around `app`.

    Args:
        app: answers, or raises.
        service: whose settings say who may come in.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], service: Service) -> None:
        self._app = app
        self._service = service
        self._limits = service.limits
        self._keys = [key.encode() for key in service.settings.api_keys]
        self._checks_host = is_loopback(service.settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        started = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self._request_id(headers)
        state: dict[str, Any] = {"request_id": request_id}
        scope["state"] = state
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message["headers"], own]}
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(receive, headers), sending)
        except Exception as error:
            if isinstance(error, ClientGone):
                told = ApiError(_GONE, "The client has gone.", "client_gone")
            else:
                told = api_error(error, state.get("prompt_field", "messages"))
            state["error"] = told.code
            if told.code == "internal_error":
                logger.error("request failed", exc_info=error, extra={"id": request_id})
            if status:
                raise  # the reply has begun: only its connection can be closed
            await _reply(sending, told, request_id)
        finally:
            self._service.metrics.requests.labels(str(status)).inc()
            self._log(scope, status, started)

    def _request_id(self, headers: dict[bytes, bytes]) -> str:
        given = headers.get(b"x-request-id", b"")
        return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        fields = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in fields)
        size += len(scope["raw_path"]) + len(scope["query_string"])
        if len(fields) > self._limits.header_fields or size > self._limits.header_bytes:
            raise ApiError(
                431,
                f"The headers are larger than {self._limits.header_bytes} bytes or more than "
                f"{self._limits.header_fields}.",
                "headers_too_large",
                headers={"connection": "close"},
            )
        hosts = [value for name, value in fields if name == b"host"]
        if self._checks_host and (len(hosts) != 1 or not _is_local_host(hosts[0])):
            raise ApiError(
                403,
                "This server listens on this machine only, and the Host header names another; "
                "start it with --host to serve others.",
                "host_not_allowed",
                kind="permission_error",
            )
        if self._keys and scope["path"] not in PUBLIC_PATHS:
            scope["state"]["client"] = self._client(headers.get(b"authorization", b""))
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    def _client(self, authorization: bytes) -> str:
        """A short name of whoever holds the key, which does not give the key away."""
        scheme, _, given = authorization.partition(b" ")
        # Every key is compared in full, whatever the others were.
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "A valid API key is needed: Authorization: Bearer KEY.",
                "invalid_api_key",
                kind="authentication_error",
                headers={"www-authenticate": "Bearer"},
            )
        return hashlib.sha256(b"smolrun" + self._keys[matches.index(True)]).hexdigest()[:12]

    def _limited(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """`receive`, for bodies that do not say how long they are."""
        if b"content-length" in headers:
            return receive
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._limits.body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The body is larger than {self._limits.body_bytes} bytes.",
            "body_too_large",
            headers={"connection": "close"},
        )

    def _log(self, scope: Scope, status: int, started: float) -> None:
        state = scope["state"]
        logger.info(
            "request",
            extra={
                "id": state["request_id"],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round(1000 * (time.monotonic() - started), 1),
                **{k: v for k, v in state.items() if k in ("client", "error", "usage")},
            },
        )


async def _reply(send: Send, error: ApiError, request_id: str) -> None:
    body = replies.dumped(error.body(request_id))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_local_host(header: bytes) -> bool:
    """Whether a Host header names this machine: a page elsewhere can not make it do so."""
    text = header.decode("latin-1")
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    return (not port or port.isdecimal()) and is_loopback(host)
