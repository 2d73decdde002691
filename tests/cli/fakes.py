"""A model that answers what a test tells it to, with the face of `smolrun.Model`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from smolrun.api import EndEvent, Event, ReasoningEvent, Result, TextEvent, Timings, Usage
from smolrun.engine.sampling import SamplingParameters
from smolrun.errors import TemplateError
from tests.package import SOURCE

ENDLESS = ("--logit-bias", "0-100", "--logit-bias", "2-100")
"""Flags with which the small model of tests/api/tiny.py never ends an answer: both its stop ids."""


def result_of(text: str, reasoning: str = "", finish_reason: Any = "stop") -> Result:
    return Result(
        text=text,
        reasoning=reasoning or None,
        finish_reason=finish_reason,
        usage=Usage(12, 3, 7, 2 if reasoning else 0),
        timings=Timings(0.0, 50.0, 200.0, 9, 7),
        logprobs=None,
        token_ids=(1, 2),
        seed=5,
    )


class FakeStream:
    def __init__(self, events: Sequence[Event], on_start: Callable[[], None] | None) -> None:
        self._events = list(events)
        self._on_start = on_start
        self.cancelled = False

    def __iter__(self) -> Iterator[Event]:
        if self._on_start is not None:
            self._on_start()
        for event in self._events:
            if isinstance(event, EndEvent) and self.cancelled:
                event = EndEvent(result_of(event.result.text, finish_reason="cancelled"))
            yield event

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> Result:
        end = list(self)[-1]
        assert isinstance(end, EndEvent)
        return end.result


class FakeTemplate:
    def __init__(self, thinks: bool) -> None:
        self.supports_thinking = thinks


class FakeConfig:
    vocab_size = 100
    num_parameters = 135_000_000
    num_hidden_layers = 30


class FakeModel:
    """Class attributes are the script; `calls` is what was asked of it."""

    answers: list[tuple[str, str]] = []  # (reasoning, text), the last one again and again
    error: Exception | None = None
    has_template = True
    thinks = True
    on_start: Callable[[], None] | None = None
    calls: list[dict[str, Any]] = []
    options: dict[str, Any] = {}

    name = "fake"
    context_size = 1000
    notes = ["The context holds 1000 tokens: a test."]
    config = FakeConfig()
    default_sampling = SamplingParameters(temperature=0.2)

    def __init__(self, path: Path | str = "fake", **options: Any) -> None:
        type(self).options = {"path": path, **options}

    @property
    def template(self) -> FakeTemplate:
        if not self.has_template:
            raise TemplateError("fake: this model has no chat template")
        return FakeTemplate(self.thinks)

    def stream(self, messages: Any, **arguments: Any) -> FakeStream:
        self.calls.append({"messages": [dict(m) for m in messages], **arguments})
        return self._answer()

    def stream_text(self, prompt: str, **arguments: Any) -> FakeStream:
        self.calls.append({"prompt": prompt, **arguments})
        return self._answer()

    def render(self, messages: Any, **_: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    def _answer(self) -> FakeStream:
        if self.error is not None:
            raise self.error
        reasoning, text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        events: list[Event] = [ReasoningEvent(part) for part in reasoning.split("|") if part]
        events += [TextEvent(part) for part in text.split("|") if part]
        end = result_of(text.replace("|", ""), reasoning.replace("|", ""))
        return FakeStream([*events, EndEvent(end)], type(self).on_start)

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch, *answers: tuple[str, str]) -> type[FakeModel]:
    """Make `smolrun.api.Model` a model that gives these answers."""

    class Scripted(FakeModel):
        pass

    Scripted.answers = list(answers)
    Scripted.calls = []
    monkeypatch.setattr("smolrun.api.Model", Scripted)
    return Scripted


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def environment(**changes: str) -> dict[str, str]:
    """For subprocesses: the package under test, and no settings from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SMOLRUN_")}
    return {**kept, "PYTHONPATH": str(SOURCE), "TERM": "xterm", **changes}
