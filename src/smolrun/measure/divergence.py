"""How far models are from one of them: their predictions side by side, in one pass over a text.

The base's distribution of each next token is P, another model's Q: KL = sum of P ln(P/Q), in
nats, as llama.cpp's `perplexity --kl-divergence` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from smolrun.api import Model, Perplexity
from smolrun.engine.forward import Forward
from smolrun.engine.likelihood import (
    Window,
    log_probabilities,
    perplexity_of,
    predictions,
    window_tokens,
)
from smolrun.errors import RequestError

Logits = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Values) -> Estimate:
        """Of one value per token."""
        return cls(float(values.mean()), float(values.std() / math.sqrt(max(len(values) - 1, 1))))


@dataclass(frozen=True)
class Divergence:
    """A model beside the base, over the same tokens."""

    perplexity: Perplexity
    perplexity_ratio: Estimate  # the model's over the base's
    kl: Estimate
    kl_median: float
    kl_99: float  # 99 % of the tokens are below
    kl_greatest: float
    top1: Estimate  # share of tokens where both take the same one for the likeliest

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass
class _Found:
    """What was seen of a pair, a value per token."""

    kl: list[Values] = field(default_factory=list)
    agrees: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def take_in(self, base: Logits, other: Logits) -> None:
        """Logits of some tokens, (n, vocab_size)."""
        self.kl.append(kl_divergence(base, other))
        self.agrees.append(base.argmax(axis=1) == other.argmax(axis=1))

    def summary(self, base: Values, other: Values, windows: int) -> Divergence:
        """From the log-probabilities of both."""
        kl = np.concatenate(self.kl)
        log_ratio = Estimate.of(base - other)
        ratio = math.exp(log_ratio.value)
        return Divergence(
            perplexity_of(other, windows),
            Estimate(ratio, ratio * log_ratio.error),
            Estimate.of(kl),
            float(np.median(kl)),
            float(np.quantile(kl, 0.99)),
            float(kl.max()),
            Estimate.of(np.concatenate(self.agrees).astype(np.float64)),
        )


def side_by_side(
    models: Sequence[Model],
    tokens: Sequence[int],
    windows: Sequence[Window],
    pairs: Sequence[tuple[int, int]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Divergence]:
    """Compare models over the tokens of `windows` that count.

    Args:
        models: any number; all must have the same vocabulary.
        tokens: of the text.
        windows: what is read of it, and what counts.
        pairs: places in `models` of a base and of what is compared with it.
        progress: called with the windows done, and those in all.

    Raises:
        RequestError: vocabularies differ in size.
    """
    check_vocabularies(models)
    ids = np.array(tokens, np.int32)
    caches = [Forward(model.loaded.engine) for model in models]
    logprobs: list[list[Values]] = [[] for _ in models]
    found = [_Found() for _ in pairs]
    for done, window in enumerate(windows):
        if progress is not None:
            progress(done, len(windows))
        piece = window_tokens(ids, window, models[0].window_bos)
        first = window.first - window.start
        for rows in zip(*(predictions(cache, piece, first) for cache in caches), strict=True):
            place, logits = rows[0][0], [logits for _, logits in rows]
            scored = piece[place : place + len(logits[0])]
            for of_model, of_rows in zip(logprobs, logits, strict=True):
                of_model.append(log_probabilities(of_rows, scored))
            for of_pair, (base, other) in zip(found, pairs, strict=True):
                of_pair.take_in(logits[base], logits[other])
    for cache in caches:
        cache.clear()
    joined = [np.concatenate(of_model) for of_model in logprobs]
    return [
        of_pair.summary(joined[base], joined[other], len(windows))
        for of_pair, (base, other) in zip(found, pairs, strict=True)
    ]


def check_vocabularies(models: Sequence[Model]) -> None:
    """RequestError where models can not be compared token by token."""
    base = models[0].config.vocab_size
    for model in models[1:]:
        if model.config.vocab_size != base:
            raise RequestError(
                f"{model.name} has a vocabulary of {model.config.vocab_size} tokens, "
                f"{models[0].name} one of {base}: they can not be compared"
            )


def kl_divergence(base: Logits, other: Logits) -> Values:
    """KL of (n, vocab_size) logits, row by row; in float64, as it may be as small as 1e-7."""
    p, q = base.astype(np.float64), other.astype(np.float64)
    p -= p.max(axis=1, keepdims=True)
    q -= q.max(axis=1, keepdims=True)
    weights = np.exp(p)
    total = weights.sum(axis=1)
    p -= q
    mean = np.einsum("ij,ij->i", weights, p) / total
    return np.asarray(mean - np.log(total) + np.log(np.exp(q).sum(axis=1)))
