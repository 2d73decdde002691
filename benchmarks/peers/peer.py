"""What a program is asked for when it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Settings:
    """What every side is loaded with."""

    threads: int
    context_size: int  # tokens of a sequence that is alone
    sequences: int = 1  # that decode side by side, at most
    shared_size: int = 0  # tokens of each of these
    activations: Literal["exact", "fast"] = "fast"  # smolrun's

    @property
    def most_tokens(self) -> int:
        """In the caches of all sequences together, at most."""
        return max(self.context_size, self.sequences * self.shared_size)


class Peer(Protocol):
    """A loaded model. Times are seconds of wall clock; no prompt is remembered between calls."""

    name: str  # with what it computes in, where the file does not say it

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds to take a prompt in, up to the logits of its last token."""

    def decode(self, sequences: int, depth: int, count: int) -> float:
        """Seconds for `count` greedy tokens of each sequence, `depth` tokens being in its cache.

        All sequences take a step together. What came before is not timed.
        """

    def close(self) -> None:
        """Give memory and threads back."""


def first_tokens(sequences: int) -> list[int]:
    """What each sequence goes on from: a token of its own, so that they differ."""
    return [20 + 7 * index for index in range(sequences)]
