"""The answers of one request on the event loop: started, waited for, told piece by piece, let go.

Whatever becomes of a request, its answers end with it: a client that has gone is noticed while
it waits in the queue, while its prompt is read and while its answer is written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from smolrun.api import EndEvent, Event, Result, Terms, TextEvent, TokenLogprob
from smolrun.api.asynchronous import AsyncStream, Bell
from smolrun.server import replies
from smolrun.server.errors import ApiError

if TYPE_CHECKING:
    from smolrun.server.metrics import Metrics

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Finished:
    """A whole answer."""

    result: Result
    logprobs: tuple[TokenLogprob, ...]  # of the tokens of its text, if they were asked for


class Work:
    """The answers of one request.

    Args:
        ping_seconds: of silence, after which `events` tells of it.
        metrics: count them.
        streams: one for each answer, not started yet.
        terms: of each, with its place.
        choices: of each prompt, next to each other.
    """

    def __init__(
        self,
        ping_seconds: float,
        metrics: Metrics,
        streams: Sequence[AsyncStream],
        terms: Sequence[Terms],
        choices: int,
    ) -> None:
        self.results: dict[int, Result] = {}  # of the answers that have ended
        self._ping_seconds = ping_seconds
        self._metrics = metrics
        self._streams = streams
        self._places = [one.place for one in terms if one.place is not None]
        self._choices = choices
        self._aborted: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Hand them to the engine.

        Raises:
            SmolrunError: what is wrong with the request.
        """
        try:
            for stream in self._streams:  # one by one: the first error is the one that is told
                await stream.start()
        except BaseException:
            self.close()
            raise
        self._places = []  # the engine gives them back

    async def all_finished(self, wants_logprobs: bool) -> list[Finished]:
        """Wait for all of them.

        Raises:
            SmolrunError, ApiError: what ended one of them ends all.
        """
        waits = [self._finished(index, wants_logprobs) for index in range(len(self._streams))]
        everything = asyncio.gather(*waits)
        ends: set[asyncio.Future[Any]] = {everything, self._aborted}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._aborted.done():
                raise self._aborted.result()
            return everything.result()
        finally:
            everything.cancel()
            with contextlib.suppress(BaseException):
                await everything
            self.close()

    async def events(self) -> AsyncIterator[Sequence[tuple[int, Event]]]:
        """Events of all answers, each with its answer's number: as many as have come.

        None of them is a moment of silence, at which a sign of life is due.

        Raises:
            SmolrunError, ApiError: what ended one of them ends all.
        """
        bell = Bell()
        for stream in self._streams:
            stream.share(bell)
        self._aborted.add_done_callback(lambda _: bell.ring())
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(self._ping_seconds)
                ticks += 1
                bell.ring()

        ticking = asyncio.ensure_future(tick())
        told = 0
        try:
            while True:
                bell.listen()
                found, error = self._poll()
                if found:
                    yield found
                elif told != ticks:
                    told = ticks
                    yield ()
                if error is not None:
                    raise error
                if len(self.results) == len(self._streams):
                    return
                if not found:
                    await bell.wait()
        finally:
            ticking.cancel()
            self.close()

    def _poll(self) -> tuple[list[tuple[int, Event]], Exception | None]:
        """The events that have come, and the error after them that ends the request."""
        found: list[tuple[int, Event]] = []
        if self._aborted.done():
            return found, self._aborted.result()
        for index, stream in enumerate(self._streams):
            try:
                while index not in self.results and (event := stream.poll()) is not None:
                    if isinstance(event, EndEvent):
                        self._note(index, event.result)
                    found.append((index, event))
            except Exception as error:
                return found, error
        return found, None

    def timings(self, index: int) -> dict[str, Any]:
        """Timings of an answer so far."""
        account = self._streams[index].account()
        assert account is not None
        return replies.timings(account.timings, account.cached_tokens)

    def abort(self, error: ApiError) -> None:
        """End the answers with an error."""
        if not self._aborted.done():
            self._aborted.set_result(error)

    def close(self) -> None:
        """Cancel what still runs."""
        for index, stream in enumerate(self._streams):
            if index not in self.results:
                stream.cancel()
        for place in self._places:
            place.leave()

    async def _finished(self, index: int, wants_logprobs: bool) -> Finished:
        stream = self._streams[index]
        if not wants_logprobs:
            result = await stream.result()
            self._note(index, result)
            return Finished(result, ())
        logprobs: list[TokenLogprob] = []
        async for event in stream:
            if isinstance(event, TextEvent):
                logprobs += event.logprobs
            elif isinstance(event, EndEvent):
                self._note(index, event.result)
                return Finished(event.result, tuple(logprobs))
        raise AssertionError("a stream ends with an EndEvent or an error")

    def _note(self, index: int, result: Result) -> None:
        self.results[index] = result
        self._metrics.ended(result, index % self._choices == 0)


async def while_connected(request: Request, wait: Coroutine[Any, Any, T]) -> T:
    """The result of `wait`, which is cancelled when the client goes.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(wait)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for other in (task, gone):
            if not other.done():
                other.cancel()
                with contextlib.suppress(BaseException):
                    await other


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
