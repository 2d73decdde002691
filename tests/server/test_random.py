"""Random schemas, texts and bytes: refused or answered, and the server is as it was.

SMOLRUN_FUZZ sets the number of schemas, of which reliability asks for 10000.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from smolrun.text.grammar import CACHED_BYTES, CACHED_GRAMMARS

from .running import CHAT, GREEDY, Running

pytestmark = pytest.mark.fuzz

COUNT = int(os.environ.get("SMOLRUN_FUZZ", "150"))
TEXTS = min(COUNT, 1000)
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
NAMES = ("a", "b", "name", "", "ключ", 'q"\\')
PATTERNS = ("^[a-z]{1,5}$", "a|b", "[0-9]+", "(", "a**", "\\d{2,3}", "(?=a)b", "^$", ".*")
FORMATS = ("date", "date-time", "uuid", "email", "nonsense", "ipv4")
REFERENCES = ("#", "#/$defs/a", "#/$defs/b", "#/nowhere", "http://127.0.0.1:9/x", "")
WRONG: tuple[Any, ...] = (None, -1, 1.5, "x", [], {}, True, 2**70, 1e300)
RSS_GROWTH = 64 << 20  # of a process that keeps 64 grammars, whatever was compiled before


def value_of(choose: random.Random) -> Any:
    """A value of JSON."""
    kinds: list[Any] = [None, True, -3, 0, 2.5, "", "text", "ü", [1, "a"], {"a": None}]
    return choose.choice(kinds)


def schema_of(choose: random.Random, depth: int) -> Any:
    """A JSON Schema, or something that nearly is one."""
    if choose.random() < 0.05:
        return choose.choice([True, False, *WRONG])
    few = depth <= 0
    schema: dict[str, Any] = {}
    if choose.random() < 0.8:
        kind = choose.choice(TYPES[2:] if few else TYPES)
        schema["type"] = kind if choose.random() < 0.9 else choose.sample(TYPES, 2)

    def below() -> Any:
        return schema_of(choose, depth - 1)

    keywords: dict[str, Any] = {
        "minLength": lambda: choose.randint(0, 5),
        "maxLength": lambda: choose.randint(0, 5),
        "pattern": lambda: choose.choice(PATTERNS),
        "format": lambda: choose.choice(FORMATS),
        "minimum": lambda: choose.randint(-100, 100),
        "maximum": lambda: choose.randint(-100, 100),
        "exclusiveMinimum": lambda: choose.uniform(-5, 5),
        "multipleOf": lambda: choose.choice([1, 3, 0.5, 7, 0, -2, 1e9]),
        "enum": lambda: [value_of(choose) for _ in range(choose.randint(0, 5))],
        "const": lambda: value_of(choose),
        "required": lambda: choose.sample(NAMES, choose.randint(0, 3)),
        "minItems": lambda: choose.randint(0, 4),
        "maxItems": lambda: choose.randint(0, 4),
        "uniqueItems": lambda: True,
        "$ref": lambda: choose.choice(REFERENCES),
        "description": lambda: "text",
        "frobnicate": lambda: 1,
    }
    if not few:
        keywords |= {
            "properties": lambda: {name: below() for name in choose.sample(NAMES, 2)},
            "additionalProperties": below,
            "patternProperties": lambda: {choose.choice(PATTERNS): below()},
            "items": below,
            "prefixItems": lambda: [below(), below()],
            "anyOf": lambda: [below() for _ in range(choose.randint(0, 3))],
            "oneOf": lambda: [below(), below()],
            "allOf": lambda: [below(), below()],
            "not": below,
            "$defs": lambda: {"a": below(), "b": below()},
        }
    for keyword in choose.sample(sorted(keywords), choose.randint(0, 4)):
        schema[keyword] = keywords[keyword]() if choose.random() < 0.95 else choose.choice(WRONG)
    return schema


def resident() -> int:
    """Bytes of this process, which is the server's too; 0 where the system does not say."""
    if sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_schemas(healthy: Running) -> None:  # API-06
    grammars = healthy.model.loaded.grammars
    assert grammars is not None
    early = 0
    statuses = dict.fromkeys((200, 400), 0)
    for number in range(COUNT):
        choose = random.Random(number)
        schema = schema_of(choose, 3)
        body = {**GREEDY, "max_tokens": 2, "think": False, "json_schema": schema}
        reply = healthy.post(CHAT, body)
        assert reply.status_code in statuses, (json.dumps(schema), reply.text)
        statuses[reply.status_code] += 1
        if reply.status_code == 400:
            error = reply.json()["error"]
            assert error["message"], schema
            assert error["param"], schema
        if number == COUNT // 4:
            early = resident()
    assert min(statuses.values()) > COUNT // 20, statuses  # both are tried
    assert len(grammars._compiled) <= CACHED_GRAMMARS
    assert sum(map(len, grammars._compiled)) <= CACHED_BYTES
    assert resident() - early < RSS_GROWTH


def text_of(choose: random.Random) -> str:
    """A text of any characters but surrogates, which UTF-8 has not."""
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    return "".join(
        chr(choose.randint(*choose.choice(ranges))) for _ in range(choose.randint(1, 80))
    )


def test_texts_come_back(healthy: Running) -> None:  # TOK-01
    for number in range(TEXTS):
        text = text_of(random.Random(number))
        reply = healthy.post("/tokenize", {"content": text, "parse_special": False})
        assert reply.status_code == 200, (text, reply.text)
        tokens = reply.json()["tokens"]
        assert tokens == healthy.model.tokenize(text, parse_special=False)
        back = healthy.post("/detokenize", {"tokens": tokens}).json()
        assert back["content"] == text


def test_tokens_of_any_kind(healthy: Running) -> None:  # TOK-01
    size = healthy.model.config.vocab_size
    for number in range(TEXTS):
        choose = random.Random(number)
        tokens = [choose.randrange(size) for _ in range(choose.randint(0, 60))]
        reply = healthy.post("/detokenize", {"tokens": tokens})
        assert reply.status_code == 200
        assert reply.json()["content"] == healthy.model.detokenize(tokens)
        tokens.insert(choose.randint(0, len(tokens)), choose.choice([-1, size, 2**31, 2**64]))
        assert healthy.post("/detokenize", {"tokens": tokens}).status_code == 400


def test_bytes(healthy: Running) -> None:  # TOK-01
    """As the body, and as the text in it: what is no UTF-8 is refused, never mended."""
    for number in range(TEXTS):
        choose = random.Random(number)
        data = choose.randbytes(choose.randint(1, 300))
        assert healthy.raw("/tokenize", data).status_code == 400
        escaped = data.replace(b"\\", b"").replace(b'"', b"")
        reply = healthy.raw("/tokenize", b'{"content": "' + escaped + b'"}')
        try:
            text = json.loads(b'{"content": "' + escaped + b'"}')["content"]
        except ValueError:
            assert reply.status_code == 400
        else:
            assert reply.json()["tokens"] == healthy.model.tokenize(text)
    large = random.Random(0).randbytes(300_000)
    assert healthy.raw("/tokenize", b'{"content": "' + large + b'"}').status_code == 400
    text = large.decode("latin-1")
    reply = healthy.post("/tokenize", {"content": text, "parse_special": False})
    assert reply.status_code == 200
    assert healthy.model.detokenize(reply.json()["tokens"]) == text
