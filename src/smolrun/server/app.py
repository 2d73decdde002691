"""The routes: one table, from which requests are dispatched and the OpenAPI document is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from smolrun.server import openapi, tokens
from smolrun.server.chat import chat_completions
from smolrun.server.completions import completions
from smolrun.server.edge import Edge
from smolrun.server.endpoint import json_reply
from smolrun.server.errors import ApiError, unavailable
from smolrun.server.metrics import CONTENT_TYPE
from smolrun.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ScoreRequest,
    Strict,
    TemplateRequest,
    TokenizeRequest,
)
from smolrun.server.service import Service

Handler = Callable[[Request, Service], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """One route."""

    method: str
    path: str
    handler: Handler
    body: type[Strict] | None = None
    reply: str = "application/json"  # its content type
    streams: bool = False
    summary: str = ""


async def health(request: Request, service: Service) -> Response:
    """The process lives."""
    return json_reply({"status": "ok", "state": service.state})


async def ready(request: Request, service: Service) -> Response:
    """Whether requests are answered now; 503 while the model loads and when the server ends."""
    if service.state != "ready":
        raise unavailable(f"The server is {service.state}.", service.state)
    return json_reply({"status": "ready"})


async def models(request: Request, service: Service) -> Response:
    """The model, under each of its names."""
    service.model()
    return json_reply({"object": "list", "data": [_card(service, n) for n in service.names]})


async def model(request: Request, service: Service) -> Response:
    """One of them."""
    name = request.path_params["model"]
    service.model(name)
    return json_reply(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "smolrun",
        "max_model_len": service.model().model.context_size,
    }


async def properties(request: Request, service: Service) -> Response:
    """What the model can do, and how requests are answered that do not say."""
    return json_reply(service.properties())


async def metrics(request: Request, service: Service) -> Response:
    """Counts and times for Prometheus."""
    return Response(service.metrics.page(), headers={"content-type": CONTENT_TYPE})


async def document(request: Request, service: Service) -> Response:
    """The OpenAPI document."""
    return json_reply(openapi.document(ROUTES))


async def docs(request: Request, service: Service) -> Response:
    """The OpenAPI document for people."""
    return Response(openapi.page(ROUTES), media_type="text/html")


_V1 = "/v1/chat/completions"
ROUTES: tuple[Route, ...] = (
    Route("POST", _V1, chat_completions, ChatRequest, streams=True),
    Route("POST", "/v1/completions", completions, CompletionRequest, streams=True),
    Route("POST", "/v1/score", tokens.score, ScoreRequest),
    Route("POST", "/v1/embeddings", tokens.embeddings, EmbeddingRequest),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/models/{model}", model),
    Route("POST", "/tokenize", tokens.tokenize, TokenizeRequest),
    Route("POST", "/detokenize", tokens.detokenize, DetokenizeRequest),
    Route("POST", "/apply-template", tokens.apply_template, TemplateRequest),
    Route("GET", "/health", health),
    Route("GET", "/ready", ready),
    Route("GET", "/props", properties),
    Route("GET", "/metrics", metrics, reply="text/plain"),
    Route("GET", "/openapi.json", document),
    Route("GET", "/docs", docs, reply="text/html"),
)
_EXACT = {path: [r for r in ROUTES if r.path == path] for path in (r.path for r in ROUTES)}
_MODEL_PREFIX = "/v1/models/"


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        routes = _EXACT.get(path, [])
        if not routes and path.startswith(_MODEL_PREFIX) and path != _MODEL_PREFIX:
            routes = _EXACT[_MODEL_PREFIX + "{model}"]
            scope["path_params"] = {"model": path[len(_MODEL_PREFIX) :]}
        if not routes:
            raise ApiError(404, f"There is nothing at {path[:200]!r}.", "not_found")
        for route in routes:
            if route.method == scope["method"]:
                response = await route.handler(Request(scope, receive), service)
                await response(scope, receive, send)
                return
        allowed = ", ".join(route.method for route in routes)
        raise ApiError(
            405, f"{scope['method'][:20]} is not possible here, {allowed} is.",
            "method_not_allowed", headers={"allow": allowed},
        )  # fmt: skip

    app: ASGIApp = Edge(dispatch, service)
    if service.settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("x-request-id", "retry-after"),
        )
    return app
