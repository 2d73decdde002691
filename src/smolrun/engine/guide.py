"""What steers the tokens of one answer: limits of its reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smolrun.engine.thinking import ThinkingLimiter
from smolrun.text.thinking import ReasoningParser

if TYPE_CHECKING:
    from smolrun.engine.sampling import Float32Array
    from smolrun.text.thinking import ThinkingStop
    from smolrun.text.tokenizer import Tokenizer


class Guide:
    """The `Constraint` of a request that answers a conversation.

    Args:
        tokenizer: of the model.
        prompt: token ids; an open think block at their end means that the answer starts inside.
        limiter: of the reasoning.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], limiter: ThinkingLimiter
    ) -> None:
        self._limiter = limiter
        self._parser = ReasoningParser(tokenizer, prompt)
        self._silent = 0  # tokens before anything was said, or since the reasoning ended
        self._spoken = False

    @property
    def thinking_stopped_by(self) -> ThinkingStop:
        """Who ended the reasoning, once that has ended."""
        return self._limiter.stopped_by

    def adjust(self, logits: Float32Array) -> Float32Array | int:
        """See `Constraint`."""
        parser = self._parser
        if parser.in_reasoning:
            return self._limiter.in_reasoning(logits, parser.reasoning_tokens)
        if self._spoken:
            return self._limiter.in_answer(logits)
        if parser.in_answer:
            return self._limiter.after_reasoning(logits, self._silent)
        return self._limiter.before_reasoning(logits, self._silent)

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        parser = self._parser
        reasoned = parser.in_reasoning
        piece = parser.push(token)
        if reasoned:
            self._limiter.accept(token, closed=not parser.in_reasoning)
        self._silent = 0 if parser.in_reasoning or reasoned else self._silent + 1
        self._spoken |= bool(piece.text.strip())
