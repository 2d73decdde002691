"""How many requests may be under way, and when to come back where there are too many.

A place is taken before anything is computed for a request, so that a burst costs nothing, and is
given back when the request ends. Safe to use from any thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from smolrun.errors import ClosedError, QueueFullError

# Seconds that a caller is told to wait, at least and at most.
SHORTEST_WAIT, LONGEST_WAIT = 1, 30
_ENDINGS = 32  # of which the rate is taken


class Place:
    """The right to one request. Given back when that ends, by `leave`, or when it is dropped."""

    def __init__(self, places: Places) -> None:
        self._places: Places | None = places
        self._tokens = 0

    def wait(self, tokens: int) -> None:
        """A prompt of so many tokens waits from now on. QueueFullError where too many do."""
        if self._places is not None and not self._tokens:
            self._places.add_waiting(tokens)
            self._tokens = tokens

    def begin(self) -> None:
        """The prompt waits no longer."""
        if self._places is not None and self._tokens:
            self._places.remove_waiting(self._tokens)
            self._tokens = 0

    def leave(self) -> None:
        """Give the place back; doing so twice is no harm."""
        self.begin()
        places, self._places = self._places, None
        if places is not None:
            places.left()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __del__(self) -> None:
        self.leave()


class Places:
    """Counts requests that are prepared, wait or run.

    `limit` is the most of them, and `token_limit` the most prompt tokens that wait (one prompt may
    always wait); None is no limit.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.token_limit: int | None = None
        self.taken = 0
        self.waiting_tokens = 0
        self.rejected = 0
        self._closed = False
        self._endings: deque[float] = deque(maxlen=_ENDINGS)  # when requests ended
        self._rejected_since = 0  # the last of these
        # Reentrant: a place may be dropped, and so leave, wherever memory is taken.
        self._changed = threading.Condition(threading.RLock())

    def take(self, count: int = 1) -> list[Place]:
        """So many places.

        Raises:
            QueueFullError: there are not so many; it says when to come back.
            ClosedError: no more requests are taken.
        """
        with self._changed:
            if self._closed:
                raise ClosedError("no more requests are taken; the model is about to be closed")
            if self.limit is not None and self.taken + count > self.limit:
                self._reject(f"all of {self.limit} places for requests are taken")
            self.taken += count
        return [Place(self) for _ in range(count)]

    def add_waiting(self, tokens: int) -> None:
        """See `Place.wait`."""
        with self._changed:
            full = self.token_limit is not None and self.waiting_tokens + tokens > self.token_limit
            if full and self.waiting_tokens:
                self._reject(
                    f"prompts of {self.waiting_tokens} tokens wait, and at most "
                    f"{self.token_limit} may"
                )
            self.waiting_tokens += tokens

    def remove_waiting(self, tokens: int) -> None:
        """See `Place.begin`."""
        with self._changed:
            self.waiting_tokens -= tokens

    def left(self) -> None:
        """See `Place.leave`."""
        with self._changed:
            self.taken -= 1
            self._endings.append(time.monotonic())
            self._rejected_since = 0
            self._changed.notify_all()

    def close(self) -> None:
        """Give out no more places."""
        with self._changed:
            self._closed = True

    def wait_until_free(self, timeout: float | None) -> bool:
        """Wait until every place was given back; False where that takes longer than `timeout`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.taken, timeout)

    def _reject(self, why: str) -> None:
        """Everyone turned away is told to come back when it may be their turn."""
        self.rejected += 1
        self._rejected_since += 1
        seconds = float(SHORTEST_WAIT)
        if len(self._endings) > 1:
            per_ending = (time.monotonic() - self._endings[0]) / (len(self._endings) - 1)
            seconds = self._rejected_since * per_ending
        wait = min(max(math.ceil(seconds), SHORTEST_WAIT), LONGEST_WAIT)
        raise QueueFullError(f"{why}; come back in {wait} seconds", wait)
