"""What a model makes of texts that are there: how likely they are, and vectors of them."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smolrun.api.request import tokenizer_of
from smolrun.engine.answer import TokenLogprob, described
from smolrun.engine.engine import DEFAULT_TERMS
from smolrun.engine.kv import BLOCK_TOKENS
from smolrun.engine.likelihood import (
    WINDOW_TOKENS,
    ChoiceScore,
    Perplexity,
    choice_score,
    common_prefix,
    perplexity_of,
    text_windows,
    window_tokens,
)
from smolrun.engine.sampling import MAX_TOP_LOGPROBS, SampledToken
from smolrun.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    from smolrun.engine.load import LoadedModel
    from smolrun.engine.reading import TokenLikelihoods
    from smolrun.engine.sequence import Request, Terms


class Expected(NamedTuple):
    """A text that is read for how likely its end is."""

    tokens: list[int]
    first: int  # the first token of the end


class Reader:
    """The half of `Model` that reads."""

    loaded: LoadedModel

    def perplexity(
        self,
        text: str | Sequence[int],
        *,
        context: int = WINDOW_TOKENS,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        terms: Terms = DEFAULT_TERMS,
    ) -> Perplexity:
        """How surprised the model is by a text: exp of the mean negative log-probability.

        The text is cut into windows as llama.cpp's `perplexity` cuts it, so figures compare.

        Args:
            text: plain text, or token ids; at least a window long.
            context: tokens of a window.
            stride: None: windows follow each other, and the second half of each counts. A number:
                windows begin that far apart, and the last `stride` tokens of each count.
            progress: called with the windows done, and those in all.
            terms: whose request it is; each window may take as long as they say.

        Raises:
            RequestError: the text is too short, or sizes make no sense.
            ContextLengthError: a window is longer than the model's context.
        """
        windows = self.windows(text, context, stride)
        found = []
        for one in self._scored(windows, terms):
            found.append(one.logprobs)
            if progress is not None:
                progress(len(found), len(windows))
        return perplexity_of(np.concatenate(found), len(windows))

    def windows(self, text: Any, context: int, stride: int | None) -> list[Expected]:
        """What `perplexity` reads."""
        ids = self._prompt_ids(text, parse_special=False)
        windows = text_windows(len(ids), context, stride)
        tokens = np.array(self.loaded.engine.checked(ids), np.int32)
        return [
            Expected(
                window_tokens(tokens, window, self.window_bos).tolist(), window.first - window.start
            )
            for window in windows
        ]

    def score(
        self,
        prompt: str | Sequence[int],
        choices: Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
    ) -> list[ChoiceScore]:
        """How likely each of `choices` is to follow `prompt`. They run side by side.

        A choice is what is left of the tokens of prompt and choice together when as many are taken
        off as the prompt has, so a word that goes on across the seam counts as one.

        Args:
            prompt: text, or token ids; at least one token.
            choices: texts, or lists of token ids where the prompt is one; none is empty.
            terms: whose request it is; each choice may take as long as they say.

        Raises:
            RequestError: prompt or a choice is empty or of another kind.
            ContextLengthError: prompt and choice do not fit the context.
        """
        texts = self.choice_texts(prompt, choices)
        return [choice_score(one.logprobs, one.greedy) for one in self._scored(texts, terms)]

    def choice_texts(self, prompt: Any, choices: Any) -> list[Expected]:
        """What `score` reads."""
        texts = []
        before = self._prompt_ids(prompt)
        for number, choice in enumerate(choices):
            if isinstance(prompt, str) != isinstance(choice, str):
                raise RequestError(f"choices[{number}]: text or token ids, as the prompt is")
            whole = (
                self._prompt_ids(prompt + choice)
                if isinstance(prompt, str) and isinstance(choice, str)
                else before + self._prompt_ids(choice)
            )
            if not before or len(whole) <= len(before):
                empty = f"choices[{number}]" if before else "prompt"
                raise RequestError(f"{empty}: expected at least one token, it is empty")
            texts.append(Expected(self.loaded.engine.checked(whole), len(before)))
        if not texts:
            raise RequestError("choices: expected at least one, there is none")
        return texts

    def _scored(self, texts: Sequence[Expected], terms: Terms) -> Iterator[TokenLikelihoods]:
        """What the model makes of texts, in their order."""
        requests: deque[Request] = deque()
        for text, most in zip(texts, self.side_by_side(texts), strict=True):
            requests.append(self.loaded.engine.score(*text, terms))
            while len(requests) > most:
                yield next(requests.popleft())
        for request in requests:
            yield next(request)

    def side_by_side(self, texts: Sequence[Expected]) -> list[int]:
        """After each of `texts` was submitted: how many may still be under way.

        Of texts that share a block of the prefix cache the first is read before the others.
        """
        most = self.loaded.engine.max_sequences - 1
        shared = common_prefix([text.tokens[: text.first] for text in texts])
        return [0 if shared >= BLOCK_TOKENS else most] + [most] * (len(texts) - 1)

    def prompt_logprobs(
        self,
        prompt: str | Sequence[int],
        *,
        top_logprobs: int = 0,
        terms: Terms = DEFAULT_TERMS,
    ) -> list[TokenLogprob]:
        """What the model makes of each token of a prompt, after those before it.

        Args:
            prompt: text, or token ids.
            top_logprobs: so many likeliest tokens in the place of each, at most 20.
            terms: whose request it is, and how long it may take.

        Returns:
            One for each token. The first, before which there is nothing, has logprob NaN.

        Raises:
            RequestError: the prompt is empty, or no such.
            ContextLengthError: it does not fit the context.
        """
        ids, request = self.likelihood(prompt, top_logprobs, terms)
        return self.told(ids, next(request).tokens if request else ())

    def likelihood(
        self, prompt: Any, top_logprobs: int, terms: Terms
    ) -> tuple[list[int], Request | None]:
        """Token ids of `prompt_logprobs`, and its request; None: one token, which has none."""
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {top_logprobs!r:.80}"
            )
        engine = self.loaded.engine
        ids = engine.checked(self._prompt_ids(prompt))
        if len(ids) > engine.context_size:
            raise ContextLengthError(len(ids), engine.context_size)
        if len(ids) == 1:
            return ids, None
        return ids, engine.score(ids, 1, terms, top_logprobs=top_logprobs)

    def told(self, ids: Sequence[int], found: Iterable[SampledToken]) -> list[TokenLogprob]:
        """The result of `prompt_logprobs`."""
        first = SampledToken(ids[0], math.nan)
        return [described(self.loaded.tokenizer, token) for token in (first, *found)]

    def embed(
        self,
        texts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        terms: Terms = DEFAULT_TERMS,
    ) -> npt.NDArray[np.float32]:
        """Vectors of texts: the mean over a text's tokens of what the last norm returns.

        Args:
            texts: a text or a list of token ids; or a list of these, which run side by side.
            terms: whose request it is, and how long it may take.

        Returns:
            float32 (hidden_size,) for one text, or (n, hidden_size); of length 1. A text's vector
            has the same bits whatever stands beside it.

        Raises:
            RequestError: a text is empty, or no such; ContextLengthError: it is too long.
        """
        requests, single = self.reading(texts, terms)
        vectors = [next(request) for request in requests]
        return vectors[0] if single else np.stack(vectors)

    def reading(self, texts: Any, terms: Terms) -> tuple[list[Request], bool]:
        """The requests of `embed`, and whether `texts` is a single one."""
        items, single = as_items(texts)
        sequences = [self._prompt_ids(item) for item in items]
        return [self.loaded.engine.read(ids, terms) for ids in sequences], single

    @property
    def window_bos(self) -> int | None:
        """The token that a window of `perplexity` begins with, where the model wants one."""
        tokenizer = self.loaded.tokenizer
        return tokenizer.bos_token_id if tokenizer and tokenizer.add_bos_token else None

    def _prompt_ids(self, prompt: Any, *, parse_special: bool = True) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer_of(self.loaded).encode(prompt, parse_special=parse_special)
        try:
            if not is_list(prompt):
                raise TypeError
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise RequestError(
                f"prompt: expected a text or token ids, got {prompt!r:.80}"
            ) from None


def as_items(value: Any) -> tuple[list[Any], bool]:
    """Texts or lists of token ids, and whether `value` is a single one of these."""
    items: list[Any] = list(value) if is_list(value) else []
    single = not items or not (isinstance(items[0], str) or is_list(items[0]))
    return ([items or value] if single else items), single


def is_list(value: object) -> bool:
    """Whether it holds items, and is no text."""
    if getattr(value, "ndim", 1) == 0:  # a NumPy scalar calls itself iterable
        return False
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
