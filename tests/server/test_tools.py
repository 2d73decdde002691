"""Tools through the server: {whole, streamed} x {thinking or not} x {schema, tool, both}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from smolrun import Model
from smolrun.server.service import Settings
from tests.api.test_tools import (
    PARAMETERS,
    PYTHON,
    QUESTION,
    SCHEMA,
    TEMPLATE,
    TOOLS,
    WRITTEN,
    scripted,
)
from tests.api.tiny import make_folder
from tests.waiting import SECONDS

from .running import CHAT, Running, chunks_of

USER = {"role": "user", "content": QUESTION}
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
BROKEN = {"name": "f", "parameters": {"type": "hiccup"}}
FORM = {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}
BODY: dict[str, Any] = {"messages": [USER], "max_tokens": 300, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose template has a place for tools."""
    folder: Path = make_folder(
        tmp_path_factory.mktemp("models") / "caller", max_position_embeddings=2048
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with (
        Model(folder, threads=1, max_sequences=4) as model,
        Running(model, Settings(names=("caller",))) as running,
    ):
        yield running


def ask(server: Running, body: dict[str, Any], stream: bool) -> dict[str, Any]:
    """A choice, put together from its deltas where it is streamed."""
    if not stream:
        reply = server.post(CHAT, body)
        assert reply.status_code == 200, reply.text
        return dict(reply.json()["choices"][0])
    with server.client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        choices = [choice for chunk in chunks_of(reply) for choice in chunk["choices"]]
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for choice in choices:
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function"
                message["tool_calls"].append(call)
            else:
                part = message["tool_calls"][call["index"]]["function"]
                part["arguments"] += call["function"]["arguments"]
    return {"message": message, "finish_reason": choices[-1]["finish_reason"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("what", ["schema", "tool", "both"])
def test_thinking_schema_and_tools(caller: Running, what: str, think: bool, stream: bool) -> None:
    body = dict(BODY)
    body |= {"think": True, "thinking_budget": 16} if think else {"think": False}
    if what in ("tool", "both"):
        body |= {"tools": TOOLS, "tool_choice": WEATHER, "parallel_tool_calls": False}
    if what in ("schema", "both"):
        body |= {"response_format": FORM}
    choice = ask(caller, body, stream)
    message = choice["message"]
    assert bool(message.get("reasoning_content")) <= think
    if what == "schema":
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(message["content"]), SCHEMA)
        return
    assert choice["finish_reason"] == "tool_calls"
    assert not message["content"]
    call = message["tool_calls"][0]
    assert call["id"]
    assert call["function"]["name"] == "get_weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)


def test_choices_of_tools(caller: Running) -> None:
    body = {**BODY, "think": False, "tools": TOOLS}
    none = ask(caller, {**body, "tool_choice": "none", "max_tokens": 10}, False)
    assert not none["message"].get("tool_calls")
    required = {**body, "tool_choice": "required", "parallel_tool_calls": False}
    calls = ask(caller, required, False)["message"]["tool_calls"]
    assert len(calls) == 1
    for wrong, param in (
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
        ({"tools": TOOLS[:1] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {**BROKEN}}]}, "tools"),
    ):  # fmt: skip
        fields: dict[str, Any] = wrong
        reply = caller.post(CHAT, {**body, **fields})
        assert reply.status_code == 400, wrong
        assert str(reply.json()["error"]["param"]).startswith(param)
    caller.check_health()


def test_a_model_that_knows_no_tools(server: Running) -> None:
    reply = server.post(CHAT, {**BODY, "tools": TOOLS})
    assert reply.status_code == 400
    assert "no place for tools" in reply.json()["error"]["message"]


def test_a_whole_conversation(caller: Running) -> None:
    """Calls come back as OpenAI's client sends them, and the model sees them and their results."""
    with openai.OpenAI(base_url=caller.url + "/v1", api_key="none", timeout=SECONDS) as client:
        tools: Any = TOOLS
        messages: list[Any] = [USER]
        first = client.chat.completions.create(
            model="caller", messages=messages, tools=tools, tool_choice="required", seed=1,
            max_tokens=300, temperature=0, extra_body={"think": False},
        )  # fmt: skip
        message = first.choices[0].message
        assert message.tool_calls
        messages.append(message)  # the whole object, as their documentation does
        for call in message.tool_calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "It is 3 degrees"})
        second = client.chat.completions.create(
            model="caller", messages=messages, tools=tools, max_tokens=10, temperature=0
        )
        assert second.usage is not None
        dumped = [m if isinstance(m, dict) else m.model_dump() for m in messages]
        body = {"messages": dumped, "tools": TOOLS}
        prompt = caller.post("/apply-template", body).json()["prompt"]
        assert "It is 3 degrees" in prompt
        assert message.tool_calls[0].to_dict()["function"]["name"] in prompt  # type: ignore[index]
        assert "<tool_call>" in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_calls_written_as_python(
    caller: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with monkeypatch.context() as patched:
        scripted(patched, caller.model, WRITTEN)
        body = {**BODY, "chat_template_kwargs": PYTHON}
        choice = ask(caller, body, stream)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 2}
