"""Tools through `Model`: {streamed, whole} x {thinking or not} x {tools, tools and a schema}."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from smolrun import EndEvent, Model, RequestError, Result, TextEvent, ToolCallEvent
from smolrun.engine.sampling import SampledToken, Sampler
from smolrun.text.messages import THINK_OPEN
from tests.api.tiny import make_folder

QUESTION = "What is the weather in Oslo?"
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock", "description": "The time of day."}},
]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
          "additionalProperties": False}  # fmt: skip
# As the family's templates: tools in the system turn, results as turns of the user.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool }}
{% endfor %}<|im_end|>
{% endif -%}
{%- if python_tools %}<|im_start|>system
{{ python_tools | join("\n") }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role if message.role != "tool" else "user" }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>
{% endif -%}
{%- endif -%}
"""


@pytest.fixture(scope="module", params=[True, False], ids=["tokens", "text"])
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of which one has tokens for `<tool_call>`, and one spells it."""
    folder = make_folder(tmp_path_factory.mktemp("models") / "caller", max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    if request.param:
        path = folder / "tokenizer.json"
        values = json.loads(path.read_text())
        used = len(values["model"]["vocab"]) + len(values["added_tokens"])
        names = [token["content"] for token in values["added_tokens"]]
        assert "<think>" in names
        ids = {token["id"] for token in values["added_tokens"]} | set(
            values["model"]["vocab"].values()
        )
        assert len(ids) <= used
        # The last merges make room: ids must stay within the embedding.
        for content in ("<tool_call>", "</tool_call>"):
            place = max(ids) + 1
            ids.add(place)
            values["added_tokens"].append(
                {**values["added_tokens"][-1], "id": place, "content": content}
            )
        path.write_text(json.dumps(values))
        config = json.loads((folder / "config.json").read_text())
        assert max(ids) < config["vocab_size"]
    with Model(folder, threads=2) as model:
        yield model


def ask(model: Model, streamed: bool, **arguments: Any) -> Result:
    arguments = {"max_tokens": 400, "temperature": 1, "tools": TOOLS, **arguments}
    if not streamed:
        return model.chat(QUESTION, **arguments)
    *events, end = model.stream(QUESTION, **arguments)
    assert isinstance(end, EndEvent)
    result = end.result
    assert "".join(e.text for e in events if isinstance(e, TextEvent)) == result.text
    calls = [e for e in events if isinstance(e, ToolCallEvent)]
    for index, call in enumerate(result.tool_calls):
        own = [event for event in calls if event.index == index]
        assert {(event.id, event.name) for event in own} == {(call.id, call.name)}
        assert own[0].arguments_delta == ""
        assert "".join(event.arguments_delta for event in own) == call.arguments_json
    return result


def check(result: Result) -> None:
    for call in result.tool_calls:
        assert call.id
        schema = (
            PARAMETERS if call.name == "get_weather" else {"type": "object", "maxProperties": 0}
        )
        assert call.arguments_json is not None
        assert json.loads(call.arguments_json) == call.arguments
        jsonschema.validate(call.arguments, schema)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("think", [False, True], ids=["no-think", "think"])
@pytest.mark.parametrize("both", [False, True], ids=["tools", "tools+schema"])
def test_the_matrix(caller: Model, streamed: bool, think: bool, both: bool) -> None:
    opened = caller.tokenizer.id_of(THINK_OPEN)
    assert opened is not None
    extra: dict[str, Any] = {"think": think}
    if think:
        extra |= {"logit_bias": {opened: 100}, "thinking_budget": 20}
    if both:
        extra["response_format"] = SCHEMA
    for choice in ("required", "get_weather", "auto"):
        result = ask(
            caller, streamed, tool_choice=choice, parallel_tool_calls=False, seed=4, **extra
        )
        check(result)
        assert bool(result.usage.reasoning_tokens) == think
        assert result.usage.reasoning_tokens <= 20
        if choice != "auto":
            assert result.finish_reason == "tool_calls"
            assert len(result.tool_calls) == 1
            assert result.text == ""
            assert choice in ("required", result.tool_calls[0].name)
        elif both:
            assert result.finish_reason in ("stop", "tool_calls")
            assert bool(result.tool_calls) == (result.text == "")
            if result.text:
                jsonschema.validate(json.loads(result.text), SCHEMA)


def test_no_tool_is_called_where_none_may_be(caller: Model) -> None:
    plain = caller.chat(QUESTION, temperature=0, max_tokens=20, think=False)
    none = caller.chat(
        QUESTION, temperature=0, max_tokens=20, think=False, tools=TOOLS, tool_choice="none"
    )
    assert none.token_ids == plain.token_ids
    assert none.tool_calls == ()


def test_a_call_that_is_cut_off_is_no_call(caller: Model) -> None:
    whole = ask(caller, False, tool_choice="clock", seed=1, think=False, parallel_tool_calls=False)
    count = len(whole.token_ids)
    for limit in (1, count - 1):
        cut = ask(
            caller, True, tool_choice="clock", seed=1, think=False, parallel_tool_calls=False,
            max_tokens=limit,
        )  # fmt: skip
        assert (cut.tool_calls, cut.finish_reason) == ((), "length")
        assert "<tool_call>".startswith(cut.text)  # where it is spelled, its first bytes are text


def test_the_model_sees_its_calls_and_their_results(caller: Model) -> None:
    result = ask(caller, False, tool_choice="get_weather", seed=1, think=False)
    (call, *_) = result.tool_calls
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"},
    ]
    text = caller.render(messages, tools=TOOLS)
    rendered = re.search(r"<tool_call>\n(.*)\n</tool_call>", text)
    assert rendered is not None
    assert json.loads(rendered[1]) == {"name": call.name, "arguments": call.arguments}
    assert text.index("12 degrees") > rendered.end()
    again = caller.chat(messages, tools=TOOLS, think=False, max_tokens=8, temperature=0)
    assert again.usage.completion_tokens > 0


def test_wrong_arguments_are_refused(caller: Model) -> None:
    for arguments, name in (
        ({"tools": [{"name": "a b"}]}, r"tools\[0\].name"),
        ({"tool_choice": "other"}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"ignore_eos": True}, "ignore_eos and tools"),
    ):
        with pytest.raises(RequestError, match="^" + name):
            ask(caller, True, **arguments)


@pytest.fixture(scope="module")
def trained(shared_data: Path) -> Iterator[Model]:
    with Model(shared_data / "tiny-smollm3", threads=2) as model:
        yield model


def test_with_the_template_of_smollm3(trained: Model) -> None:
    for arguments in ({"think": False}, {"think": True, "thinking_budget": 20}):
        result = ask(
            trained, True, tool_choice="get_weather", parallel_tool_calls=False, **arguments
        )
        check(result)
        assert result.finish_reason == "tool_calls"
        assert result.tool_calls[0].name == "get_weather"


PYTHON = {"python_tools": ["def get_weather(city: str, days: int = 1) -> str: ..."]}
WRITTEN = "Let me see.\n<code>\nprint(get_weather('Oslo', days=2))\n</code>"


def scripted(monkeypatch: pytest.MonkeyPatch, model: Model, text: str) -> None:
    """From now on the model answers everything with a text."""
    script = [*model.tokenize(text), model.tokenize("<|im_end|>")[0]]

    def sample(self: Sampler, logits: Any, position: int) -> SampledToken:
        if not hasattr(self, "script"):
            self.__dict__["script"] = iter(script)
        return SampledToken(next(self.__dict__["script"]))

    monkeypatch.setattr(Sampler, "sample", sample)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_calls_written_as_python(
    caller: Model, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    scripted(monkeypatch, caller, WRITTEN)
    asked: dict[str, Any] = {"tools": None, "think": False, "template_arguments": PYTHON}
    result = ask(caller, streamed, **asked)
    assert (result.text, result.finish_reason) == ("Let me see.", "tool_calls")
    (call,) = result.tool_calls
    assert (call.name, call.arguments) == ("get_weather", {"city": "Oslo", "days": 2})
    for changes in ({"tool_choice": "none"}, {"template_arguments": None}):
        assert ask(caller, streamed, **{**asked, **changes}).text == WRITTEN
    with pytest.raises(RequestError, match=r"^parallel_tool_calls: "):
        ask(caller, streamed, **asked, parallel_tool_calls=False)
    # The model sees its call as it wrote it.
    past: list[dict[str, Any]] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {
            "name": call.name, "arguments": call.arguments_json}}]},
        {"role": "tool", "content": "Rain."},
    ]  # fmt: skip
    text = caller.template.render(past, template_arguments=PYTHON)
    assert "<code>\nget_weather(city='Oslo', days=2)\n</code>" in text


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tools_in_python_beside_others(
    caller: Model, trained: Model, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Both are offered to the model, and it may call either, in its own way."""
    called = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    asked: dict[str, Any] = {"think": False, "template_arguments": PYTHON, "tools": TOOLS[1:]}
    for model in (caller, trained):
        for text, names in (
            (WRITTEN, ["get_weather"]),
            (f"Let me see.\n{called}", ["clock"]),
            (f"{WRITTEN}\n{called}", ["get_weather", "clock"]),
        ):
            scripted(monkeypatch, model, text)
            result = ask(model, streamed, **asked)
            assert (result.text, result.finish_reason) == ("Let me see.", "tool_calls")
            assert [call.name for call in result.tool_calls] == names
        with pytest.raises(RequestError, match=r"^parallel_tool_calls: "):
            ask(model, streamed, **asked, parallel_tool_calls=False)
        past: list[dict[str, Any]] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [
                {"name": name, "arguments": {}} for name in ("get_weather", "clock", "other")]},
        ]  # fmt: skip
        text = model.template.render(past, tools=TOOLS[1:], template_arguments=PYTHON)
        assert f"<code>\nget_weather()\n</code>\n{called}\n<tool_call>" in text
        assert "def get_weather" in text
        monkeypatch.undo()
        # A form that the answer must have leaves no room for Python.
        result = ask(model, streamed, **asked, tool_choice="required", max_tokens=400)
        assert {call.name for call in result.tool_calls} <= {"clock"}
        assert "<code>" not in result.text


def test_tools_under_the_name_that_a_template_has_for_them(trained: Model) -> None:
    asked: dict[str, Any] = {"tools": None, "think": False, "parallel_tool_calls": False}
    result = ask(
        trained, True, tool_choice="get_weather", template_arguments={"xml_tools": TOOLS}, **asked
    )
    check(result)
    assert (result.finish_reason, result.tool_calls[0].name) == ("tool_calls", "get_weather")
    # What describes no function is text for the model, and nothing that can be called.
    for odd in (["f(x)"], [{"name": "a b"}], [TOOLS[0], TOOLS[0]]):
        arguments = {"template_arguments": {"xml_tools": odd}, "max_tokens": 3}
        assert ask(trained, False, **asked, **arguments).tool_calls == ()
        with pytest.raises(RequestError, match="needs tools"):
            ask(trained, False, tool_choice="required", **asked, **arguments)
