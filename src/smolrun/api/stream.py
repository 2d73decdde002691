"""How a request is sampled, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict, cast

from smolrun.engine.answer import EndEvent, Event, Result
from smolrun.engine.sequence import Request
from smolrun.errors import RequestError


class SamplingArguments(TypedDict, total=False):
    """How to sample. What is left out, or None, is as the model's files or makers recommend.

    The order is: logit bias, penalties, temperature, top-k, top-p, min-p.
    """

    max_tokens: int | None  # tokens to generate at most; default: what the context leaves
    temperature: float | None  # 0 to 100; 0 always takes the likeliest token
    top_k: int | None  # only the k likeliest; 0 or -1: all
    top_p: float | None  # only the likeliest that together reach p
    min_p: float | None  # only those at least p times as likely as the likeliest
    repeat_penalty: float | None  # on logits of the last 64 tokens: positive ones are divided by
    # it, negative ones multiplied; 1 is off
    presence_penalty: float | None  # -2 to 2, off the logit of each token of the answer so far
    frequency_penalty: float | None  # -2 to 2, likewise, times how often it occurred
    logit_bias: Mapping[int, float] | None  # token id: -100 to 100, added to its logit
    seed: int | None  # 0 to 2**64 - 1; default: a random one, which the result tells
    stop: str | Sequence[str] | None  # the answer ends before the first of these
    logprobs: bool | None  # log-probabilities of the model's own logits
    top_logprobs: int | None  # and of so many likeliest tokens, at most 20
    ignore_eos: bool | None  # go on past end-of-text tokens, for measurements


class Stream(Iterator[Event]):
    """The events of one answer, as they come.

    Leaving the loop, or dropping the stream, ends the request. `cancel()` ends it too, but the
    events up to the end still come.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    def __next__(self) -> Event:
        return cast(Event, next(self._request))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request within a step."""
        self._request.cancel()

    def result(self) -> Result:
        """Wait for the end and return the whole answer. Whoever is interrupted cancels it."""
        self._request.skip_to_end()
        try:
            for event in self:
                if isinstance(event, EndEvent):
                    return event.result
        except BaseException:
            self.cancel()
            raise
        raise RequestError("the stream has already been read to its end")
