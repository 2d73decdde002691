"""Sequences that are only read: their hidden states are wanted, and no tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.engine.runner import Float32Array
from smolrun.engine.sampling import SampledToken, SamplingParameters
from smolrun.engine.sequence import Ending, Sequence, Terms
from smolrun.errors import NonFiniteError


class MeanHidden:
    """Makes the one event of a sequence that is read: the mean of its hidden states, of length 1.

    Rows are added one after the other in float64, so the sum does not depend on how the text was
    cut into chunks.
    """

    def __init__(self, hidden_size: int) -> None:
        self._sum = np.zeros(hidden_size)
        self._count = 0

    def take(self, hidden: Float32Array) -> None:
        """More rows (n, hidden_size). NonFiniteError where a number is NaN or infinite."""
        if not np.isfinite(hidden).all():
            raise NonFiniteError(
                f"the model computed a hidden state that is not finite, among tokens "
                f"{self._count} to {self._count + len(hidden) - 1}"
            )
        for row in hidden:
            self._sum += row
        self._count += len(hidden)

    def progress(self, done: int, total: int) -> Iterable[Any]:
        """See `Output`."""
        return ()

    def push(self, token: SampledToken) -> tuple[Iterable[Any], bool]:
        """See `Output`; nothing is sampled."""
        raise AssertionError("a sequence that is read has no tokens of its own")

    def finish(self, ending: Ending) -> list[npt.NDArray[np.float32]]:
        """See `Output`: float32 (hidden_size,), unless the request was cancelled."""
        if ending.finish_reason == "cancelled":
            return []
        norm = float(np.sqrt((self._sum * self._sum).sum()))
        return [(self._sum / norm if norm else self._sum).astype(np.float32)]


class Reading(Sequence):
    """A sequence of given tokens.

    It neither fills the prefix cache nor takes from it, which knows no hidden states.

    Args:
        tokens: at least one.
        output: takes their hidden states.
        terms: whose it is, and how long it may take.
    """

    def __init__(self, tokens: list[int], output: MeanHidden, terms: Terms) -> None:
        # The prefix cache knows nothing under this salt, as nothing is ever committed under it.
        own = replace(terms, salt=b"reading\0" + terms.salt)
        once = SamplingParameters(max_tokens=1)
        super().__init__(tokens, once, (), len(tokens) + 1, output, own)
        self.take = output.take
