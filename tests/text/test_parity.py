"""Tokens and rendered chats against transformers."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smolrun.text.chat import ChatTemplate
from smolrun.text.tokenizer import Tokenizer

pytestmark = pytest.mark.parity

TEMPLATES = [
    "smollm2_chat_template",
    "smollm3_chat_template",
    "templates/smollm3.ggml-org",
    "templates/smollm3.hub-main",
    "templates/smollm3.launch",
    "templates/smollm3.unsloth",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'It\'s "here" <é>',
            "parameters": {"type": "object", "properties": {"n": {"default": None, "x": True}}},
        },
    }
]
MARKUP = ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<tool_call>", "<|x|>", "'s", "\n\n"]
SCRIPTS = "abz019 .,'\"<>|\t\r\n\u00a0éßñ中文한국어ひらкирالعربهनमस्ते\U0001f44d\U0001f3fd½²"
TEXTS = st.one_of(
    st.text(max_size=80),
    st.lists(st.one_of(st.sampled_from(MARKUP), st.text(SCRIPTS, max_size=12)), max_size=10).map(
        "".join
    ),
)
# What a template could change in one way or another without being wrong is left to other tests.
CONTENTS = TEXTS.filter(lambda text: "think" not in text and "<|" not in text)


@pytest.fixture(scope="session")
def theirs(shared_data: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(shared_data / "tiny-smollm3"))


@settings(max_examples=500)
@given(text=TEXTS)
def test_ids_and_text_are_theirs(
    text: str, theirs: Any, tiny_json: Tokenizer, tiny_gguf: Tokenizer
) -> None:
    ids = theirs.encode(text, add_special_tokens=True)
    assert tiny_json.encode(text) == tiny_gguf.encode(text) == ids
    expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert tiny_json.decode(ids) == expected == text
    shown = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tiny_json.decode(ids, skip_special=True) == shown


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 2303), max_size=30))
def test_any_ids_decode_as_theirs(ids: list[int], theirs: Any, tiny_json: Tokenizer) -> None:
    # Between added tokens the library decodes bytes part by part; we do it for all together,
    # so a character cut by an added token may differ. Without any, the texts are equal.
    ids = [token_id for token_id in ids if token_id < 2048]
    expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert tiny_json.decode(ids) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    system=st.one_of(st.none(), CONTENTS),
    turns=st.lists(CONTENTS, min_size=1, max_size=4),
    thinking=st.sampled_from([None, True, False]),
    with_tools=st.booleans(),
    prompt=st.booleans(),
)
def test_chats_are_rendered_and_encoded_as_theirs(
    name: str,
    system: str | None,
    turns: list[str],
    thinking: bool | None,
    with_tools: bool,
    prompt: bool,
    shared_data: Path,
    theirs: Any,
    tiny_json: Tokenizer,
) -> None:
    source = (shared_data / f"{name}.jinja").read_text()
    ours = ChatTemplate(source, tiny_json, name)
    messages: list[dict[str, str]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for place, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[place % 2], "content": content})
    options: dict[str, Any] = {"add_generation_prompt": prompt}
    if thinking is not None and (ours.supports_thinking or not thinking):
        options["enable_thinking"] = thinking
    tools = None
    if with_tools and ours.supports_tools:
        tools = TOOLS
    # They do not put tools under the name that the older templates read.
    other_name = {"xml_tools": tools} if tools and "or tools" not in source else {"tools": tools}
    today = datetime.date.today()
    expected = theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, **options, **other_name
    )
    ids = theirs.apply_chat_template(
        messages, chat_template=source, return_dict=False, **options, **other_name
    )
    if datetime.date.today() != today:
        return  # midnight has passed between; the date is in the text
    assert ours.render(messages, tools=tools, date=today, **options) == expected
    assert ours.encode(messages, tools=tools, date=today, **options) == ids
