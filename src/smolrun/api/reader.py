"""What a model makes of texts that are there: how likely they are, and vectors of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smolrun.api.request import tokenizer_of
from smolrun.engine.answer import TokenLogprob, described
from smolrun.engine.engine import DEFAULT_TERMS
from smolrun.engine.forward import Forward
from smolrun.engine.likelihood import (
    WINDOW_TOKENS,
    ChoiceScore,
    Perplexity,
    perplexity,
    prompt_logprobs,
    score_choices,
    text_windows,
)
from smolrun.engine.sampling import MAX_TOP_LOGPROBS, SampledToken
from smolrun.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    from smolrun.engine.load import LoadedModel
    from smolrun.engine.sequence import Request, Terms


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
    ) -> Perplexity:
        """How surprised the model is by a text: exp of the mean negative log-probability.

        The text is cut into windows as llama.cpp's `perplexity` cuts it, so figures compare.

        Args:
            text: plain text, or token ids; at least a window long.
            context: tokens of a window.
            stride: None: windows follow each other, and the second half of each counts. A number:
                windows begin that far apart, and the last `stride` tokens of each count.
            progress: called with the windows done, and those in all.

        Raises:
            RequestError: the text is too short, or sizes make no sense.
            ContextLengthError: a window is longer than the model's context.
        """
        tokens = np.array(self._prompt_ids(text, parse_special=False), np.int32)
        windows = text_windows(len(tokens), context, stride)
        return perplexity(Forward(self.loaded.engine), tokens, windows, self.window_bos, progress)

    def score(
        self, prompt: str | Sequence[int], choices: Sequence[str] | Sequence[Sequence[int]]
    ) -> list[ChoiceScore]:
        """How likely each of `choices` is to follow `prompt`. What they share is computed once.

        A choice is what is left of the tokens of prompt and choice together when as many are taken
        off as the prompt has, so a word that goes on across the seam counts as one.

        Args:
            prompt: text, or token ids; at least one token.
            choices: texts, or lists of token ids where the prompt is one; none is empty.

        Raises:
            RequestError: prompt or a choice is empty or of another kind.
            ContextLengthError: prompt and choice do not fit the context.
        """
        sequences = []
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
            sequences.append((np.array(whole, np.int32), len(before)))
        if not sequences:
            raise RequestError("choices: expected at least one, there is none")
        return score_choices(Forward(self.loaded.engine), sequences)

    def prompt_logprobs(
        self, prompt: str | Sequence[int], *, top_logprobs: int = 0
    ) -> list[TokenLogprob]:
        """What the model makes of each token of a prompt, after those before it.

        Args:
            prompt: text, or token ids.
            top_logprobs: so many likeliest tokens in the place of each, at most 20.

        Returns:
            One for each token. The first, before which there is nothing, has logprob NaN.

        Raises:
            RequestError: the prompt is empty, or no such.
            ContextLengthError: it does not fit the context.
        """
        if type(top_logprobs) is not int or not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, got {top_logprobs!r:.80}"
            )
        ids = self._prompt_ids(prompt)
        if not ids:
            raise RequestError("prompt: expected at least one token, it is empty")
        context_size = self.loaded.engine.context_size
        if len(ids) > context_size:
            raise ContextLengthError(len(ids), context_size)
        forward = Forward(self.loaded.engine)
        tokens = np.array(forward.checked_ids(ids)[0], np.int32)
        found = prompt_logprobs(forward, tokens, top_logprobs)
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
