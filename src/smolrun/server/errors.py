"""Errors as OpenAI's clients expect them, and which of ours becomes which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from smolrun.errors import (
    ClosedError,
    ContextLengthError,
    DeadlineError,
    NonFiniteError,
    QueueFullError,
    RequestError,
    ResourceError,
    SmolrunError,
    TemplateError,
)

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: for people; says what was expected and found.
        code: for programs.
        kind: OpenAI's `type`.
        param: the field of the request that is at fault.
        headers: of the reply.
        extra: further members of the error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.kind = kind
        self.param = param
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The error object, with the id under which the log has the request."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
            **self.extra,
        }
        if request_id is not None:
            error["request_id"] = request_id
        return {"error": error}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: a field of the request can not be honoured."""
    return ApiError(400, f"{param}: {message}", code, param=param)


def unsupported(param: str, why: str) -> ApiError:
    """400: a field that this server knows and does not honour."""
    return invalid(param, why, "unsupported_parameter")


def unavailable(message: str, code: str, seconds: int = 5) -> ApiError:
    """503: not this process, or not now."""
    return ApiError(
        503,
        message,
        code,
        kind="service_unavailable_error",
        headers={"retry-after": str(min(max(seconds, 1), 30))},
    )


# The field that a RequestError begins with.
_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+|\[\d+\])*):? ")


def api_error(error: BaseException, context_param: str = "messages") -> ApiError:
    """What a client is told of an exception.

    Args:
        error: that ended its request.
        context_param: the field that a prompt which is too long came from.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(
            400,
            f"This model's context holds {error.context_size} tokens, and your prompt has "
            f"{error.prompt_tokens}; shorten it, or restart the server with a larger context.",
            "context_length_exceeded",
            param=context_param,
            extra={"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_size},
        )
    if isinstance(error, RequestError):
        found = _FIELD.match(str(error))
        return ApiError(400, str(error), "invalid_value", param=found.group(1) if found else None)
    if isinstance(error, TemplateError):
        return ApiError(400, _without_origin(str(error)), "template_error", param=context_param)
    if isinstance(error, QueueFullError):
        return ApiError(
            429, str(error), "queue_full", kind="rate_limit_error",
            headers={"retry-after": str(error.retry_after)},
        )  # fmt: skip
    if isinstance(error, DeadlineError) and not error.started:
        return unavailable(str(error), "queue_timeout")
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), "timeout", kind="timeout_error")
    if isinstance(error, ClosedError):
        return unavailable(str(error), "shutting_down")
    if isinstance(error, ResourceError):
        return unavailable(str(error), "insufficient_resources")
    if isinstance(error, NonFiniteError):
        return ApiError(500, str(error), "non_finite_logits", kind="server_error")
    if isinstance(error, SmolrunError):
        return ApiError(500, str(error), "request_failed", kind="server_error")
    return ApiError(
        500, "The server failed at this request; its log says more.", "internal_error",
        kind="server_error",
    )  # fmt: skip


def _without_origin(message: str) -> str:
    """A template's error without the path of the model's file, which is no client's business."""
    return re.sub(r"^/[^:]*: ", "", message)
