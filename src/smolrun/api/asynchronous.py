"""The same model for programs that run on an event loop.

Nothing here computes on the loop: templates and tokenizers work in threads, tokens come from the
engine's thread. The events of an answer wait in a queue of its own, which holds at most the
answer; the engine never waits for a reader, so one who stops reading holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, overload

import numpy as np

from smolrun.api.model import DEFAULT_MODEL, Model
from smolrun.api.request import TextArguments
from smolrun.api.stream import Stream
from smolrun.engine.answer import EndEvent, Event, Result
from smolrun.engine.engine import DEFAULT_TERMS
from smolrun.engine.likelihood import WINDOW_TOKENS, choice_score, perplexity_of
from smolrun.errors import RequestError

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Unpack

    from smolrun.api.reader import Expected
    from smolrun.engine.answer import TokenLogprob
    from smolrun.engine.likelihood import ChoiceScore, Perplexity
    from smolrun.engine.reading import TokenLikelihoods
    from smolrun.engine.sequence import Ending, Terms

P = ParamSpec("P")
T = TypeVar("T")

_PREPARING_THREADS = 4  # for templates and tokenizers; they start as they are needed


class AsyncStream(AsyncIterator[Event]):
    """The events of one answer, as they come; the last is an `EndEvent`.

    Leaving the loop and dropping the stream, cancelling the task that waits for it, or leaving
    `async with` ends the request within a step. Iterating starts the request; so does `start`,
    which raises what is wrong with its arguments. A stream belongs to the event loop that started
    it, and to one task at a time.
    """

    def __init__(self, begin: Callable[[], Awaitable[Stream]]) -> None:
        self._begin: Callable[[], Awaitable[Stream]] | None = begin
        self._stream: Stream | None = None
        self._bell = Bell()

    async def start(self) -> AsyncStream:
        """Render and tokenize in a thread, and hand the request to the engine. Returns self.

        Raises:
            SmolrunError: as the method of `Model` that makes such a stream.
        """
        if self._begin is not None:
            begin, self._begin = self._begin, None
            self._stream = await begin()
            self.share(self._bell)
        return self

    def share(self, bell: Bell) -> None:
        """On the loop: from now on, ring a bell that other streams of the same task may ring too.

        The stream has started, and is read by `poll` from now on.
        """
        self._bell = bell
        bell.hang()
        if self._stream is not None:
            # The engine holds the bell, not the stream: a stream that nobody holds is cancelled.
            self._stream.notify(bell.ring)

    def poll(self) -> Event | None:
        """The next event, or None where there is none yet; StopIteration after the last."""
        if self._stream is None:  # starting it has failed
            raise StopIteration
        return self._stream.poll()

    async def __anext__(self) -> Event:
        await self.start()
        try:
            while (event := self.poll()) is None:
                self._bell.listen()
                if (event := self.poll()) is not None:  # it came just before
                    break
                await self._bell.wait()
        except StopIteration:
            raise StopAsyncIteration from None
        except BaseException:  # above all, the task was cancelled
            self.cancel()
            raise
        return event

    async def __aenter__(self) -> AsyncStream:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request within a step; what was generated until then can still be read."""
        if self._stream is not None:
            self._stream.cancel()

    def account(self) -> Ending | None:
        """The account of the answer so far; None before it has started."""
        return None if self._stream is None else self._stream.account()

    async def result(self) -> Result:
        """Wait for the end and return the whole answer."""
        await self.start()
        if self._stream is not None:
            self._stream.skip_to_end()
        async for event in self:
            if isinstance(event, EndEvent):
                return event.result
        raise RequestError("the stream has already been read to its end")


class Bell:
    """Wakes one task of an event loop, once for all that came since it last listened."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._silent = False  # the task listens, and nobody has rung since
        self._rung = False  # and the loop knows

    def hang(self) -> None:
        """On the loop of the task, before anybody rings."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """On the loop: forget earlier rings. Look for what came before, then `wait`."""
        self._rung = False
        self._silent = True

    async def wait(self) -> None:
        """Until somebody rings, or has since `listen`."""
        if not self._rung:
            assert self._loop is not None
            self._waiter = self._loop.create_future()
            await self._waiter

    def ring(self) -> None:
        """From any thread. RuntimeError: the loop is closed."""
        assert self._loop is not None
        if self._loop.is_closed():
            raise RuntimeError("the event loop is closed")
        if self._silent:
            self._silent = False
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _streaming(
    method: Callable[Concatenate[Model, P], Stream],
) -> Callable[Concatenate[AsyncModel, P], AsyncStream]:
    """The method of `Model` as one whose stream is read on an event loop."""

    @functools.wraps(method)
    def stream(self: AsyncModel, /, *args: P.args, **options: P.kwargs) -> AsyncStream:
        return AsyncStream(lambda: self._prepared(method, self.model, *args, **options))

    return stream


def _answering(
    method: Callable[Concatenate[Model, P], Stream], like: Callable[..., object]
) -> Callable[Concatenate[AsyncModel, P], Coroutine[Any, Any, Result]]:
    """The same, for the whole answer: what `like` does on a `Model`."""
    streaming = _streaming(method)

    @functools.wraps(like)
    async def answer(self: AsyncModel, /, *args: P.args, **options: P.kwargs) -> Result:
        return await streaming(self, *args, **options).result()

    return answer


def _threaded(
    method: Callable[Concatenate[Model, P], T],
) -> Callable[Concatenate[AsyncModel, P], Coroutine[Any, Any, T]]:
    """The method of `Model`, run in a thread."""

    @functools.wraps(method)
    async def run(self: AsyncModel, /, *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.to_thread(method, self.model, *args, **options)

    return run


class AsyncModel:
    """A `Model` whose methods are awaited; several event loops and threads may share one.

    Args:
        model: what computes. It can be used beside this, and is closed by `close` of either.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._threads = ThreadPoolExecutor(_PREPARING_THREADS, "smolrun-prepare")

    @classmethod
    async def load(cls, name_or_path: str | Path = DEFAULT_MODEL, **options: Any) -> AsyncModel:
        """Load a model in a thread; arguments and errors as of `Model`."""
        return cls(await asyncio.to_thread(Model, name_or_path, **options))

    def __repr__(self) -> str:
        return f"Async{self.model!r}"

    stream = _streaming(Model.stream)
    stream_text = _streaming(Model.stream_text)
    chat = _answering(Model.stream, like=Model.chat)
    tokenize = _threaded(Model.tokenize)
    detokenize = _threaded(Model.detokenize)
    render = _threaded(Model.render)
    drain = _threaded(Model.drain)

    @overload
    async def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
        self,
        prompt: str | Sequence[int],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> Result: ...

    @overload
    async def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> list[Result]: ...

    async def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
        **arguments: Unpack[TextArguments],
    ) -> Result | list[Result]:
        """As `Model.generate`: of one prompt, or of a list of prompts side by side."""
        streams, single = await self._prepared(self.model.started, prompt, terms, arguments)
        answers = [_adopted(stream) for stream in streams]
        try:
            results = [await answer.result() for answer in answers]
        finally:  # an error of one cancels the others
            for answer in answers:
                answer.cancel()
        return results[0] if single else results

    async def embed(
        self,
        texts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
    ) -> npt.NDArray[np.float32]:
        """As `Model.embed`."""
        requests, single = await self._prepared(self.model.reading, texts, terms)
        readings = [_adopted(Stream(request)) for request in requests]
        try:
            vectors: list[Any] = [await anext(reading) for reading in readings]
        finally:
            for reading in readings:
                reading.cancel()
        return vectors[0] if single else np.stack(vectors)

    async def score(
        self,
        prompt: str | Sequence[int],
        choices: Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
    ) -> list[ChoiceScore]:
        """As `Model.score`."""
        texts = await self._prepared(self.model.choice_texts, prompt, choices)
        async with contextlib.aclosing(self._scored(texts, terms)) as scored:
            return [choice_score(one.logprobs, one.greedy) async for one in scored]

    async def perplexity(
        self,
        text: str | Sequence[int],
        *,
        context: int = WINDOW_TOKENS,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        terms: Terms = DEFAULT_TERMS,
    ) -> Perplexity:
        """As `Model.perplexity`; `progress` is called on the event loop."""
        windows = await self._prepared(self.model.windows, text, context, stride)
        found: list[npt.NDArray[np.float64]] = []
        async with contextlib.aclosing(self._scored(windows, terms)) as scored:
            async for one in scored:
                found.append(one.logprobs)
                if progress is not None:
                    progress(len(found), len(windows))
        return perplexity_of(np.concatenate(found), len(windows))

    async def _scored(
        self, texts: Sequence[Expected], terms: Terms
    ) -> AsyncGenerator[TokenLikelihoods, None]:
        """What the model makes of texts, in their order."""
        engine = self.model.loaded.engine
        under_way: deque[AsyncStream] = deque()
        try:
            for text, most in zip(texts, self.model.side_by_side(texts), strict=True):
                under_way.append(_adopted(Stream(engine.score(*text, terms))))
                while len(under_way) > most:
                    yield cast("TokenLikelihoods", await anext(under_way[0]))
                    under_way.popleft()
            for reading in under_way:
                yield cast("TokenLikelihoods", await anext(reading))
        finally:
            for reading in under_way:
                reading.cancel()

    async def prompt_logprobs(
        self,
        prompt: str | Sequence[int],
        *,
        top_logprobs: int = 0,
        terms: Terms = DEFAULT_TERMS,
    ) -> list[TokenLogprob]:
        """As `Model.prompt_logprobs`."""
        model = self.model
        ids, request = await self._prepared(model.likelihood, prompt, top_logprobs, terms)
        if request is None:
            return model.told(ids, ())
        found: Any = await anext(_adopted(Stream(request)))
        return model.told(ids, found.tokens)

    async def close(self) -> None:
        """Stop the model after its current step; answers under way end in an error."""
        await asyncio.to_thread(self.model.close)

    async def __aenter__(self) -> AsyncModel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _prepared(self, function: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        call = functools.partial(function, *args, **options)
        return await loop.run_in_executor(self._threads, call)


def _adopted(stream: Stream) -> AsyncStream:
    """A stream that runs already."""
    stream.skip_to_end()

    async def begin() -> Stream:
        return stream

    return AsyncStream(begin)
