"""Whether a model reasons and for how long; tells its reasoning from its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from smolrun.errors import RequestError
from smolrun.text.messages import THINK_CLOSE, THINK_OPEN
from smolrun.text.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from smolrun.text.tokenizer import Tokenizer


ThinkingStop = Literal["model", "budget", "loop"]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high"]

# Most tokens of reasoning. A 3B model reasons at 10 to 20 tokens a second on a few cores.
EFFORT_BUDGETS: dict[str, int | None] = {"minimal": 128, "low": 512, "medium": 2048, "high": None}


@dataclass(frozen=True)
class Thinking:
    """Whether one request reasons, and for how long."""

    enabled: bool | None = None  # None leaves it to the model's template
    limited: bool = False  # loops are broken, and room is left for the answer
    budget: int | None = None  # most tokens of reasoning, its tags included


def thinking_of(
    think: bool | None = None,
    thinking_budget: int | None = None,
    reasoning_effort: ReasoningEffort | None = None,
) -> Thinking:
    """The one setting behind three arguments.

    Args:
        think: reason before the answer, or not.
        thinking_budget: most tokens of reasoning; 0 is none at all, -1 as many as it takes.
        reasoning_effort: the same in words, see `EFFORT_BUDGETS`.

    Raises:
        RequestError: a wrong value, or two that contradict each other.
    """
    if think is not None and not isinstance(think, bool):
        raise RequestError(f"think: expected True or False, got {think!r:.80}")
    budget = thinking_budget
    if budget is not None and (type(budget) is not int or not -1 <= budget < 2**31):
        raise RequestError(
            f"thinking_budget: expected -1 (no limit) to {2**31 - 1} tokens, got {budget!r:.80}"
        )
    efforts = get_args(ReasoningEffort)
    if reasoning_effort is not None and reasoning_effort not in efforts:
        raise RequestError(
            f"reasoning_effort: expected one of {', '.join(efforts)}, got {reasoning_effort!r:.80}"
        )
    given: dict[str, bool] = {}
    if think is not None:
        given["think"] = think
    if budget is not None:
        given["thinking_budget"] = budget != 0
    if reasoning_effort is not None:
        given["reasoning_effort"] = reasoning_effort != "none"
    if len(set(given.values())) > 1:
        raise RequestError(f"{' and '.join(given)} contradict each other")
    if not all(given.values()):
        return Thinking(enabled=False)
    if reasoning_effort is not None:
        most = EFFORT_BUDGETS[reasoning_effort]
        if budget is not None and (None if budget < 0 else budget) != most:
            raise RequestError("thinking_budget and reasoning_effort contradict each other")
        return Thinking(True, limited=True, budget=most)
    if budget is not None:
        return Thinking(True, limited=True, budget=None if budget < 0 else budget)
    return Thinking(think)


def think_tags(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that open and that close the reasoning: one each where the tags are tokens."""
    opened, closed = tokenizer.added_id_of(THINK_OPEN), tokenizer.added_id_of(THINK_CLOSE)
    if opened is not None and closed is not None:
        return [opened], [closed]
    opening, closing = (
        tokenizer.encode(tag, parse_special=False, add_bos=False)
        for tag in (THINK_OPEN, THINK_CLOSE)
    )
    return opening, closing


class Piece(NamedTuple):
    """New text, of the reasoning and of the answer; either may be empty."""

    reasoning: str
    text: str


class ReasoningParser:
    """Splits a generated stream into reasoning and answer.

    Where `<think>` and `</think>` are tokens (SmolLM3) only these count, never text that spells
    them. Elsewhere the tags are found in the text, the opening one only at its beginning.

    The parser starts where the prompt leaves off: inside of the reasoning after an open think
    block, in the answer after a closed one. Otherwise the first thing generated decides. Only what
    follows the last control token counts, so that blocks of past turns do not matter.

    Line breaks between a tag and the text beside it are dropped.

    Args:
        tokenizer: of the model.
        prompt: what the model was given, as token ids or text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> None:
        self.reasoning_tokens = 0
        """Tokens of the reasoning so far, those of its tags included."""
        self._decoder = IncrementalDecoder(tokenizer, skip_special=True)
        opened, closed = tokenizer.added_id_of(THINK_OPEN), tokenizer.added_id_of(THINK_CLOSE)
        self._by_id = opened is not None and closed is not None
        self._open_id, self._close_id = (opened, closed) if self._by_id else (None, None)
        self._state: Literal["start", "reasoning", "answer"] = "start"
        self._held = ""
        self._at_edge = False  # directly after a tag: line breaks are dropped
        self._start_tokens = 0
        self._closed = False
        self._answered = False  # the answer's first text is known
        self._begin(tokenizer, prompt)

    @property
    def in_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning, as far as is known."""
        return self._state == "reasoning"

    @property
    def in_answer(self) -> bool:
        """Whether the next token belongs to the answer for sure."""
        return self._state == "answer"

    @property
    def closed(self) -> bool:
        """Whether a close tag was generated that ended the reasoning."""
        return self._closed

    @property
    def at_edge(self) -> bool:
        """Whether line breaks that come now are dropped, as nothing followed a tag yet."""
        return self._at_edge

    def push(self, token_id: int) -> Piece:
        """Takes the next token."""
        before = self._state
        if token_id == self._open_id:
            piece = self._switch("reasoning")
        elif token_id == self._close_id:
            piece = self._switch("answer")
        else:
            piece = self._route(self._decoder.push(token_id))
        if before == "start":
            self._start_tokens += 1
            if self._state == "reasoning":
                self.reasoning_tokens += self._start_tokens
        elif "reasoning" in (before, self._state):
            self.reasoning_tokens += 1
        return piece

    def flush(self) -> Piece:
        """What was held back, at the end of the stream."""
        piece = self._route(self._decoder.flush())
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return Piece(piece.reasoning + held.rstrip("\n"), piece.text)
        return Piece(piece.reasoning, piece.text + held)

    def _begin(self, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> None:
        ids = tokenizer.encode(prompt, add_bos=False) if isinstance(prompt, str) else prompt
        tail: list[int] = []
        for token_id in reversed(ids):
            if tokenizer.is_special(token_id):
                break
            tail.append(token_id)
        tail.reverse()
        if self._by_id:
            tags = [place for place, i in enumerate(tail) if i in (self._open_id, self._close_id)]
            if not tags:
                return
            is_open = tail[tags[-1]] == self._open_id
            rest = tokenizer.decode(tail[tags[-1] + 1 :])
        else:
            text = tokenizer.decode(tail)
            opened, closed = text.rfind(THINK_OPEN), text.rfind(THINK_CLOSE)
            if opened == closed:  # neither is there
                return
            is_open = opened > closed
            rest = (
                text[opened + len(THINK_OPEN) :] if is_open else text[closed + len(THINK_CLOSE) :]
            )
        self._state = "reasoning" if is_open else "answer"
        self._at_edge = not rest.strip("\n")

    def _switch(self, state: Literal["reasoning", "answer"]) -> Piece:
        """A tag by id: ends what went before."""
        piece = self._route(self._decoder.flush())
        if state == "answer":
            if self._state == "answer":
                return piece  # a close tag with nothing open says nothing
            self._closed |= self._state == "reasoning"
        # What is held is line breaks before the tag, or the white space before the first one.
        self._held = ""
        self._state, self._at_edge = state, True
        return piece

    def _route(self, text: str) -> Piece:
        if self._state == "start":
            text = self._leave_start(text)
        if self._state == "reasoning":
            reasoning, rest = self._reason(text)
            return Piece(reasoning, self._answer(rest) if rest else "")
        return Piece("", self._answer(text) if self._state == "answer" else "")

    def _leave_start(self, text: str) -> str:
        """Holds text until it is clear whether the stream begins with the opening tag."""
        self._held += text
        begun = self._held.lstrip()
        if not begun or (
            not self._by_id and len(begun) < len(THINK_OPEN) and begun == THINK_OPEN[: len(begun)]
        ):
            return ""
        held, self._held = self._held, ""
        if not self._by_id and begun.startswith(THINK_OPEN):
            self._state, self._at_edge = "reasoning", True
            return begun[len(THINK_OPEN) :]
        self._state = "answer"
        return held

    def _reason(self, text: str) -> tuple[str, str]:
        """Reasoning that is certain, and the answer's text where the close tag has come."""
        text = self._trimmed(self._held + text)
        self._held = ""
        if not self._by_id:
            before, close, after = text.partition(THINK_CLOSE)
            if close:
                self._state, self._at_edge, self._closed = "answer", True, True
                return before.rstrip("\n"), after
        keep = len(text)
        if not self._by_id:
            keep -= next(
                n for n in range(len(THINK_CLOSE) - 1, -1, -1) if text.endswith(THINK_CLOSE[:n])
            )
        keep = len(text[:keep].rstrip("\n"))
        self._held = text[keep:]
        return text[:keep], ""

    def _answer(self, text: str) -> str:
        """Text of the answer; a close tag that is repeated at its beginning is swallowed."""
        text, self._held = self._trimmed(self._held + text), ""
        if self._by_id or not self._closed or self._answered:
            return text
        while text.startswith(THINK_CLOSE):
            text = text[len(THINK_CLOSE) :].lstrip("\n")
            self._at_edge = not text
        if text and THINK_CLOSE.startswith(text):
            self._held = text
            return ""
        self._answered = bool(text)
        return text

    def _trimmed(self, text: str) -> str:
        if self._at_edge:
            text = text.lstrip("\n")
            self._at_edge = not text
        return text
