"""The events of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from smolrun.engine.answer import EndEvent, Event, Result
from smolrun.engine.sequence import Ending, Request
from smolrun.errors import RequestError


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

    def poll(self) -> Event | None:
        """The next event, or None where there is none yet; StopIteration after the last."""
        return cast("Event | None", self._request.poll())

    def notify(self, callback: Callable[[], None]) -> None:
        """From now on, have `callback` called on the engine's thread after each event."""
        self._request.notify(callback)

    def account(self) -> Ending:
        """The account of the answer so far, as if `max_tokens` ended it here."""
        return self._request.account()

    def skip_to_end(self) -> None:
        """From now on, have only the last events: what is left of the text, and the end."""
        self._request.skip_to_end()

    def result(self) -> Result:
        """Wait for the end and return the whole answer. Whoever is interrupted cancels it."""
        self.skip_to_end()
        try:
            for event in self:
                if isinstance(event, EndEvent):
                    return event.result
        except BaseException:
            self.cancel()
            raise
        raise RequestError("the stream has already been read to its end")
