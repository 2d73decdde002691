"""Repeated measurements of one thing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Samples:
    """What was measured, once per repetition; at least one value."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("samples: nothing was measured")

    @classmethod
    def of(cls, values: Iterable[float]) -> Samples:
        """Samples of any iterable."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """The middle value; of an even number, the mean of the middle two."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def greatest(self) -> float:
        """The largest value."""
        return max(self.values)

    @property
    def high(self) -> float:
        """The value that at most a hundredth of the values exceed."""
        ordered = sorted(self.values)
        return ordered[len(ordered) - 1 - len(ordered) // 100]

    def rate(self, amount: float) -> Samples:
        """Amount per second, where these are seconds."""
        return Samples.of(amount / seconds for seconds in self.values)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "median": self.median,
            "min": self.least,
            "max": self.greatest,
            "samples": list(self.values),
        }
