"""What a text must be: every text that is let through satisfies an independent validator."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest

from smolrun.errors import RequestError, ResourceError
from smolrun.text import grammar as grammar_module
from smolrun.text.grammar import GrammarCompiler, Matcher
from smolrun.text.structure import MAX_BYTES, structure_of
from smolrun.text.tokenizer import Tokenizer

from .support import byte_tokenizer

BYTES = byte_tokenizer(user_defined=["<think>", "</think>", "<tool_call>", "</tool_call>"])
COMPILER = GrammarCompiler(BYTES, BYTES.stop_ids())
ENDS = (b'"', b"}", b"]", b"\n")

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 4},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {
        "type": "object",
        "properties": {
            "count": {"type": "integer", "minimum": -3, "maximum": 99},
            "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
            "kind": {"enum": ["one", 2, None, True]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
        },
        "required": ["count", "name", "kind"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "string", "format": "date"}, {"const": {"a": [1]}}, {"type": "null"}]},
    {"type": "integer", "multipleOf": 7, "exclusiveMinimum": 0},
    TREE,
]


def compiled(compiler: GrammarCompiler = COMPILER, **arguments: Any) -> Matcher:
    structure = structure_of(**arguments)
    assert structure is not None
    return compiler.compile(structure.lark, structure.field)


def walk(
    tokenizer: Tokenizer, matcher: Matcher, seed: int, limit: int = 400
) -> tuple[str, list[int], bool]:
    """A random text through a matcher, its tokens, and whether it came to its end."""
    random = np.random.default_rng(seed)
    stops = tokenizer.stop_ids()
    ids: list[int] = []
    for number in range(limit):
        allowed: list[int] = np.flatnonzero(matcher.allowed()).tolist()
        choice = allowed
        if number > 30:
            choice = [t for t in allowed if t in stops or tokenizer.token_bytes(t)[:1] in ENDS]
            choice = choice or allowed
        token = int(random.choice(choice))
        matcher.accept(token)
        if token in stops:
            return tokenizer.decode(ids), ids, True
        ids.append(token)
        if matcher.complete:
            return tokenizer.decode(ids), ids, True
    return tokenizer.decode(ids), ids, False


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_every_text_validates(schema: dict[str, Any]) -> None:
    whole = 0
    for seed in range(25):
        text, ids, complete = walk(BYTES, compiled(response_format=schema), seed)
        whole += complete
        if complete:
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
        assert not any(BYTES.is_special(token) for token in ids)
    assert whole > 12


@pytest.mark.parametrize("name", ["llama3", "starcoder"])
def test_with_the_vocabularies_of_the_family(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids())
    schema = SCHEMAS[1]
    for seed in range(3):
        text, ids, complete = walk(tokenizer, compiled(compiler, response_format=schema), seed)
        assert complete
        jsonschema.validate(json.loads(text), schema)
    for value in ('{"a": "ünï 中文 👍 \\u00e9", "b": [1.5e-3, true, null]}', '{"a": {"b": {}}}'):
        matcher = compiled(compiler, response_format={"type": "json_object"})
        for token in tokenizer.encode(value, add_bos=False):
            assert matcher.allowed()[token], (value, tokenizer.token_bytes(token))
            matcher.accept(token)
        assert set(np.flatnonzero(matcher.allowed())) == set(tokenizer.stop_ids())


def test_stop_tokens_come_where_the_text_is_whole_and_only_there() -> None:
    stops = sorted(BYTES.stop_ids())
    matcher = compiled(regex="a{2,3}")
    for expected in (False, False, True):
        assert matcher.allowed()[stops].all() == expected
        assert not matcher.complete
        matcher.accept(BYTES.encode("a")[0])
    assert matcher.complete
    assert set(np.flatnonzero(matcher.allowed())) == set(stops)


EXPRESSIONS = [r"[a-c]{2,4}/\d\"", r"^(yes|no)$", r"(é|中)+!?", "a.c", r"[^ab]{1,3}\s\S"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_text_matches_the_expression(expression: str) -> None:
    for seed in range(20):
        text, _, complete = walk(BYTES, compiled(regex=expression), seed)
        assert not complete or re.fullmatch(expression, text)


def test_grammars_and_choices() -> None:
    for notation in ('start: "x" item+\nitem: /[ab]/ ","', 'root ::= "x" i+\ni ::= [ab] ","'):
        for seed in range(10):
            text, _, complete = walk(BYTES, compiled(grammar=notation), seed)
            assert not complete or re.fullmatch(r"x([ab],)+", text)
    choices = ["yes", "yes, but", 'no "\n\\', "<|im_end|>", "中"]
    found = {walk(BYTES, compiled(choices=choices), seed)[0] for seed in range(60)}
    assert found == set(choices)


class Pydantic:
    """A class with the face of a pydantic model."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMAS[1]


def test_the_shapes_of_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    wrapped = {"name": "x", "strict": True, "schema": schema}
    shapes: list[Any] = [
        schema,
        {"type": "json_schema", "json_schema": wrapped},
        {"type": "json_object", "schema": schema},
    ]
    sources = set()
    for shape in shapes:
        structure = structure_of(response_format=shape)
        assert structure is not None
        sources.add(structure.lark)
    assert len(sources) == 1
    assert structure_of(response_format={"type": "text"}) is None
    assert structure_of() is None
    found = structure_of(response_format=Pydantic)
    assert found == structure_of(response_format=SCHEMAS[1])


def test_a_schema_can_not_loosen_its_own_reading() -> None:
    schema = {"type": "string", "not": {"const": "a"}, "x-guidance": {"lenient": True}}
    with pytest.raises(RequestError, match="^response_format: .*not"):
        compiled(response_format=schema)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CYCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(" * 10_000}, "regex: "),
    ({"regex": "(a"}, "regex: "),
    ({"regex": r"(a)\1"}, "regex: .*backreferences"),
    ({"regex": "(?=a)b"}, "regex: .*look-around"),
    ({"regex": "[^\\s\\S]"}, "regex: there is no text"),
    ({"regex": ""}, "regex: expected a text"),
    ({"regex": 5}, "regex: expected a text"),
    ({"regex": "a" * (MAX_BYTES + 1)}, "regex: at most"),
    ({"grammar": "start: start"}, "grammar: there is no text"),
    ({"grammar": "start: missing"}, 'grammar: .*unknown name: "missing"'),
    ({"grammar": "start: " + "(" * 10_000 + '"a"' + ")" * 10_000}, "grammar: .*nested"),
    ({"grammar": "root ::= missing"}, "grammar: "),
    ({"grammar": "root ::= " + "(" * 10_000}, "grammar: "),
    ({"choices": "yes"}, "choices: expected a list"),
    ({"choices": []}, "choices: expected 1 to"),
    ({"choices": ["a", ""]}, r"choices\[1\]: expected a text"),
    ({"choices": ["a"] * 1001}, "choices: expected 1 to"),
    ({"response_format": "json"}, "response_format: expected an object"),
    ({"response_format": {"type": "hiccup"}}, "response_format: .*hiccup"),
    ({"response_format": {"type": "json_schema"}}, r"response_format.json_schema: expected an obj"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        r"response_format.json_schema.schema: expected a JSON Schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "extra": 1}}},
        r"response_format.json_schema.extra: unknown field",
    ),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format: the type 'text'"),
    ({"response_format": {"type": "string", "pattern": "(" * 10_000}}, "response_format: "),
    ({"response_format": {"type": "string", "x": {1, 2}}}, "response_format: this schema is not"),
    ({"response_format": {"type": "number", "minimum": float("nan")}}, "response_format: this sc"),
    ({"response_format": nested(10_000)}, "response_format: "),
    ({"response_format": nested(300)}, "response_format: .*recursion"),
    ({"response_format": CYCLE}, "response_format: there is no text"),
    ({"response_format": {"$ref": "http://localhost:1/x"}}, "response_format: .*not present"),
    ({"response_format": {"type": "integer", "multipleOf": 1_000_003}}, "response_format: multipl"),
    ({"response_format": {"type": "integer", "multipleOf": -2}}, "response_format: multipl"),
    ({"response_format": {"type": "integer", "multipleOf": True}}, "response_format: .*multipleOf"),
    ({"response_format": {"type": "string", "format": "banana"}}, "response_format: .*banana"),
    ({"response_format": {"enum": ["v" * 99] * 10_000}}, "response_format: at most"),
    ({"regex": "a", "choices": ["a"]}, "regex and choices: a text can have one form only"),
    ({"response_format": {"type": "json_object"}, "grammar": "x"}, "response_format and grammar: "),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match="^" + message) as found:
        compiled(**arguments)
    assert len(str(found.value)) < 500
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("expression", ["foo**", "^+a", "^{2}x", "(a+)+$", "(a|aa){1000}{1000}"])
def test_expressions_that_have_broken_others_are_bounded(expression: str) -> None:
    matcher = compiled(regex=expression)
    with contextlib.suppress(ResourceError):
        for _ in range(300):
            if matcher.complete:
                break
            matcher.accept(int(np.flatnonzero(matcher.allowed())[-1]))


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(BYTES, BYTES.stop_ids())
    monkeypatch.setattr(grammar_module, "CACHED_GRAMMARS", 8)
    for number in range(100):
        compiled(compiler, regex=f"a{number}")
        assert len(compiler._compiled) <= 8
    monkeypatch.setattr(grammar_module, "CACHED_BYTES", 200)
    compiled(compiler, choices=["x" * 500])
    assert len(compiler._compiled) == 1


def test_matchers_of_one_grammar_do_not_share_their_place() -> None:
    first, second = compiled(regex="ab"), compiled(regex="ab")
    first.accept(BYTES.encode("a")[0])
    assert np.flatnonzero(first.allowed()).tolist() == BYTES.encode("b")
    assert np.flatnonzero(second.allowed()).tolist() == BYTES.encode("a")


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"^regex: .*pip install smolrun\[structured\]"):
        compiled(GrammarCompiler(BYTES, BYTES.stop_ids()), regex="a")
