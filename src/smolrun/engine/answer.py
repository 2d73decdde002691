"""From sampled tokens to what a user sees: text, reasoning, and the result at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smolrun.engine.sampling import SampledToken, SamplingParameters
from smolrun.engine.sequence import Ending, FinishReason, Timings
from smolrun.errors import RequestError
from smolrun.text.stop import StopStrings
from smolrun.text.thinking import ReasoningParser, ThinkingStop
from smolrun.text.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from smolrun.engine.guide import Guide
    from smolrun.text.code_calls import CodeCallParser, MixedCallParser
    from smolrun.text.tokenizer import Tokenizer
    from smolrun.text.tool_calls import CallDelta, ToolCallParser
    from smolrun.text.tools import ToolCall

    CallParser = ToolCallParser | CodeCallParser | MixedCallParser


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int  # all that were sampled: reasoning, and a stop token, included
    reasoning_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the natural logarithm of the probability that the model gave it."""

    id: int
    text: str  # bytes that are no whole character become U+FFFD
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()  # the likeliest tokens in its place


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text: str
    reasoning: str | None  # None where the model did not reason
    finish_reason: FinishReason  # "stop", "tool_calls" (it waits for the results of calls),
    # "length" (max_tokens or the context), "cancelled"
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None  # of every token but the stop token, if asked for
    token_ids: tuple[int, ...]  # sampled, without the stop token
    seed: int  # gives the same answer again
    tool_calls: tuple[ToolCall, ...] = ()  # complete ones, each with an id
    # Who ended the reasoning: "model", "budget" or "loop"; None where there is none, or no end.
    thinking_stopped_by: ThinkingStop | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ProgressEvent:
    """A long prompt is being read: `done` of `total` tokens."""

    done: int
    total: int


@dataclass(frozen=True)
class ReasoningEvent:
    """More of the reasoning."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that it is made of, if asked for


@dataclass(frozen=True)
class TextEvent:
    """More of the answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that it is made of, if asked for


@dataclass(frozen=True)
class ToolCallEvent:
    """More of a call of a tool. The first event of a call has no arguments yet."""

    index: int  # of the call in the answer, from 0
    id: str
    name: str
    arguments_delta: str  # JSON; the deltas of a call join to its `arguments_json`


@dataclass(frozen=True)
class EndEvent:
    """The end; the texts of the events before join to those of the result."""

    result: Result


Event = ProgressEvent | ReasoningEvent | TextEvent | ToolCallEvent | EndEvent


class Answer:
    """Makes the events of one request (an `Output` of the engine).

    Args:
        tokenizer: of the model; None for one that has none, whose answers are token ids only.
        prompt: token ids; an open think block at their end means that the answer starts inside.
        parameters: of the request. Stop strings are looked for in the answer, not the reasoning.
        chat: tell reasoning from the answer; otherwise everything generated is text.
        separate: where they are told apart, take the reasoning and its tags out of the text.
        guide: what steers the answer, if anything does.
        calls: finds calls of tools in the answer; None: there are none to look for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        parameters: SamplingParameters,
        *,
        chat: bool,
        separate: bool = True,
        guide: Guide | None = None,
        calls: CallParser | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._guide = guide
        self._calls = calls
        self._parser = self._decoder = None
        if tokenizer is None:
            if parameters.stop:
                raise RequestError("stop: this model has no tokenizer to find strings with")
        elif chat:
            self._parser = ReasoningParser(tokenizer, prompt)
        if tokenizer is not None and not (chat and separate):
            self._decoder = IncrementalDecoder(tokenizer, skip_special=True)
        self._stop = StopStrings(parameters.stop)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = [] if parameters.logprobs else None
        self._untold: list[TokenLogprob] = []  # of tokens whose text is in no event yet

    def progress(self, done: int, total: int) -> list[Event]:
        """See `Output`."""
        return [ProgressEvent(done, total)]

    def push(self, token: SampledToken) -> tuple[list[Event], bool]:
        """See `Output`."""
        self._ids.append(token.id)
        if self._logprobs is not None:
            self._logprobs.append(self._logprob(token))
            self._untold.append(self._logprobs[-1])
        reasoning = text = ""
        reasons = False
        if self._parser is not None:
            reasoned, at_edge = self._parser.in_reasoning, self._parser.at_edge
            reasoning, text = self._parser.push(token.id)
            reasons = reasoned or self._parser.in_reasoning
            if self._decoder is not None:
                reasoning, text = "", self._decoder.push(token.id)
            elif reasoned != self._parser.in_reasoning or (at_edge and self._parser.at_edge):
                # A tag, or line breaks beside one, which are part of neither text.
                self._untold = self._untold[-1:] if reasoning or text else []
        elif self._decoder is not None:
            text = self._decoder.push(token.id)
        deltas: list[CallDelta] = []
        if self._calls is not None and not (self._decoder is not None and reasons):
            text, deltas = self._calls.push(token.id, text)
        text, stopped = self._stop.push(text)
        events = self._events(reasoning, text)
        if not stopped:
            events += [ToolCallEvent(d.index, d.id, d.name, d.arguments) for d in deltas]
        complete = self._guide is not None and self._guide.complete
        return events, stopped or complete

    def finish(self, ending: Ending) -> list[Event]:
        """See `Output`."""
        reason = ending.finish_reason
        reasoning = text = ""
        if not self._stop.stopped:
            if self._decoder is not None:
                text = self._decoder.flush()
            elif self._parser is not None:
                reasoning, text = self._parser.flush()
            if self._calls is not None:
                text = self._calls.push(-1, text)[0] + self._calls.flush()
            text, _ = self._stop.push(text)
            text += self._stop.flush()[0]
            if self._stop.stopped:
                reason = "stop"
        calls = tuple(self._calls.calls) if self._calls else ()
        if calls and reason == "stop":
            reason = "tool_calls"
        events = self._events(reasoning, text)
        result = Result(
            text="".join(self._text),
            reasoning="".join(self._reasoning) if self._reasoning else None,
            finish_reason=reason,
            usage=Usage(
                prompt_tokens=ending.prompt_tokens,
                cached_tokens=ending.cached_tokens,
                completion_tokens=ending.completion_tokens,
                reasoning_tokens=self._parser.reasoning_tokens if self._parser else 0,
            ),
            timings=ending.timings,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            token_ids=tuple(self._ids),
            seed=ending.seed,
            tool_calls=calls,
            thinking_stopped_by=self._thinking_stopped_by(),
        )
        return [*events, EndEvent(result)]

    def _events(self, reasoning: str, text: str) -> list[Event]:
        events: list[Event] = []
        if reasoning:
            self._reasoning.append(reasoning)
            events.append(ReasoningEvent(reasoning, self._told()))
        if text:
            self._text.append(text)
            events.append(TextEvent(text, self._told()))
        return events

    def _thinking_stopped_by(self) -> ThinkingStop | None:
        if self._parser is None or not self._parser.closed:
            return None
        return self._guide.thinking_stopped_by if self._guide else "model"

    def _told(self) -> tuple[TokenLogprob, ...]:
        untold, self._untold = tuple(self._untold), []
        return untold

    def _logprob(self, token: SampledToken) -> TokenLogprob:
        return described(self._tokenizer, token)


def described(tokenizer: Tokenizer | None, token: SampledToken) -> TokenLogprob:
    """A token with log-probabilities as a user sees it."""

    def one(token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = tokenizer.token_bytes(token_id) if tokenizer else b""
        return TokenLogprob(token_id, data.decode("utf-8", "replace"), data, logprob, top)

    assert token.logprob is not None
    return one(token.id, token.logprob, tuple(one(*other) for other in token.top_logprobs))
