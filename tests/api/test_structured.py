"""Structure through `Model`: with and without thinking, streamed and whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from smolrun import EndEvent, Model, ReasoningEvent, RequestError, Result, TextEvent
from smolrun.text.messages import THINK_OPEN

QUESTION = "What is a kernel?"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["user", "system"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
SETTINGS: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.5, "seed": 2}]


@pytest.fixture(scope="module")
def trained(shared_data: Path) -> Any:
    with Model(shared_data / "tiny-smollm3", threads=2) as model:
        yield model


def ask(model: Model, streamed: bool, **arguments: Any) -> Result:
    arguments = {"max_tokens": 200, **arguments}
    if not streamed:
        return model.chat(QUESTION, **arguments)
    *events, end = model.stream(QUESTION, **arguments)
    assert isinstance(end, EndEvent)
    result = end.result
    assert "".join(e.text for e in events if isinstance(e, TextEvent)) == result.text
    reasoning = "".join(e.text for e in events if isinstance(e, ReasoningEvent))
    assert reasoning == (result.reasoning or "")
    return result


@STREAMED
@pytest.mark.parametrize("think", [False, True], ids=["no-think", "think"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_schema_holds_from_the_token_after_the_reasoning_on(
    trained: Model, streamed: bool, think: bool, setting: dict[str, Any]
) -> None:
    opened = trained.tokenizer.id_of(THINK_OPEN)
    assert opened is not None
    bias = {"logit_bias": {opened: 100}, "thinking_budget": 30} if think else {}
    result = ask(trained, streamed, response_format=SCHEMA, think=think, **setting, **bias)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), SCHEMA)
    assert bool(result.reasoning) == think
    assert (0 < result.usage.reasoning_tokens <= 30) == think


@STREAMED
def test_thinking_that_is_left_to_the_model(trained: Model, streamed: bool) -> None:
    result = ask(trained, streamed, response_format=SCHEMA, temperature=1, seed=1)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), SCHEMA)


def test_a_reasoning_that_would_use_up_everything_leaves_room(trained: Model) -> None:
    opened = trained.tokenizer.id_of(THINK_OPEN)
    assert opened is not None
    result = trained.chat(
        QUESTION, logit_bias={opened: 100}, regex="[a-z]{3}", max_tokens=40, temperature=0
    )
    assert re.fullmatch("[a-z]{3}", result.text)
    assert result.reasoning


def test_what_is_cut_off_says_so(trained: Model) -> None:
    whole = trained.chat(QUESTION, response_format=SCHEMA, think=False, temperature=0)
    count = len(whole.token_ids)
    for limit in (1, count // 2, count - 1, count):
        cut = trained.chat(
            QUESTION, response_format=SCHEMA, think=False, temperature=0, max_tokens=limit
        )
        assert cut.token_ids == whole.token_ids[:limit]
        assert cut.finish_reason == ("stop" if limit == count else "length")
        assert whole.text.startswith(cut.text)


def test_plain_text_has_form_too(trained: Model) -> None:
    for seed in range(5):
        arguments: dict[str, Any] = {"temperature": 1.5, "seed": seed, "max_tokens": 60}
        result = trained.generate("The answer is", choices=["yes", "no", "not yet"], **arguments)
        assert result.text in ("yes", "no", "not yet")
        assert result.finish_reason == "stop"
        result = trained.generate("A date: ", regex=r"\d{4}-\d\d-\d\d", **arguments)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.text)
        result = trained.generate("A", grammar='start: ("a" | "b" start "b")', **arguments)
        assert re.fullmatch(r"b*ab*", result.text) or result.finish_reason == "length"
    assert trained.generate("A", response_format={"type": "text"}, max_tokens=3).text


def test_structured_answers_are_the_same_alone_and_among_others(trained: Model) -> None:
    arguments: dict[str, Any] = {"temperature": 1, "max_tokens": 60, "think": False}
    alone = [
        trained.chat(QUESTION, response_format=SCHEMA, seed=seed, **arguments).token_ids
        for seed in range(3)
    ]
    streams = [
        trained.stream(QUESTION, response_format=SCHEMA, seed=seed, **arguments)
        for seed in range(3)
    ]
    others = [trained.stream(QUESTION, max_tokens=50, seed=seed) for seed in range(3)]
    assert [stream.result().token_ids for stream in streams] == alone
    for stream in others:
        stream.result()


def test_logprobs_are_of_the_models_own_logits(trained: Model) -> None:
    arguments: dict[str, Any] = {"think": False, "temperature": 0, "top_logprobs": 3}
    free = trained.chat(QUESTION, max_tokens=1, **arguments)
    bound = trained.chat(QUESTION, regex="[0-9]", **arguments)
    assert free.logprobs is not None
    assert bound.logprobs is not None
    assert bound.logprobs[0].top == free.logprobs[0].top
    assert bound.logprobs[0].logprob < free.logprobs[0].logprob


def test_wrong_arguments_raise_before_the_first_event(trained: Model) -> None:
    for arguments, name in (
        ({"regex": "(a"}, "regex"),
        ({"response_format": {"type": "hiccup"}}, "response_format"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos and regex"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices"),
    ):
        with pytest.raises(RequestError, match="^" + name):
            trained.stream(QUESTION, **arguments)
        with pytest.raises(RequestError, match="^" + name):
            trained.generate("x", **arguments)


def test_a_model_without_tokenizer_has_no_text_to_give_a_form() -> None:
    from tests.models import small_config

    with (
        Model.from_config(small_config(), seed=1, context_size=64) as model,
        pytest.raises(RequestError, match="^regex: .*no tokenizer"),
    ):
        model.generate([1, 2], regex="a")


def test_the_real_model_answers_in_json(real_model: Path) -> None:
    """A model that was trained to: the form costs it no sense."""
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 30}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    with Model(real_model, context_size=512) as model:
        result = model.chat(
            "What is the capital of France? Answer in JSON.", response_format=schema, temperature=0
        )
    assert json.loads(result.text)["capital"].startswith("Paris")
