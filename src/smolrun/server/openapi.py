"""The OpenAPI document, made from the table of routes and the models of requests."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

import smolrun

if TYPE_CHECKING:
    from smolrun.server.app import Route

_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "request_id": {"type": "string"},
            },
        }
    },
}
# Statuses of errors, and what they mean.
_ANYWHERE = {
    401: "no valid API key", 403: "the Host header names another machine",
    431: "headers too large",
}  # fmt: skip
_WITH_MODEL = {404: "no such model", 503: "loading, or about to end; see Retry-After"}
_WITH_BODY = {
    400: "a field can not be honoured; `param` names it",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "too many requests; see Retry-After",
    504: "the answer took too long",
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document."""
    bodies = [(route.body, "validation") for route in routes if route.body is not None]
    _, schemas = models_json_schema(bodies, ref_template=_REFERENCE)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "smolrun",
            "version": smolrun.__version__,
            "description": "SmolLM models under the routes of OpenAI, llama.cpp and vLLM.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {route.reply: {}}
    if route.streams:
        content["text/event-stream"] = {}
    if route.reply == "application/json":
        content[route.reply] = {"schema": {"type": "object"}}
    responses: dict[str, Any] = {"200": {"description": "the reply", "content": content}}
    errors = dict(_ANYWHERE)
    if route.path not in ("/health", "/openapi.json", "/docs", "/metrics"):
        errors |= _WITH_MODEL
    operation: dict[str, Any] = {
        "summary": (route.handler.__doc__ or "").strip().partition("\n")[0],
        "operationId": route.path.strip("/").replace("/", "_").replace("{model}", "one"),
        "security": [{"key": []}, {}],
    }
    if route.body is not None:
        errors |= _WITH_BODY
        reference = {"$ref": _REFERENCE.format(model=route.body.__name__)}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": reference}},
        }
    if "{model}" in route.path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    schema = {"$ref": _REFERENCE.format(model="Error")}
    for status, description in sorted(errors.items()):
        responses[str(status)] = {
            "description": description,
            "content": {"application/json": {"schema": schema}},
        }
    return {**operation, "responses": responses}


def page(routes: Sequence[Route]) -> str:
    """A page without scripts that shows the document."""
    found = document(routes)
    parts = [
        "<!doctype html><meta charset=utf-8><title>smolrun</title>",
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;"
        "padding:0 1rem}pre{background:#f4f4f4;padding:.8rem;overflow:auto}"
        "summary{cursor:pointer}code{font-weight:600}</style>",
        f"<h1>smolrun {html.escape(smolrun.__version__)}</h1>",
        "<p>Generated from <a href=openapi.json>openapi.json</a>.</p>",
    ]
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            parts.append(
                f"<h3><code>{method.upper()} {html.escape(path)}</code></h3>"
                f"<p>{html.escape(operation['summary'])}</p>"
            )
            body = operation.get("requestBody")
            if body:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                text = json.dumps(found["components"]["schemas"][name], indent=1)
                parts.append(
                    f"<details><summary>{html.escape(name)}</summary>"
                    f"<pre>{html.escape(text)}</pre></details>"
                )
    return "\n".join(parts)
