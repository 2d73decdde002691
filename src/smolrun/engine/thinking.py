"""Ends a model's reasoning in good time, at the end of a sentence where that can be had."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import numpy as np

from smolrun.text.thinking import think_tags

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from smolrun.engine.sampling import Float32Array
    from smolrun.text.thinking import ThinkingStop
    from smolrun.text.tokenizer import Tokenizer

SOFT_SHARE = 0.75  # of the budget; from here on the close tag is favoured at ends of sentences
SURE_SHARE = 0.875  # from here on an end of a sentence ends the reasoning for sure

# Kept out of max_tokens, or of what the context leaves, for the answer.
ANSWER_SHARE = 0.25
MOST_ANSWER_TOKENS = 256
LEAST_ANSWER_TOKENS = 4

LONGEST_LOOP = 256  # tokens of a passage whose repetition is noticed
LOOP_COPIES = 4  # of the passage in a row
LOOP_TOKENS = 64  # that all copies have at least

_TAIL_TOKENS = 4
_SENTENCE_END = re.compile(r"(?:(?:[^\s\d][.!?]|[。！？])[\"'”’)\]*]*\s*|\n\s*)\Z")


def tokens_for_thinking(budget: int | None, room: int) -> int:
    """Tokens of reasoning that leave room for an answer.

    Args:
        budget: what was asked for; None: no limit.
        room: tokens that may be generated in all.
    """
    kept = max(LEAST_ANSWER_TOKENS, min(MOST_ANSWER_TOKENS, int(room * ANSWER_SHARE)))
    left = max(room - kept, 0)
    return left if budget is None else min(budget, left)


class RepetitionFinder:
    """Notices that the last tokens are one passage over and over."""

    def __init__(self) -> None:
        self._recent = np.full(LONGEST_LOOP, -1, np.int64)  # the last token first
        self._runs = np.zeros(LONGEST_LOOP, np.int64)  # [p-1]: last tokens equal to those p before
        periods = np.arange(1, LONGEST_LOOP + 1)
        self._needed = np.maximum((LOOP_COPIES - 1) * periods, LOOP_TOKENS - periods)

    def push(self, token: int) -> bool:
        """Takes the next token; whether it completes a loop."""
        self._runs = np.where(self._recent == token, self._runs + 1, 0)
        self._recent[1:] = self._recent[:-1].copy()
        self._recent[0] = token
        return bool((self._runs >= self._needed).any())


class ThinkingLimiter:
    """Decides on tokens while a model reasons, and on the first ones of its answer.

    - Where the model would end the whole answer inside of the reasoning, it closes that instead.
    - From `SOFT_SHARE` of the budget on, the close tag's logit approaches the highest one wherever
      a sentence ends; it is forced where the budget ends, or where the reasoning goes in circles.
    - After that the answer can not end before it has begun, nor can a tag be repeated.

    Args:
        tokenizer: of the model.
        budget: most tokens of reasoning, those of its tags included.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int, stop_ids: Collection[int]) -> None:
        self.stopped_by: ThinkingStop = "model"
        self._tokenizer = tokenizer
        self._budget = budget
        self._stops = list(stop_ids)
        self._open, self._close = think_tags(tokenizer)
        by_id = len(self._open) == len(self._close) == 1
        self._tags = (self._open[0], self._close[0]) if by_id else ()
        self._forced: list[int] = []
        self._tail: list[int] = []
        self._repetition = RepetitionFinder()
        self._looping = False
        self._favoured: ThinkingStop = "model"

    def has_room(self, tokens: int = 0) -> bool:
        """Whether the budget holds both tags, after `tokens` tokens of white space."""
        return self._budget >= tokens + len(self._open) + len(self._close)

    def before_reasoning(self, logits: Float32Array, tokens: int) -> Float32Array:
        """Where nothing has come but `tokens` tokens: begin to think only if there is room."""
        mute = [*self._mute(tokens), *self._tags[1:]]
        if not self.has_room(tokens):
            mute.append(self._open[0])
        return _without(logits, mute)

    def in_reasoning(self, logits: Float32Array, used: int) -> Float32Array | int:
        """While reasoning, of which there are `used` tokens."""
        if self._forced:
            return self._forced.pop(0)
        most = self._budget - len(self._close)
        if self._looping or used >= most:
            self._favoured = "loop" if self._looping else "budget"
            self._forced = self._close[1:]
            return self._close[0]
        close = self._close[0]
        wish = float(logits[close])
        if self._stops:
            wish = max(wish, float(logits[self._stops].max()))
        adjusted = _without(logits, [*self._stops, *self._tags[:1]])  # it is open already
        best = float(adjusted.max())
        share = used / most
        self._favoured = "model"
        if share >= SOFT_SHARE and wish < best and self._at_sentence_end():
            near = min((share - SOFT_SHARE) / (SURE_SHARE - SOFT_SHARE), 1.0)
            wish += near * (best - wish) + (near == 1.0)
            self._favoured = "budget"
        adjusted[close] = wish
        return adjusted

    def after_reasoning(self, logits: Float32Array, tokens: int) -> Float32Array:
        """In the answer while no text of it has come, but `tokens` tokens."""
        return _without(logits, [*self._mute(tokens), self._open[0], self._close[0]])

    def in_answer(self, logits: Float32Array) -> Float32Array:
        """In the answer: do not think again, where tags are tokens."""
        return _without(logits, self._tags) if self._tags else logits

    def accept(self, token: int, *, closed: bool) -> None:
        """A token of the reasoning was drawn; `closed`: it ended that."""
        if closed:
            self.stopped_by = self._favoured
            return
        if self._favoured == "budget" and token == self._close[0] and not self._forced:
            self._forced = self._close[1:]
        self._tail = [*self._tail[1 - _TAIL_TOKENS :], token]
        self._looping |= self._repetition.push(token)

    def _mute(self, tokens: int) -> Iterable[int]:
        """Tokens that would leave an answer empty: one of white space may come, no more."""
        silent = self._tokenizer.silent_ids if tokens else self._tokenizer.control_ids
        return itertools.chain(self._stops, silent)

    def _at_sentence_end(self) -> bool:
        text = b"".join(map(self._tokenizer.token_bytes, self._tail)).decode("utf-8", "replace")
        return _SENTENCE_END.search(text) is not None


def _without(logits: Float32Array, tokens: Iterable[int]) -> Float32Array:
    adjusted: Float32Array = logits.copy()
    adjusted[np.fromiter(tokens, np.int64)] = -np.inf
    return adjusted
