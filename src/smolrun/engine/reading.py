"""Sequences that are only read: something is wanted of given tokens, and no others come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smolrun.engine.likelihood import log_probabilities
from smolrun.engine.runner import Float32Array
from smolrun.engine.sampling import (
    SampledToken,
    SamplingParameters,
    check_finite,
    with_logprobs,
)
from smolrun.engine.sequence import Ending, Output, Sequence, Terms
from smolrun.errors import NonFiniteError


class Given(Sequence):
    """A sequence of given tokens.

    Args:
        tokens: at least one.
        first_row: from this token on, something is wanted of each.
        take: takes that, row by row, as it is computed.
        output: makes the one event at the end.
        terms: whose it is, and how long it may take.
    """

    def __init__(
        self,
        tokens: list[int],
        first_row: int,
        take: Callable[[Float32Array], None],
        output: Output,
        terms: Terms,
    ) -> None:
        once = SamplingParameters(max_tokens=1)
        super().__init__(tokens, once, (), len(tokens) + 1, output, terms)
        self.first_row = first_row
        self.take = take


class _Once:
    """An `Output` of one event."""

    def progress(self, done: int, total: int) -> Iterable[Any]:
        """See `Output`."""
        return ()

    def push(self, token: SampledToken) -> tuple[Iterable[Any], bool]:
        """See `Output`; nothing is sampled."""
        raise AssertionError("a sequence that is read has no tokens of its own")


class MeanHidden(_Once):
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

    def finish(self, ending: Ending) -> list[npt.NDArray[np.float32]]:
        """See `Output`: float32 (hidden_size,), unless the request was cancelled."""
        if ending.finish_reason == "cancelled":
            return []
        norm = float(np.sqrt((self._sum * self._sum).sum()))
        return [(self._sum / norm if norm else self._sum).astype(np.float32)]


class Reading(Given):
    """Tokens whose hidden states are wanted.

    It neither fills the prefix cache, which only finite logits may, nor takes from it, which knows
    no hidden states.
    """

    def __init__(self, tokens: list[int], output: MeanHidden, terms: Terms) -> None:
        super().__init__(tokens, 0, output.take, output, terms)


@dataclass(frozen=True)
class TokenLikelihoods:
    """How likely tokens are, each after those before it."""

    logprobs: npt.NDArray[np.float64]  # (n,) natural logarithms; none where `tokens` has them
    greedy: bool  # each is the likeliest in its place
    tokens: tuple[SampledToken, ...]  # with the likeliest ones in the place of each, if asked for


class Likelihood(_Once):
    """Makes the one event of a sequence that is scored.

    Args:
        expected: the tokens that count.
        top_logprobs: make tokens, with so many likeliest ones in the place of each.
    """

    def __init__(self, expected: Items[int], top_logprobs: int | None) -> None:
        self._expected = np.array(expected, np.int32)
        self._top = top_logprobs
        self._count = 0
        self._logprobs: list[float] = []
        self._greedy = True
        self._tokens: list[SampledToken] = []

    def take(self, logits: Float32Array) -> None:
        """More rows (n, vocab_size). NonFiniteError where a number is NaN or infinite."""
        check_finite(logits)
        expected = self._expected[self._count : self._count + len(logits)]
        self._count += len(logits)
        for row in range(len(logits)):  # one by one: what is computed in between stays small
            own, token = logits[row : row + 1], expected[row : row + 1]
            self._greedy &= int(own.argmax()) == int(token[0])
            if self._top is None:
                self._logprobs += log_probabilities(own, token).tolist()
            else:
                self._tokens.append(with_logprobs(int(token[0]), own[0], self._top))

    def finish(self, ending: Ending) -> list[TokenLikelihoods]:
        """See `Output`; nothing where the request was cancelled."""
        if ending.finish_reason == "cancelled":
            return []
        logprobs = np.array(self._logprobs)
        return [TokenLikelihoods(logprobs, self._greedy, tuple(self._tokens))]


class Scoring(Given):
    """Tokens of which some are expected after those before them.

    Args:
        tokens: at least two; the last predicts nothing, so it is not computed.
        first: the first that is expected, at least 1.
        output: takes the logits.
        terms: whose it is, and how long it may take.
    """

    def __init__(self, tokens: list[int], first: int, output: Likelihood, terms: Terms) -> None:
        super().__init__(tokens[:-1], first - 1, output.take, output, terms)
