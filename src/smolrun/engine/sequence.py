"""One request: what its caller holds, and what the loop knows of it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from smolrun.engine.kv import BlockTable
from smolrun.engine.places import Place
from smolrun.engine.sampling import Constraint, SampledToken, Sampler, SamplingParameters
from smolrun.errors import DeadlineError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]

# A signal that comes just before a thread falls asleep does not wake it, and an answer that is
# waited for as a whole has no event but its last: so the thread looks up that often.
_SIGNAL_SECONDS = 0.5


@dataclass(frozen=True)
class Timings:
    """Where the time of one request went, in milliseconds; rates in tokens per second."""

    queue_ms: float  # waiting to be let in
    prompt_ms: float  # from then to the first token
    predicted_ms: float  # from the first token to the last
    prompt_n: int  # prompt tokens that were computed (those not found in the prefix cache)
    predicted_n: int  # tokens sampled

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens computed per second."""
        return 1000 * self.prompt_n / self.prompt_ms if self.prompt_ms else 0.0

    @property
    def predicted_per_second(self) -> float:
        """Tokens generated per second; the first, which the prompt's time covers, left out."""
        return 1000 * (self.predicted_n - 1) / self.predicted_ms if self.predicted_ms else 0.0


@dataclass(frozen=True)
class Ending:
    """How a request ended, in tokens."""

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int  # sampled, a stop token included
    seed: int
    timings: Timings


@dataclass(frozen=True)
class Terms:
    """On what terms the engine serves a request.

    Times are in seconds from its submission; None is as long as it takes.
    """

    key: str = ""  # whose it is: those of different keys take turns
    salt: bytes = b""  # requests with different salts share no prefix cache
    queue_seconds: float | None = None  # it may wait before it runs
    total_seconds: float | None = None  # until its answer is complete
    place: Place | None = None  # taken before; None takes one when it is submitted


class Output(Protocol):
    """Turns tokens into the events that a caller sees. Called on the loop's thread.

    An exception ends the request it belongs to, no other.
    """

    def progress(self, done: int, total: int) -> Iterable[Any]:
        """`done` of `total` prompt tokens are computed, the prompt needs more than one step."""

    def push(self, token: SampledToken) -> tuple[Iterable[Any], bool]:
        """Events for one more token; True when the answer ends here (a stop string)."""

    def finish(self, ending: Ending) -> Iterable[Any]:
        """The last events. A stop token is never pushed."""


class Sequence:
    """What the loop knows of one request.

    Args:
        prompt: token ids, at least one, shorter than the context.
        parameters: how to sample.
        stop_ids: tokens that end the answer.
        context_size: most tokens, prompt and answer.
        output: makes the events.
        terms: whose it is, and how long it may take.
        constraint: of the tokens that are drawn.
    """

    def __init__(
        self,
        prompt: list[int],
        parameters: SamplingParameters,
        stop_ids: Collection[int],
        context_size: int,
        output: Output,
        terms: Terms,
        constraint: Constraint | None = None,
    ) -> None:
        self.tokens = list(prompt)  # the prompt, then what was sampled
        self.prompt_tokens = len(prompt)
        self.first_row = len(prompt) - 1  # from this token on the logits of each are wanted
        room = context_size - len(prompt)
        wanted = room if parameters.max_tokens is None else parameters.max_tokens
        self.limit = len(prompt) + min(wanted, room)  # length at which it ends
        self.stop_ids: Collection[int] = () if parameters.ignore_eos else stop_ids
        self.sampler = Sampler(parameters, prompt, constraint)
        self.output = output
        self.terms = terms
        self.key, self.salt = terms.key, terms.salt
        self.place = terms.place
        self.table: BlockTable | None = None  # None until it is let in
        self.computed = 0  # leading tokens whose K and V are in the cache
        self.cached_tokens = 0
        self.cancelled = False  # set by any thread, read by the loop
        self.ending_only = False  # the same: the caller is not told what comes before the end
        # Events for the caller: ("event", it), then ("error", exception) or ("end", None).
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.notify: Callable[[], None] | None = None  # called after each
        self.submitted = time.perf_counter()
        self.admitted = self.first_token = self.last_token = self.submitted

    def admit(self) -> None:
        """It waits no longer."""
        self.admitted = time.perf_counter()
        if self.place is not None:
            self.place.begin()

    def overdue(self, now: float) -> DeadlineError | None:
        """The error of a request that took longer than it may."""
        waits, waited = self.table is None, now - self.submitted
        queue_seconds, total_seconds = self.terms.queue_seconds, self.terms.total_seconds
        if waits and queue_seconds is not None and waited > queue_seconds:
            return DeadlineError(
                f"the request waited longer than {queue_seconds:g} s for its turn", started=False
            )
        if total_seconds is not None and waited > total_seconds:
            return DeadlineError(
                f"the request took longer than {total_seconds:g} s", started=not waits
            )
        return None

    @property
    def kv_tokens(self) -> int:
        """Tokens it may have to store; the last one sampled is never fed back."""
        return self.limit - 1

    @property
    def remaining(self) -> int:
        """Tokens that stand there but are not computed yet: 1 while generating."""
        return len(self.tokens) - self.computed

    @property
    def generating(self) -> bool:
        """Whether the prompt is through."""
        return self.remaining == 1 and len(self.tokens) > self.prompt_tokens

    def append(self, token: int) -> FinishReason | None:
        """Add a sampled token; says whether the answer ends with it."""
        self.last_token = time.perf_counter()
        if len(self.tokens) == self.prompt_tokens:
            self.first_token = self.last_token
        self.tokens.append(token)
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def emit(self, events: Iterable[Any]) -> bool:
        """Hand events to the caller, unless it only waits for the end; says whether it did.

        Waking the caller's thread for each token costs as much as everything else beside the step.
        """
        if self.ending_only:
            return False
        handed = False
        for event in events:
            self._put("event", event)
            handed = True
        return handed

    def fail(self, error: Exception) -> None:
        """Hand the caller an error, the last thing it sees."""
        self._put("error", error)

    def finish(self, ending: Ending) -> None:
        """Hand the caller the last events."""
        for event in self.output.finish(ending):
            self._put("event", event)
        self._put("end", None)

    def _put(self, kind: str, value: Any) -> None:
        self.events.put((kind, value))
        if self.notify is not None:
            try:
                self.notify()
            except Exception:  # the caller's event loop is closed, and nobody will read this
                self.notify = None
                self.cancelled = True

    def ending(self, reason: FinishReason) -> Ending:
        """The account of the whole request."""
        sampled = len(self.tokens) - self.prompt_tokens
        return Ending(
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=sampled,
            seed=self.sampler.seed,
            timings=Timings(
                queue_ms=1000 * (self.admitted - self.submitted),
                prompt_ms=1000 * (self.first_token - self.admitted) if sampled else 0.0,
                predicted_ms=1000 * (self.last_token - self.first_token) if sampled else 0.0,
                prompt_n=self.prompt_tokens - self.cached_tokens,
                predicted_n=sampled,
            ),
        )


class Request:
    """The caller's side of a sequence: an iterator of events.

    Iterating raises the request's error. Whoever is interrupted while waiting, or drops the
    request, cancels it.
    """

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        while True:
            try:
                entry = self._sequence.events.get(timeout=_SIGNAL_SECONDS)
            except queue.Empty:
                continue
            except BaseException:  # Ctrl-C: nobody waits for the answer any more
                self.cancel()
                raise
            return self._taken(entry)

    def poll(self) -> Any:
        """The next event, or None where there is none yet; StopIteration after the last."""
        if self._ended:
            raise StopIteration
        try:
            entry = self._sequence.events.get_nowait()
        except queue.Empty:
            return None
        return self._taken(entry)

    def notify(self, callback: Callable[[], None]) -> None:
        """From now on, have `callback` called on the loop's thread after each event.

        Poll once after this. An exception of the callback cancels the request.
        """
        self._sequence.notify = callback

    def _taken(self, entry: tuple[str, Any]) -> Any:
        kind, value = entry
        if kind == "event":
            return value
        self._ended = True
        if kind == "error":
            raise value
        raise StopIteration

    def account(self) -> Ending:
        """The account of the request so far."""
        return self._sequence.ending("length")

    def skip_to_end(self) -> None:
        """From now on, have no events but the last ones, which `Output.finish` makes."""
        self._sequence.ending_only = True

    def cancel(self) -> None:
        """End the request within a step; what was generated until then still comes out."""
        self._sequence.cancelled = True

    def __del__(self) -> None:
        self.cancel()
