"""How likely a model finds a text: the log-probability of each token after those before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from smolrun.errors import RequestError

if TYPE_CHECKING:
    from smolrun.engine.forward import Forward

WINDOW_TOKENS = 512
# Rows of logits in memory at a time: 64 MB with a vocabulary of 128k.
MOST_ROWS = 128


@dataclass(frozen=True)
class Window:
    """A piece of a text that a model reads from an empty cache, of which some tokens count."""

    start: int  # in the text's tokens
    first: int  # the first that counts; those before it are its context
    end: int

    @property
    def scored(self) -> int:
        """Tokens that count."""
        return self.end - self.first


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability."""

    value: float
    error: float  # standard error of `value`
    tokens: int  # that count
    windows: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f} ({self.tokens} tokens)"


@dataclass(frozen=True)
class ChoiceScore:
    """What a model makes of one continuation of a prompt."""

    logprob: float  # natural logarithm of its probability after the prompt
    token_logprobs: tuple[float, ...]  # of each of its tokens
    greedy: bool  # the model itself would write it, taking the likeliest token each time


def text_windows(count: int, size: int = WINDOW_TOKENS, stride: int | None = None) -> list[Window]:
    """Cut a text into windows, as llama.cpp's `perplexity` does.

    Args:
        count: tokens of the text.
        size: tokens of a window.
        stride: None: windows follow each other, and of each the second half counts. A number:
            windows begin that far apart, and of each the last `stride` tokens count.

    Raises:
        RequestError: sizes make no sense, or the text is shorter than a window.
    """
    if size < 4:
        raise RequestError(f"context: a window needs at least 4 tokens, got {size}")
    if stride is not None and not 1 <= stride < size:
        raise RequestError(f"stride: expected 1 to {size - 1}, got {stride}")
    if count < size:
        raise RequestError(
            f"the text has {count} tokens, and a window {size}; take a longer text or a "
            "smaller window"
        )
    if stride is None:
        starts = range(0, count - size + 1, size)
        return [Window(start, start + size // 2 + 1, start + size) for start in starts]
    starts = range(0, max(count - size, 1), stride)
    return [Window(start, start + size - stride, start + size) for start in starts]


def predictions(
    forward: Forward, tokens: npt.NDArray[np.int32], first: int
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Logits that predict tokens[first:], some rows at a time: (place of the token, logits).

    `first` is at least 1. The cache of `forward` is used up.
    """
    place = first - 1
    if place:
        forward.forward(tokens[:place])
    while place < len(tokens) - 1:
        piece = tokens[place : min(place + MOST_ROWS, len(tokens) - 1)]
        yield place + 1, forward.forward(piece, place, all_positions=True)[0]
        place += len(piece)


def log_probabilities(
    logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """ln p of tokens (n,) under logits (n, vocab_size)."""
    greatest = logits.max(axis=1)
    sums = np.exp(logits - greatest[:, None]).sum(axis=1, dtype=np.float64)
    own = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    return np.asarray(own - greatest - np.log(sums))


def window_tokens(
    tokens: npt.NDArray[np.int32], window: Window, bos: int | None
) -> npt.NDArray[np.int32]:
    """The tokens of a window; where the model wants one, its first gives way to `bos`."""
    piece: npt.NDArray[np.int32] = tokens[window.start : window.end].copy()
    if bos is not None:
        piece[0] = bos
    return piece


def perplexity_of(logprobs: npt.NDArray[np.float64], windows: int) -> Perplexity:
    """Perplexity from log-probabilities; its error is the mean's, carried through exp."""
    count = len(logprobs)
    value = math.exp(-logprobs.mean())
    error = value * logprobs.std() / math.sqrt(max(count - 1, 1))
    return Perplexity(value, float(error), count, windows)


def choice_score(logprobs: npt.NDArray[np.float64], greedy: bool) -> ChoiceScore:
    """From the log-probabilities of a choice's tokens."""
    return ChoiceScore(math.fsum(logprobs), tuple(map(float, logprobs)), greedy)


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """Tokens that all begin with; there is at least one sequence."""
    first, last = min(sequences), max(sequences)  # all others lie between them
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(last)))
