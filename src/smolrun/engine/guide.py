"""What steers the tokens of one answer: limits of its reasoning, and the form that it must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from smolrun.engine.thinking import ThinkingLimiter
from smolrun.text.thinking import ReasoningParser, think_tags

if TYPE_CHECKING:
    from smolrun.engine.sampling import Float32Array
    from smolrun.text.grammar import Matcher
    from smolrun.text.thinking import ThinkingStop
    from smolrun.text.tokenizer import Tokenizer


class TextGuide:
    """The `Constraint` of a request whose whole text must follow a grammar."""

    thinking_stopped_by: ThinkingStop = "model"

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.complete

    def adjust(self, logits: Float32Array) -> Float32Array:
        """See `Constraint`."""
        return np.where(self._matcher.allowed(), logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        self._matcher.accept(token)


class ChatGuide:
    """The `Constraint` of a request that answers a conversation.

    Args:
        tokenizer: of the model.
        prompt: token ids; an open think block at their end means that the answer starts inside.
        limiter: of the reasoning; None where the model is not to reason.
        matcher: of the answer, from the token after the close tag on; None: any text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        limiter: ThinkingLimiter | None,
        matcher: Matcher | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._limiter = limiter
        self._matcher = matcher
        self._parser = ReasoningParser(tokenizer, prompt)
        self._opening = think_tags(tokenizer)[0]
        self._forced: list[int] = []  # the rest of an opening tag
        self._silent = 0  # tokens before anything was said, or since the reasoning ended
        self._spoken = False

    @property
    def thinking_stopped_by(self) -> ThinkingStop:
        """Who ended the reasoning, once that has ended."""
        return self._limiter.stopped_by if self._limiter else "model"

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._matcher is not None and self._matcher.complete

    def adjust(self, logits: Float32Array) -> Float32Array | int:
        """See `Constraint`."""
        parser, limiter = self._parser, self._limiter
        if self._forced:
            return self._forced.pop(0)
        if limiter is not None and parser.in_reasoning:
            return limiter.in_reasoning(logits, parser.reasoning_tokens)
        if self._matcher is not None:
            allowed = self._matcher.allowed()
            if self._may_open():
                allowed = allowed.copy()
                allowed[self._opening[0]] = True
            return np.where(allowed, logits, np.float32(-np.inf))
        if limiter is None:
            return logits
        if self._spoken:
            return limiter.in_answer(logits)
        if parser.in_answer:
            return limiter.after_reasoning(logits, self._silent)
        return limiter.before_reasoning(logits, self._silent)

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        parser, limiter = self._parser, self._limiter
        reasoned = parser.in_reasoning
        opens = self._may_open() and token == self._opening[0]
        piece = parser.push(token)
        if reasoned and limiter is not None:
            limiter.accept(token, closed=not parser.in_reasoning)
        if self._matcher is not None:
            if opens:
                self._forced = self._opening[1:]
            elif limiter is None or not (reasoned or parser.in_reasoning):
                self._matcher.accept(token)
            elif piece.text:  # the token that ended the close tag went on beyond it
                for rest in self._tokenizer.encode(piece.text, parse_special=False, add_bos=False):
                    self._matcher.accept(rest)
        self._silent = 0 if parser.in_reasoning or reasoned else self._silent + 1
        self._spoken |= bool(piece.text.strip())

    def _may_open(self) -> bool:
        """Whether the reasoning may begin with the next token."""
        return (
            self._limiter is not None
            and self._silent == 0
            and not (self._parser.in_reasoning or self._parser.in_answer)
            and self._limiter.has_room()
        )


Guide = TextGuide | ChatGuide
