"""From logits to a token: one sampler per request.

The order is: logit bias, penalties, the request's constraint, then greedy (temperature 0) or
temperature, top-k, top-p, min-p and one draw. The draw of the token at a position is a function of
(seed, position) alone, so a request gives the same tokens whatever runs beside it.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from smolrun import _core
from smolrun.engine.native import resolve_isa
from smolrun.errors import NonFiniteError, RequestError

Float32Array = npt.NDArray[np.float32]

REPEAT_WINDOW = 64  # last tokens, prompt included, that repeat_penalty looks at (as llama.cpp does)
GREEDY_BELOW = 1e-5  # temperatures below this count as 0
LEAST_PENALTY = 0.01  # a smaller repeat_penalty makes logits overflow
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_LOGIT_BIASES = 300
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParameters:
    """How one request is sampled. Made and checked by `sampling_parameters`."""

    max_tokens: int | None = None  # tokens to generate at most; None: what the context leaves
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # keep the k likeliest; 0 or -1: all
    top_p: float = 1.0  # keep the likeliest that together reach p
    min_p: float = 0.0  # drop what is less likely than p times the likeliest
    # Logits of tokens among the last 64 (prompt included) are divided by it where positive,
    # multiplied where negative. 1 is off.
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken off the logit of every token of the answer so far
    frequency_penalty: float = 0.0  # the same, times how often it occurs there
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to a token's logit
    seed: int | None = None  # None: a fresh random one
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    logprobs: bool = False  # return log-probabilities, of the model's own logits
    top_logprobs: int = 0  # and those of this many likeliest tokens
    ignore_eos: bool = False  # go on past end-of-text tokens, for measurements

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class SampledToken:
    """A token and, where asked for, natural logarithms of probabilities."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


# name: (lowest, highest)
_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31 - 1),
    "temperature": (0, 100),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (LEAST_PENALTY, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (0, 2**64 - 1),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}
_EXCLUSIVE = ("top_p",)  # whose lowest value is itself out of range
_INTEGERS = ("max_tokens", "top_k", "seed", "top_logprobs")
_FLAGS = ("logprobs", "ignore_eos")
_OPTIONAL = ("max_tokens", "seed")
_NAMES = tuple(item.name for item in fields(SamplingParameters))


def sampling_parameters(
    arguments: Mapping[str, Any], defaults: SamplingParameters, vocab_size: int
) -> SamplingParameters:
    """The parameters of one request: `arguments` over `defaults`.

    An argument that is None keeps its default.

    Raises:
        RequestError: an unknown name, or a value of the wrong type or out of range.
    """
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in _NAMES:
            raise RequestError(f"{name}: no such argument; there are {', '.join(_NAMES)}")
        if value is None:
            continue
        if name == "stop":
            values[name] = _stop_strings(value)
        elif name == "logit_bias":
            values[name] = _logit_bias(value, vocab_size)
        elif name in _FLAGS:
            if not isinstance(value, (bool, np.bool_)):
                raise RequestError(f"{name}: expected True or False, got {value!r:.80}")
            values[name] = bool(value)
        else:
            values[name] = _number(name, value)
    if values.get("top_logprobs"):
        values["logprobs"] = True
    return replace(defaults, **values)


def _number(name: str, value: Any) -> int | float:
    lowest, highest = _RANGES[name]
    whole = name in _INTEGERS
    kind = "a whole number" if whole else "a number"
    above = "above" if name in _EXCLUSIVE else "from"
    expected = f"{name}: expected {kind} {above} {lowest} to {highest}, got {value!r:.80}"
    number: int | float
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = operator.index(value) if whole else float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(expected) from None
    if not lowest <= number <= highest or (name in _EXCLUSIVE and number == lowest):
        raise RequestError(expected)
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"stop: expected a string or a list of strings, got {value!r:.80}")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for string in strings:
        if not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise RequestError(
                f"stop: expected strings of 1 to {MAX_STOP_LENGTH} characters, "
                f"got one of {len(string)}"
            )
    return tuple(strings)


def _logit_bias(value: Any, vocab_size: int) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias: expected a mapping of token to bias, got {value!r:.80}")
    if len(value) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias: at most {MAX_LOGIT_BIASES} tokens, got {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        try:
            if isinstance(key, (bool, np.bool_)):
                raise TypeError
            token = operator.index(key)
        except TypeError:
            raise RequestError(f"logit_bias: expected token ids as keys, got {key!r:.80}") from None
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias: token {token} is not in the vocabulary of {vocab_size}"
            )
        if isinstance(bias, (bool, np.bool_)) or not isinstance(bias, (int, float, np.number)):
            raise RequestError(f"logit_bias: expected a number for token {token}, got {bias!r:.80}")
        if not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias: expected -100 to 100 for token {token}, got {bias!r:.80}"
            )
        biases[token] = float(bias)
    return biases


def check_finite(logits: Float32Array, where: str = "") -> None:
    """NonFiniteError where one of `logits` (any shape) is NaN or infinite."""
    if logits.size and not _core.all_finite(logits.reshape(-1)):
        raise NonFiniteError(
            f"non-finite logits{where}: the weights or the computation are damaged"
        )


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (Philox 4x64, 53 bits)."""
    return uniforms(seed, position, 1)[0]


def uniforms(seed: int, position: int, count: int) -> list[float]:
    """`uniform` of `count` positions from `position` on."""
    generator = np.random.Philox(key=seed, counter=position)
    # A count of the counter gives four numbers, of which the first is the position's.
    raw = generator.random_raw(4 * count)[::4]
    return [(number >> 11) * 2.0**-53 for number in raw.tolist()]


class Constraint(Protocol):
    """What else decides on the tokens of one request. Called on the loop's thread.

    An exception ends the request it belongs to, no other. What it answers must depend on nothing
    but the request and its tokens so far, so that an answer is the same whatever runs beside it.
    """

    def adjust(self, logits: Float32Array) -> Float32Array | int:
        """The logits to draw from, -inf where a token may not come; or the token that must come.

        Args:
            logits: (vocab_size,) after bias and penalties, to be left as they are.
        """

    def accept(self, token: int) -> None:
        """`token` was drawn, which may be a stop token."""


class Sampler:
    """Draws the tokens of one request.

    Args:
        parameters: how.
        prompt: tokens of the prompt; repeat_penalty looks at their end.
        constraint: has the last word on the logits, and is told what was drawn.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        prompt: Sequence[int] = (),
        constraint: Constraint | None = None,
    ):
        self.parameters = parameters
        self.constraint = constraint
        self.seed = (
            int.from_bytes(os.urandom(8), "little") if parameters.seed is None else parameters.seed
        )
        self._uniforms: list[float] = []  # of positions from `_uniforms_from` on
        self._uniforms_from = 0
        self._recent = list(prompt[-REPEAT_WINDOW:])
        self._counts: Counter[int] = Counter()
        self._deductions: Float32Array | None = None  # (vocab_size,) presence and frequency
        self._bias_tokens = np.fromiter(parameters.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(parameters.logit_bias.values(), np.float32)

    def sample(self, logits: Float32Array, position: int) -> SampledToken:
        """Draw the token that stands at `position` of the sequence.

        Args:
            logits: (vocab_size,), left as they are.
            position: where the token will stand; picks the random number.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        check_finite(logits, f" at position {position - 1}")
        parameters = self.parameters
        adjusted = self._adjust(logits)
        decided = adjusted if self.constraint is None else self.constraint.adjust(adjusted)
        if isinstance(decided, int):
            token = decided
        elif parameters.greedy:
            token = int(decided.argmax())
        else:
            token = _core.draw(
                _isa(),
                decided,
                parameters.temperature,
                max(parameters.top_k, 0),
                parameters.top_p,
                parameters.min_p,
                self._uniform(position),
            )
        if self.constraint is not None:
            self.constraint.accept(token)
        self._remember(token, len(logits))
        if not parameters.logprobs:
            return SampledToken(token)
        return with_logprobs(token, logits, parameters.top_logprobs)

    def _uniform(self, position: int) -> float:
        """`uniform` of a position; making a generator takes as long as half of a draw."""
        place = position - self._uniforms_from
        if not 0 <= place < len(self._uniforms):
            self._uniforms, self._uniforms_from = uniforms(self.seed, position, _AHEAD), position
            place = 0
        return self._uniforms[place]

    def _adjust(self, logits: Float32Array) -> Float32Array:
        """Logits after bias and penalties; the array itself when there are none."""
        repeat_penalty = self.parameters.repeat_penalty
        adjusted = logits
        if len(self._bias_tokens):
            adjusted = adjusted.copy()
            adjusted[self._bias_tokens] += self._biases
        if repeat_penalty != 1 and self._recent:
            if adjusted is logits:
                adjusted = adjusted.copy()
            tokens = np.unique(np.array(self._recent))
            values = adjusted[tokens]
            adjusted[tokens] = np.where(
                values > 0, values / np.float32(repeat_penalty), values * np.float32(repeat_penalty)
            )
        if self._deductions is not None:
            adjusted = adjusted - self._deductions
        return adjusted

    def _remember(self, token: int, vocab_size: int) -> None:
        self._recent.append(token)
        del self._recent[:-REPEAT_WINDOW]
        presence = self.parameters.presence_penalty
        frequency = self.parameters.frequency_penalty
        if presence == frequency == 0:
            return
        if self._deductions is None:
            self._deductions = np.zeros(vocab_size, np.float32)
        self._counts[token] += 1
        self._deductions[token] = presence + frequency * self._counts[token]


_isa = functools.cache(resolve_isa)  # what tokens are drawn with

_AHEAD = 32  # positions whose random numbers are made at a time
_ROWS = 64


def likeliest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Places of the `count` highest values, rising; of equal ones the first."""
    columns = len(values) // _ROWS
    if count <= columns:
        # `count` columns reach this, so what is below it is not among the highest.
        highest = values[: _ROWS * columns].reshape(_ROWS, columns).max(axis=0)
        least = np.partition(highest, columns - count)[columns - count]
        places = np.flatnonzero(values >= least)
        return places[_highest(values[places], count)]
    return _highest(values, count)


def _highest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    edge = np.partition(values, len(values) - count)[len(values) - count]
    return _from_edge(values, edge, int(np.count_nonzero(values >= edge)) - count)


def _from_edge(values: npt.NDArray[Any], edge: float, surplus: int) -> npt.NDArray[np.int64]:
    """Places of the values not below `edge`, but for the last `surplus` of those equal to it."""
    places = np.flatnonzero(values >= edge)
    if surplus:
        tied = np.flatnonzero(values[places] == edge)
        places = np.delete(places, tied[len(tied) - surplus :])
    return places


def with_logprobs(token: int, logits: Float32Array, count: int) -> SampledToken:
    """A token with its log-probability under logits (vocab_size,), and the `count` likeliest."""
    best = logits.max()
    log_total = float(best) + math.log(np.exp(logits - best).sum(dtype=np.float64))
    top: list[int] = []
    if count:
        tokens = likeliest(logits, count)
        top = tokens[np.argsort(-logits[tokens], kind="stable")].tolist()
    return SampledToken(
        id=token,
        logprob=float(logits[token]) - log_total,
        top_logprobs=tuple((other, float(logits[other]) - log_total) for other in top),
    )
