"""Budgets of reasoning through `Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolrun import EndEvent, Model, ReasoningEvent, RequestError, TemplateError, TextEvent
from smolrun.text.messages import THINK_OPEN

QUESTION = "What is a kernel?"


def thinking(model: Model, budget: int | None, **arguments: Any) -> Any:
    """An answer that begins with an open tag, which small models do not write by themselves."""
    opened = model.tokenizer.id_of(THINK_OPEN)
    assert opened is not None
    arguments = {"logit_bias": {opened: 100}, "max_tokens": 80, "seed": 3, **arguments}
    return model.chat(QUESTION, thinking_budget=budget, **arguments)


@pytest.mark.parametrize("budget", [2, 3, 10, 40])
def test_a_budget_lands(model: Model, budget: int) -> None:
    result = thinking(model, budget)
    assert 0 < result.usage.reasoning_tokens <= budget
    assert result.thinking_stopped_by in ("budget", "model")
    assert result.text.strip()


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"temperature": 1}], ids=str)
def test_a_trained_model_that_goes_on_thinking(
    shared_data: Path, setting: dict[str, float]
) -> None:
    with Model(shared_data / "tiny-smollm3", threads=2) as model:
        for budget in (24, 120):
            result = thinking(model, budget, max_tokens=200, **setting)
            assert 0 < result.usage.reasoning_tokens <= budget
            assert result.thinking_stopped_by in ("budget", "loop", "model")
            assert result.reasoning
            assert result.text.strip()
        alone = thinking(model, 60, **setting)
        streams = [model.stream(QUESTION, max_tokens=50, seed=n) for n in range(3)]
        assert thinking(model, 60, **setting).token_ids == alone.token_ids
        for stream in streams:
            stream.cancel()


def test_streamed_as_whole(model: Model) -> None:
    opened = model.tokenizer.id_of(THINK_OPEN)
    assert opened is not None
    stream = model.stream(
        QUESTION, thinking_budget=20, max_tokens=60, seed=1, logit_bias={opened: 100}
    )
    *events, end = stream
    assert isinstance(end, EndEvent)
    result = end.result
    texts = [event.text for event in events if isinstance(event, TextEvent)]
    assert "".join(texts) == result.text
    reasoning = [event.text for event in events if isinstance(event, ReasoningEvent)]
    assert "".join(reasoning) == (result.reasoning or "")


def test_zero_and_none_are_no_thinking(model: Model) -> None:
    for arguments in ({"thinking_budget": 0}, {"reasoning_effort": "none"}, {"think": False}):
        result = model.chat(QUESTION, max_tokens=8, temperature=0, **arguments)
        assert result.usage.reasoning_tokens == 0
        assert result.reasoning is None
        assert result.thinking_stopped_by is None


def test_what_can_not_be_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^think and thinking_budget contradict"):
        model.chat(QUESTION, think=False, thinking_budget=5)
    with pytest.raises(RequestError, match="^thinking_budget: "):
        model.chat(QUESTION, thinking_budget=-7)


def test_a_model_without_a_thinking_mode(real_model: Path) -> None:
    with Model(real_model, context_size=256) as model:
        for arguments in ({"thinking_budget": 9}, {"reasoning_effort": "low"}):
            with pytest.raises(TemplateError, match="no thinking mode"):
                model.chat(QUESTION, **arguments)
        model.chat(QUESTION, reasoning_effort="none", max_tokens=1)
