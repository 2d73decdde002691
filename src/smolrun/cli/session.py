"""A conversation with a model and the commands that steer it, apart from any terminal."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.cli.options import SAMPLING, logit_bias, read_text
from smolrun.errors import RequestError, TemplateError

if TYPE_CHECKING:
    from smolrun.api import Model, Result, Stream

_INTEGERS = ("max_tokens", "top_k", "seed")
_OTHER_NAMES = {"temp": "temperature", "n": "max_tokens", "n_predict": "max_tokens"}


@dataclass
class Session:
    """What was said so far, and how the next answer is asked for."""

    model: Model
    system: str | None = None
    think: bool | None = None
    date: datetime.date | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)  # user and assistant, in turn
    attached: list[str] = field(default_factory=list)  # files read, for the next message
    last: Result | None = None
    budget: int | None = None  # tokens of thinking
    structure: dict[str, Any] = field(default_factory=dict)  # the form of every answer

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the model gets it."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]

    def ask(self, text: str) -> Stream:
        """Start the answer to a message. A message that is refused leaves no trace."""
        content = "\n\n".join([*self.attached, text])
        self.turns.append({"role": "user", "content": content})
        try:
            stream = self._start()
        except Exception:
            self.turns.pop()
            raise
        self.attached = []
        return stream

    def again(self) -> Stream:
        """Start another answer to the last message. RequestError where there is none."""
        if self.turns and self.turns[-1]["role"] == "assistant":
            self.turns.pop()
        if not self.turns:
            raise RequestError("there is no message to answer again")
        return self._start()

    def _start(self) -> Stream:
        asked = {**self.sampling, **self.structure}
        if self.budget is not None:
            asked["thinking_budget"] = self.budget
        return self.model.stream(self.messages, think=self.think, date=self.date, **asked)

    def answered(self, result: Result) -> None:
        """Keep an answer, or as much of it as came. A message without any answer goes."""
        self.last = result
        if result.text:
            self.turns.append({"role": "assistant", "content": result.text})
        else:
            self.turns.pop()

    def failed(self) -> None:
        """The answer under way ended in an error: its message goes."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def undo(self) -> bool:
        """Forget the last message and its answer; False where there is none."""
        if not self.turns:
            return False
        while self.turns and self.turns.pop()["role"] != "user":
            pass
        return True

    def clear(self) -> None:
        """Forget everything but the system prompt and the settings."""
        self.turns, self.attached, self.last = [], [], None

    def set(self, assignment: str) -> str:
        """Change a sampling setting, `top_p=0.9`; `top_p=` takes the model's own again.

        Raises:
            RequestError: no such setting, or a value that it does not take.
        """
        key, found, text = assignment.partition("=")
        if not found:
            key, _, text = assignment.partition(" ")
        key = key.strip().lower().replace("-", "_")
        key, text = _OTHER_NAMES.get(key, key), text.strip()
        if key not in SAMPLING:
            raise RequestError(f"{key}: no such setting; there are {', '.join(SAMPLING)}")
        if not text:
            self.sampling.pop(key, None)
            return f"{key}: as the model has it"
        changed = {**self.sampling, key: _setting(key, text)}
        self._check(changed)
        self.sampling = changed
        return f"{key} = {changed[key]}"

    def _check(self, sampling: dict[str, Any]) -> None:
        from smolrun.engine.sampling import sampling_parameters

        sampling_parameters(sampling, self.model.default_sampling, self.model.config.vocab_size)

    def settings(self) -> list[str]:
        """The settings that hold, one a line."""
        lines = []
        for key in SAMPLING:
            own = getattr(self.model.default_sampling, key)
            value = self.sampling.get(key, own)
            shown = "unset" if value in (None, (), {}) else value
            lines.append(f"{key} = {shown}" + ("" if key in self.sampling else "  (model's own)"))
        return lines

    def switch_thinking(self, think: bool) -> None:
        """Think before the next answers, or not. TemplateError where the model can not."""
        if think and not self.model.template.supports_thinking:
            raise TemplateError(f"{self.model.name} has no thinking mode")
        self.think, self.budget = think, None

    def limit_thinking(self, tokens: int) -> None:
        """Think at most so many tokens: 0 is none, -1 no limit. Errors as of `thinking_of`."""
        from smolrun.text.thinking import thinking_of

        thinking_of(thinking_budget=tokens)
        self.switch_thinking(tokens != 0)
        self.budget = tokens or None

    def attach(self, path: Path) -> int:
        """Put a text file in front of the next message; its characters."""
        text = read_text(path)
        self.attached.append(text.rstrip("\n"))
        return len(text)

    def rendered(self) -> str:
        """The text that the model was last given, or would be given."""
        messages = self.messages
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return self.model.render(messages, think=self.think, date=self.date) if messages else ""

    def save(self, path: Path) -> None:
        """Write the conversation and its settings to a JSON file."""
        values = {
            "model": self.model.name,
            "system": self.system,
            "think": self.think,
            "sampling": self.sampling,
            "messages": self.turns,
        }
        path = path.expanduser()
        path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take a saved conversation in place of this one. RequestError for any other file."""
        try:
            values = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: not a saved conversation: {error}") from None
        values = values if isinstance(values, dict) else {}
        turns, sampling = values.get("messages"), values.get("sampling", {})
        system, think = values.get("system"), values.get("think")
        if (
            not isinstance(turns, list)
            or not all(_is_turn(turn, place) for place, turn in enumerate(turns))
            or len(turns) % 2
            or not isinstance(system, (str, type(None)))
            or not isinstance(think, (bool, type(None)))
            or not isinstance(sampling, dict)
        ):
            raise RequestError(
                f"{path}: not a saved conversation: expected an object with `messages` of user and "
                "assistant in turn, and perhaps `system`, `think` and `sampling`"
            )
        try:
            if bias := sampling.get("logit_bias"):
                sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
            self._check(sampling)
        except (ValueError, AttributeError) as error:
            raise RequestError(f"{path}: not a saved conversation: {error}") from None
        self.turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        self.system, self.think, self.sampling = system, think, sampling
        self.attached, self.last = [], None


def _is_turn(turn: object, place: int) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") == ("user", "assistant")[place % 2]
        and isinstance(turn.get("content"), str)
    )


def _setting(key: str, text: str) -> Any:
    try:
        if key == "stop":
            return [text]
        if key == "logit_bias":
            return dict([logit_bias(text)])
        return int(text) if key in _INTEGERS else float(text)
    except Exception:
        raise RequestError(f"{key}: {text!r} is not a number it takes") from None
