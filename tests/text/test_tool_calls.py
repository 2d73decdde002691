"""Calls of tools: what the grammar lets through is what the parser reads, and it validates."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from smolrun.errors import RequestError, SmolrunError
from smolrun.text.grammar import GrammarCompiler, Matcher
from smolrun.text.structure import structure_of
from smolrun.text.tokenizer import IncrementalDecoder, Tokenizer
from smolrun.text.tool_calls import CallDelta, ToolCallParser, ToolPlan, tool_matcher, tool_plan
from smolrun.text.tools import ToolCall, write_tool_calls

from .support import byte_tokenizer
from .test_structure import walk

BY_ID = byte_tokenizer(user_defined=["<think>", "</think>", "<tool_call>", "</tool_call>"])
BY_TEXT = byte_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BY_ID, BY_TEXT], ids=["ids", "text"])
COMPILERS = {id(t): GrammarCompiler(t, t.stop_ids()) for t in (BY_ID, BY_TEXT)}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"enum": ["c", "f"]},
            },
            "required": ["city", "unit"],
        },
    },
}
CLOCK: dict[str, Any] = {"name": "clock", "description": "What time it is."}
TOOLS: list[Any] = [WEATHER, CLOCK]
CLOSED: dict[str, Any] = {
    "get_weather": {**WEATHER["function"]["parameters"], "additionalProperties": False},
    "clock": {"type": "object", "properties": {}, "additionalProperties": False},
}


def read(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[CallDelta], ToolCallParser]:
    parser, decoder = ToolCallParser(tokenizer), IncrementalDecoder(tokenizer)
    texts: list[str] = []
    deltas: list[CallDelta] = []
    for token in ids:
        text, more = parser.push(token, decoder.push(token))
        texts.append(text)
        deltas += more
    texts.append(parser.flush())
    joined: dict[str, str] = {}
    for delta in deltas:
        joined[delta.id] = joined.get(delta.id, "") + delta.arguments
    for call in parser.calls:
        assert call.id is not None
        assert joined[call.id] == call.arguments_json
        assert json.loads(joined[call.id]) == call.arguments
    return "".join(texts), deltas, parser


CALLS = [
    ToolCall("get_weather", {"city": 'Ny"}<\\', "unit": "c"}),
    ToolCall("clock", {}),
    ToolCall("get_weather", {"city": "中 👍 ]}", "unit": "f"}),
]


@BOTH
@pytest.mark.parametrize("style", ["objects", "list"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_templates_show_is_read(tokenizer: Tokenizer, style: Any, count: int) -> None:
    for before in ("", "Let me see.", "A < b\n\n"):
        written = before + write_tool_calls(CALLS[:count], style)
        text, deltas, parser = read(tokenizer, tokenizer.encode(written))
        assert text == before.rstrip()
        found = [(call.name, call.arguments) for call in parser.calls]
        assert found == [(call.name, call.arguments) for call in CALLS[:count]]
        assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
        firsts = [delta for delta in deltas if delta.arguments == ""]
        assert [delta.index for delta in firsts] == list(range(count))
        assert len({call.id for call in parser.calls}) == count
        assert len(deltas) > 2 * count  # the arguments come piece by piece


@BOTH
def test_a_call_that_is_cut_off_is_no_call(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(write_tool_calls(CALLS[:2], "objects"))
    for cut in range(len(ids)):
        text, _, parser = read(tokenizer, ids[:cut])
        assert "<tool_call>".startswith(text.strip())
        assert len(parser.calls) < 2


@BOTH
def test_text_without_calls_is_left_as_it_is(tokenizer: Tokenizer) -> None:
    for text in ("", "a", "a \n\n b\n", "<tool", "1 < 2 <tool_x>", " \n"):
        assert read(tokenizer, tokenizer.encode(text))[0] == text


@BOTH
def test_an_empty_list_is_no_call(tokenizer: Tokenizer) -> None:
    """As SmolLM2 answers where no tool helps; one that must call some can not say it."""
    for written in ("<tool_call>[]</tool_call>", "Hm. <tool_call>\n[ ]\n</tool_call>"):
        text, deltas, parser = read(tokenizer, tokenizer.encode(written))
        assert (text, deltas, parser.calls) == (written.partition("<")[0].rstrip(), [], [])
    ids = tokenizer.encode("<tool_call>[]</tool_call>")

    def follow(matcher: Matcher) -> None:
        for token in ids:
            matcher.accept(token)

    followed = matcher(tokenizer, planned(), "list")
    follow(followed)
    assert followed.allowed()[list(tokenizer.stop_ids())].all()
    with pytest.raises(SmolrunError, match="^tools: "):
        follow(matcher(tokenizer, planned("required"), "list"))


def test_text_that_spells_the_tag_is_text_where_it_is_a_token() -> None:
    spelled = [token + 4 for token in BY_TEXT.encode("<tool_call>{}")]
    text, deltas, _ = read(BY_ID, spelled)
    assert (text, deltas) == ("<tool_call>{}", [])


def matcher(tokenizer: Tokenizer, plan: ToolPlan, style: Any, structure: Any = None) -> Any:
    return tool_matcher(COMPILERS[id(tokenizer)], tokenizer, plan, style, structure)


def planned(choice: Any = None, parallel: Any = None) -> ToolPlan:
    plan = tool_plan(TOOLS, choice, parallel)
    assert plan is not None
    return plan


@BOTH
@pytest.mark.parametrize("style", ["objects", "list"])
@pytest.mark.parametrize("choice", ["required", "get_weather", "clock"])
def test_every_call_is_read_and_validates(tokenizer: Tokenizer, style: Any, choice: str) -> None:
    whole = 0
    for seed in range(6):
        plan = planned(choice, parallel=bool(seed % 2))
        written, ids, complete = walk(tokenizer, matcher(tokenizer, plan, style), seed)
        if not complete:
            continue
        whole += 1
        text, _, parser = read(tokenizer, ids)
        assert text == ""
        assert parser.calls, written
        assert seed % 2 or len(parser.calls) == 1
        for call in parser.calls:
            assert choice in ("required", call.name)
            jsonschema.validate(call.arguments, CLOSED[call.name])
        written_again = write_tool_calls(parser.calls, style)
        assert json.dumps(written_again) == json.dumps(written) or "\\u" in written
    assert whole > 2


@BOTH
def test_automatic_choice_allows_text_calls_and_both(tokenizer: Tokenizer) -> None:
    ends = tokenizer.stop_ids()
    call = write_tool_calls(CALLS[:1], "objects")
    for written in ("Just text.", call, "See.\n" + call, "a < b " + call + "\n" + call):
        follow = matcher(tokenizer, planned(), "objects")
        for token in tokenizer.encode(written):
            assert follow.allowed()[token], written
            follow.accept(token)
        assert all(follow.allowed()[end] for end in ends)
    follow = matcher(tokenizer, planned(parallel=False), "objects")
    for token in tokenizer.encode("See. " + call):
        follow.accept(token)
    assert follow.complete


@BOTH
def test_inside_of_a_call_nothing_but_the_tools_is_allowed(tokenizer: Tokenizer) -> None:
    follow = matcher(tokenizer, planned(), "objects")
    for token in tokenizer.encode('So: <tool_call>\n{"name": "clock", "arguments": {'):
        follow.accept(token)
    allowed = [i for i in range(tokenizer.vocab_size) if follow.allowed()[i]]
    assert tokenizer.decode(allowed) == "}"


@BOTH
def test_a_structure_or_calls(tokenizer: Tokenizer) -> None:
    structure = structure_of(regex="[0-9]{3}")
    begins = {tokenizer.encode(digit)[0] for digit in "0123456789"}
    begins.add(tokenizer.encode("<tool_call>")[0])
    assert (
        set(np.flatnonzero(matcher(tokenizer, planned(), "objects", structure).allowed())) == begins
    )
    for written in ("123", write_tool_calls(CALLS[1:], "objects")):
        follow = matcher(tokenizer, planned(), "objects", structure)
        for token in tokenizer.encode(written):
            assert follow.allowed()[token]
            follow.accept(token)
        assert follow.complete == written.isdecimal()


def test_choices() -> None:
    assert tool_plan(None) is None
    assert tool_plan([], "auto") is None
    assert tool_plan(TOOLS, "none") is None
    assert planned() == ToolPlan(CLOSED, False, True)
    assert planned("required", False) == ToolPlan(CLOSED, True, False)
    assert planned("clock") == ToolPlan({"clock": CLOSED["clock"]}, True, True)
    assert planned({"type": "function", "function": {"name": "clock"}}) == planned("clock")


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


WRONG: list[tuple[list[Any] | None, Any, Any, str]] = [
    (None, "required", None, "tool_choice: 'required' needs tools"),
    ([], "clock", None, "tool_choice: 'clock' needs tools"),
    (TOOLS, "other", None, "tool_choice: expected auto, none, required or"),
    (TOOLS, 5, None, "tool_choice: expected a text"),
    (TOOLS, {"function": {}}, None, "tool_choice: expected the name"),
    (TOOLS, None, 1, "parallel_tool_calls: "),
    ([5], None, None, r"tools\[0\]: expected an object"),
    ([CLOCK, {"type": "function"}], None, None, r"tools\[1\].name: "),
    ([function(name="a b")], None, None, r"tools\[0\].function.name: "),
    ([function(name='x"')], None, None, r"tools\[0\].function.name: "),
    ([CLOCK, CLOCK], None, None, r"tools\[1\]: a second tool named 'clock'"),
    ([function(parameters=[])], None, None, r"tools\[0\].function.parameters: expected a JSON"),
    ([{"name": f"f{n}"} for n in range(129)], None, None, "tools: at most 128"),
]


@pytest.mark.parametrize(("tools", "choice", "parallel", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_refused_by_name(
    tools: Any, choice: Any, parallel: Any, message: str
) -> None:
    with pytest.raises(RequestError, match="^" + message):
        tool_plan(tools, choice, parallel)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "hiccup"},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(" * 10_000}}},
        {"$ref": "#/$defs/missing"},
    ],
    ids=["type", "pattern", "reference"],
)
def test_a_broken_schema_names_its_tool(parameters: dict[str, Any]) -> None:
    plan = tool_plan([CLOCK, function(parameters=parameters)])
    assert plan is not None
    with pytest.raises(RequestError, match="^tools: f: parameters: "):
        matcher(BY_ID, plan, "objects")
