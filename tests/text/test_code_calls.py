"""Calls of tools that a model writes as Python: read, never run; text where they are more."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from smolrun.errors import SmolrunError
from smolrun.text.code_calls import (
    MAX_CODE,
    CodeCallParser,
    MixedCallParser,
    calls_in,
    signatures_of,
)
from smolrun.text.grammar import GrammarCompiler
from smolrun.text.messages import MessageStyle, normalize_messages
from smolrun.text.tokenizer import IncrementalDecoder, Tokenizer
from smolrun.text.tool_calls import tool_matcher, tool_plan
from smolrun.text.tools import ToolCall, write_tool_calls

from .support import byte_tokenizer

BY_ID = byte_tokenizer(user_defined=["<code>", "</code>"])
BY_TEXT = byte_tokenizer()
BOTH = pytest.mark.parametrize("tokenizer", [BY_ID, BY_TEXT], ids=["ids", "text"])

TOOLS: list[Any] = [
    "def get_weather(city: str, days: int = 1) -> str:\n    '''The weather of a city.'''",
    {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}},
    "def move(*, to: list)",
    "lookup(word) -> what it means",
]
SIGNATURES = signatures_of(TOOLS)


def read(
    tokenizer: Tokenizer,
    text: str,
    kind: type[CodeCallParser] | type[MixedCallParser] = CodeCallParser,
) -> tuple[str, list[ToolCall]]:
    """What is left as text, and the calls; what is streamed must join to them."""
    parser, decoder = kind(tokenizer, SIGNATURES), IncrementalDecoder(tokenizer)
    passed = ""
    joined: dict[tuple[int, str, str], str] = {}
    for token in tokenizer.encode(text):
        piece, deltas = parser.push(token, decoder.push(token))
        passed += piece
        for delta in deltas:
            key = (delta.index, delta.id, delta.name)
            assert (key in joined) == bool(delta.arguments), "the first names the call"
            joined[key] = joined.get(key, "") + delta.arguments
    passed += parser.flush()
    assert joined == {
        (index, call.id, call.name): call.arguments_json for index, call in enumerate(parser.calls)
    }
    assert all(json.loads(call.arguments_json or "") == call.arguments for call in parser.calls)
    return passed, parser.calls


def test_signatures() -> None:
    assert SIGNATURES == {
        "get_weather": ["city", "days"], "clock": ["zone"], "move": [], "lookup": None,
    }  # fmt: skip
    assert (
        signatures_of([7, None, "", "not a function", {"name": 5}, "((((", {"function": 3}]) == {}
    )


def test_what_the_recorded_cases_offer_can_be_called(shared_data: Path) -> None:
    cases = json.loads((shared_data / "smollm3_template_cases.json").read_text())
    offered = [case["kwargs"]["python_tools"] for case in cases if "python_tools" in case["kwargs"]]
    assert [signatures_of(tools) for tools in offered] == [{"f": ["x"]}, {"f": []}]
    assert calls_in("f(3)", signatures_of(offered[0])) == [("f", {"x": 3})]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('get_weather(city="Copenhagen")', [("get_weather", {"city": "Copenhagen"})]),
        ('get_weather("Oslo", 3)', [("get_weather", {"city": "Oslo", "days": 3})]),
        ("get_weather('Oslo', days=-3)", [("get_weather", {"city": "Oslo", "days": -3})]),
        ("print(clock())", [("clock", {})]),
        ("now = clock(zone=None)  # the time", [("clock", {"zone": None})]),
        ("clock(zone=true)", [("clock", {"zone": True})]),
        (
            'a = clock()\nprint(get_weather("Zürich"), clock(zone="x"))',
            [("clock", {}), ("get_weather", {"city": "Zürich"}), ("clock", {"zone": "x"})],
        ),
        (
            "move(\n    to=[1, 2.5, (False, 'a' 'b'), {'k': [null]}],\n)",
            [("move", {"to": [1, 2.5, [False, "ab"], {"k": [None]}]})],
        ),
        (r"clock(zone='\d </code')", [("clock", {"zone": r"\d </code"})]),
        ("lookup(word='def')", [("lookup", {"word": "def"})]),
    ],
)
@BOTH
def test_calls(tokenizer: Tokenizer, code: str, expected: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for opened, closed in (("<code>", "</code>"), ("<code>\n", "\n</code>")):
            text, calls = read(tokenizer, f"Let me see.\n{opened}{code}{closed}\n")
            assert text == "Let me see."
            assert [(call.name, call.arguments) for call in calls] == expected


ALL_BY_ID = byte_tokenizer(user_defined=["<code>", "</code>", "<tool_call>", "</tool_call>"])
JSON_CALLS = """<tool_call>
{"name": "clock", "arguments": {"zone": "</code>"}}
</tool_call>
<tool_call>
{"name": "other", "arguments": {}}
</tool_call>"""


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("Hi.", "Hi.", []),
        ("Hi.\n<code>clock()</code>\n", "Hi.", ["clock"]),
        (f"Hi.\n{JSON_CALLS}", "Hi.", ["clock", "other"]),
        (f"A\n<code>lookup(word=1)</code>\n{JSON_CALLS}", "A", ["lookup", "clock", "other"]),
        (f"<code>\nx = 5\n</code>\n{JSON_CALLS}", "<code>\nx = 5\n</code>", ["clock", "other"]),
        (f"<code>clock(\n{JSON_CALLS}", "<code>clock(", ["clock", "other"]),
        ("a <code> b", "a <code> b", []),
    ],
)
@pytest.mark.parametrize("tokenizer", [ALL_BY_ID, BY_ID, BY_TEXT], ids=["ids", "code", "text"])
def test_calls_of_both_kinds(tokenizer: Tokenizer, text: str, left: str, names: list[str]) -> None:
    found, calls = read(tokenizer, text, MixedCallParser)
    assert (found, [call.name for call in calls]) == (left, names)


@pytest.mark.parametrize("tokenizer", [ALL_BY_ID, BY_ID, BY_TEXT], ids=["ids", "code", "text"])
def test_the_grammar_of_calls_leaves_room_for_code(tokenizer: Tokenizer) -> None:
    grammars = GrammarCompiler(tokenizer, tokenizer.stop_ids())
    plan = tool_plan([{"name": "clock"}])
    assert plan is not None

    def follow(text: str, code: bool) -> None:
        matcher = tool_matcher(grammars, tokenizer, plan, "objects", None, code=code)
        for token in tokenizer.encode(text):
            matcher.accept(token)

    called = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    for text in ("<code>", "A\n<code>\nf(1)\n</code>\nB", "<code>1</code><code></code>"):
        follow(text, True)
        follow(f"{text}\n{called}", True)
        if tokenizer is not BY_TEXT:  # where tags are tokens, text is without them
            with pytest.raises(SmolrunError, match="^tools: "):
                follow(text, False)
    with pytest.raises(SmolrunError, match="^tools: "):
        follow(f"<code></code>{called}B", True)


NOT_CALLS = [
    "",
    "x = 5",
    "import os",
    "__import__('os').system('true')",
    "eval('clock()')",
    "clock().zone",
    "clock(zone=open('/etc/passwd').read())",
    "clock(zone=x)",
    "clock(zone=f'{1}')",
    "clock(zone=b'bytes')",
    "clock(zone=1j)",
    "clock(zone=1e999)",
    "clock(zone=...)",
    "clock(zone={1: 2})",
    "clock(zone={1, 2})",
    "clock(zone={**{}})",
    "clock(zone=-True)",
    "clock(zone='a' + 'b')",
    "clock(zone='a', zone='b')",
    "clock('a', zone='b')",
    "clock('a', 'b')",
    "clock(*[1])",
    "clock(**{'zone': 'a'})",
    "lookup('def')",  # nobody knows what its parameter is called
    "other()",
    "a.clock()",
    "a.b = clock()",
    "for _ in range(9): clock()",
    "lambda: clock()",
    "print()",
    "print(1)",
    "print(clock(), end='')",
    "clock(",
    "clock() \x00",
    "await clock()",
]


@pytest.mark.parametrize("code", NOT_CALLS)
@BOTH
def test_what_is_more_than_calls_stays_text(tokenizer: Tokenizer, code: str) -> None:
    assert calls_in(code, SIGNATURES) is None
    text = f"See:\n\n<code>\n{code}\n</code> and on"
    assert read(tokenizer, text) == (text, [])
    # Calls beside it are found all the same.
    left, calls = read(tokenizer, f"{text} <code>clock()</code>")
    assert (left, [call.name for call in calls]) == (text, ["clock"])


@pytest.mark.parametrize(
    "code",
    [
        "(" * 60_000,
        "clock(zone=" + "[" * 30_000 + "]" * 30_000 + ")",
        "clock(zone=" + "-" * 60_000 + "1)",
        "clock(zone=" + "not " * 15_000 + "1)",
        "clock(zone=" + "1+" * 30_000 + "1)",
        "clock" + ".a" * 30_000 + "()",
        "clock" + "()" * 30_000,
        "clock(zone=" + "lambda: " * 8_000 + "1)",
        "clock(zone=" + "1 if 1 else " * 5_000 + "1)",
        "clock(zone=" + "9" * 60_000 + ")",
        "if 1:\n" + "".join(" " * n + "if 1:\n" for n in range(1, 300)),
        "clock(zone='" + "a" * MAX_CODE + "')",
        "\ud800",
    ],
    ids=range(13),
)
def test_hostile_code_is_text(code: str) -> None:
    assert calls_in(code, SIGNATURES) is None
    signatures_of([code])


@BOTH
def test_a_block_that_is_cut_off_is_text(tokenizer: Tokenizer) -> None:
    for text in ("a <code>clock()", "a <code>", "a <co", "a <code>clock()</cod"):
        assert read(tokenizer, text) == (text, [])
    assert read(tokenizer, "no tags, < code> or </code>") == ("no tags, < code> or </code>", [])


def test_text_that_spells_the_tag_is_text_where_it_is_a_token() -> None:
    parser = CodeCallParser(BY_ID, SIGNATURES)
    assert parser.push(300, "<code>clock()</code>") == ("<code>clock()</code>", [])


def test_past_calls_are_written_as_the_model_writes_them() -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "O'Slo", "days": None}}}
    odd = {"function": {"name": "clock", "arguments": '{"class": true, "a b": [1]}'}}
    message = {"role": "assistant", "content": "Hm.", "tool_calls": [call, odd]}
    (made,) = normalize_messages([message], MessageStyle(tool_calls="code"))
    assert made["content"] == (
        'Hm.\n<code>\nget_weather(city="O\'Slo", days=None)\n'
        "clock(**{'class': True, 'a b': [1]})\n</code>"
    )
    calls = [ToolCall("get_weather", {"city": "\n'\"", "days": 2}), ToolCall("clock", {})]
    text, found = read(BY_TEXT, write_tool_calls(calls, "code"))
    assert (text, [(c.name, c.arguments) for c in found]) == (
        "", [(c.name, c.arguments) for c in calls],
    )  # fmt: skip
