"""Who is in, and who is turned away."""

from __future__ import annotations

import math
import time

from smolrun.server.errors import busy


class Gate:
    """Counts who is in, and turns away who finds no place."""

    def __init__(self, places: int, what: str) -> None:
        self.places = places
        self.taken = 0
        self._what = what
        self._seconds = 1.0  # that a place is taken for, on average of late

    def enter(self, places: int = 1) -> Place:
        """Take places. ApiError, 429, where there are too few."""
        if self.taken + places > self.places:
            turns = (self.taken + places) / self.places
            raise busy(
                f"All {self.places} places for {self._what} are taken; come back later.",
                math.ceil(turns * self._seconds),
            )
        self.taken += places
        return Place(self, places)

    def left(self, places: int, seconds: float) -> None:
        """Places are free again after so many seconds."""
        self.taken -= places
        self._seconds += 0.1 * (seconds - self._seconds)


class Place:
    """Places in a gate, to be left one by one or together; leaving twice is no harm."""

    def __init__(self, gate: Gate, places: int) -> None:
        self._gate = gate
        self._places = places
        self._entered = time.monotonic()

    def leave(self, places: int | None = None) -> None:
        """Give some, or all that are left, back."""
        count = self._places if places is None else min(places, self._places)
        if count:
            self._places -= count
            self._gate.left(count, time.monotonic() - self._entered)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
