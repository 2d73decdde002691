"""Stop strings, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from smolrun.errors import RequestError

MAX_STRINGS = 64
MAX_LENGTH = 1024  # characters of one stop string


class StopStrings:
    """Passes text on until a stop string comes.

    What is passed on is the text before the stop string that begins first in the whole text,
    however that is cut into pieces. Text that may turn out to begin a stop string is held back.

    Args:
        strings: the stop strings, one or a list.

    Raises:
        RequestError: not a list of texts, an empty one, or too many.
    """

    def __init__(self, strings: str | Sequence[str] | None = None) -> None:
        given = [strings] if isinstance(strings, str) else strings or []
        if isinstance(given, (bytes, dict)) or not isinstance(given, Sequence):
            raise RequestError(f"stop: expected a list of texts, found {type(given).__name__}")
        if len(given) > MAX_STRINGS:
            raise RequestError(f"stop: at most {MAX_STRINGS} strings, found {len(given)}")
        for index, string in enumerate(given):
            if not isinstance(string, str):
                raise RequestError(f"stop[{index}]: expected text, found {type(string).__name__}")
            if not 0 < len(string) <= MAX_LENGTH:
                raise RequestError(
                    f"stop[{index}]: expected 1 to {MAX_LENGTH} characters, found {len(string)}"
                )
        self._strings = tuple(dict.fromkeys(given))
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes a piece of text.

        Returns:
            Text to pass on, and whether a stop string has ended it.
        """
        return self._advance(text, final=False)

    def flush(self) -> tuple[str, bool]:
        """At the end of the text: what was held back, and whether a stop string has ended it."""
        return self._advance("", final=True)

    def _advance(self, text: str, *, final: bool) -> tuple[str, bool]:
        if self.stopped:
            return "", True
        held = self._held + text
        found = [place for place in map(held.find, self._strings) if place >= 0]
        stop = min(found, default=len(held))
        # A longer stop string may have begun before the one that is complete.
        begun = None if final else self._first_begun(held, stop)
        if begun is None and found:
            self.stopped = True
            self._held = ""
            return held[:stop], True
        keep = len(held) if begun is None else begun
        self._held = held[keep:]
        return held[:keep], False

    def _first_begun(self, held: str, stop: int) -> int | None:
        for place in range(max(0, len(held) - self._longest + 1), stop):
            rest = held[place:]
            if any(string.startswith(rest) for string in self._strings):
                return place
        return None
