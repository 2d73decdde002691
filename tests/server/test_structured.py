"""Structure through the server: schemas, expressions, grammars, with and without thinking."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from smolrun import Model
from smolrun.server.service import Settings
from tests.waiting import eventually

from .running import CHAT, GREEDY, Running, chunks_of

SCHEMA = {
    "type": "object",
    "properties": {"sky": {"enum": ["blue", "grey"]}, "sure": {"type": "boolean"}},
    "required": ["sky", "sure"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA}}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": AS_SCHEMA}, "schema"),
    ({"guided_json": SCHEMA}, "schema"),
    ({"json_schema": SCHEMA}, "schema"),
    ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
    ({"guided_regex": "[ab]{3}c"}, "[ab]{3}c"),
    ({"choices": ["yes", "no"]}, "yes|no"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"grammar": 'start: "x" | "yz"'}, "x|yz"),
    ({"grammar": 'root ::= "x" | "yz"'}, "x|yz"),
]


def message_of(server: Running, body: dict[str, Any], stream: bool) -> tuple[str, str, str | None]:
    """Content, reasoning and why it ended."""
    if not stream:
        reply = server.post(CHAT, body)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        message = choice["message"]
        return message["content"], message.get("reasoning_content", ""), choice["finish_reason"]
    with server.client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        choices = [choice for chunk in chunks_of(reply) for choice in chunk["choices"]]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    reasoning = "".join(choice["delta"].get("reasoning_content", "") for choice in choices)
    return content, reasoning, choices[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(("fields", "form"), FORMS, ids=lambda v: f"{v!r:.40}")
def test_answers_have_the_form(
    server: Running, fields: dict[str, Any], form: str, think: bool, stream: bool
) -> None:
    body = {**GREEDY, "max_tokens": 120, **fields}
    body |= {"think": True, "thinking_budget": 12} if think else {"think": False}
    content, reasoning, reason = message_of(server, body, stream)
    assert reason == "stop"
    if form == "schema":
        found = json.loads(content)
        assert found.keys() == {"sky", "sure"}
        assert found["sky"] in ("blue", "grey")
    else:
        assert re.fullmatch(form, content)
    assert bool(reasoning) <= think


def test_any_object(server: Running) -> None:
    body = {**GREEDY, "max_tokens": 60, "response_format": {"type": "json_object"}, "think": False}
    content, _, reason = message_of(server, body, False)
    assert content.lstrip().startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(content), dict)
    plain = {**GREEDY, "response_format": {"type": "text"}}
    assert server.answer(response_format={"type": "text"}) == server.expected
    assert server.post(CHAT, plain).status_code == 200


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: list[dict[str, Any]] = [  # API-06
    *[{"regex": r} for r in ("(" * 10_000, "(?=a)b", "[", "(a+)+$(")],
    {"grammar": "start: nowhere"},
    {"grammar": "((("},
    {"choices": []},
    {"json_schema": {"type": "hiccup"}},
    {"json_schema": {"$ref": "#/nowhere"}},
    {"json_schema": {"$ref": "http://127.0.0.1:9/x"}},
    {"response_format": AS_SCHEMA, "regex": "a"},
    {"regex": "a", "choices": ["b"]},
    {"response_format": AS_SCHEMA, "json_schema": SCHEMA},
    # A megabyte.
    {"json_schema": {"enum": [f"{n:09}" for n in range(80_000)]}},
    {"json_schema": {"const": "x" * 1_000_000}},
    {"regex": "a" * 1_000_000},
    {"grammar": 'start: "' + "a" * 1_000_000 + '"'},
    {"choices": ["x" * 10_000] * 100},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda v: f"{v!r:.50}")
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_structure_is_refused(
    healthy: Running, fields: dict[str, Any], stream: bool
) -> None:
    reply = healthy.post(CHAT, {**GREEDY, **fields, "stream": stream, "max_tokens": 5})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"]


HEAVY: list[dict[str, Any]] = [
    *[{"regex": r} for r in ("foo**", "^+a", "^{2}x")],  # odd, and not wrong in Rust's syntax
    {"json_schema": {"type": "string", "pattern": "foo**"}},
    {"json_schema": nested(60)},
    {"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}},
    {"regex": "(a+)+$"},
    {"regex": "(a{1,1000}){1,1000}"},
    {"choices": ["x" * 200] * 1000},
    {"json_schema": {"enum": [f"{n:09}" for n in range(15_000)]}},  # nearly all that may be asked
    {"regex": "a" * 250_000},
]


@pytest.mark.parametrize("fields", HEAVY, ids=lambda v: f"{v!r:.50}")
def test_heavy_structure_is_bounded(healthy: Running, fields: dict[str, Any]) -> None:
    reply = healthy.post(CHAT, {**GREEDY, **fields, "max_tokens": 5})
    assert reply.status_code in (200, 400), reply.text


def test_completions_have_structure_too(server: Running) -> None:
    body = {"prompt": "Is it?", "choices": ["yes", "no"], "max_tokens": 20}
    reply = server.post("/v1/completions", body).json()
    assert reply["choices"][0]["text"] in ("yes", "no")


def test_the_vocabulary_is_prepared_at_the_start(folder: Path) -> None:
    with Model(folder, threads=1) as model:
        grammars = model.loaded.grammars
        assert grammars is not None
        assert not grammars.prepared
        with Running(model, Settings()):
            assert eventually(lambda: grammars.prepared)
