"""Which tokens may come next where a text must follow a grammar; llguidance does the work."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smolrun.errors import RequestError, ResourceError, SmolrunError

if TYPE_CHECKING:
    from smolrun.text.tokenizer import Tokenizer

BoolArray = npt.NDArray[np.bool_]

# Compiled grammars that are kept, by number and by bytes of source.
CACHED_GRAMMARS = 64
CACHED_BYTES = 8 << 20
# States of the automaton that splits a text into its parts, 1 to 2 kB each. They are made as they
# are met, so a text that needs more fails, and the memory of one grammar is bounded.
MAX_LEXER_STATES = 20_000


def llguidance(field: str) -> Any:
    """The library. RequestError naming `field` where it is not installed."""
    try:
        import llguidance as library
        import llguidance.gbnf_to_lark
    except ImportError:
        raise RequestError(
            f"{field}: llguidance is not installed; pip install smolrun[structured]"
        ) from None
    return library


class Matcher:
    """Follows one text through its grammar, token by token."""

    def __init__(self, matcher: Any, vocab_size: int, field: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._field = field

    def allowed(self) -> BoolArray:
        """(vocab_size,) the tokens that may come next; stop tokens where the text is complete.

        Raises:
            ResourceError: the grammar takes too much to follow.
            RequestError: no token can go on with the text.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """`token` came next. Errors as of `allowed`, or a token that was not."""
        if not self._matcher.consume_token(token):
            self._check()
            raise SmolrunError(f"{self._field}: token {token} does not fit what the text must be")

    def _check(self) -> None:
        if _stuck(self._matcher):
            raise RequestError(f"{self._field}: no token of this model can go on with the text")
        if self._matcher.is_error():
            raise ResourceError(
                f"{self._field}: this takes too much to follow: {_error(self._matcher)}"
            )

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())


def _stuck(matcher: Any) -> bool:
    """Whether nothing can follow, and the text is not whole."""
    if matcher.is_error():
        return "NoExtension" in matcher.get_error()
    return bool(matcher.is_stopped() and not matcher.is_accepting())


def _error(matcher: Any) -> str:
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:300]


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the last ones. Safe for any thread.

    Every token that is not found by cutting text counts as special: control tokens, and tags such
    as `<tool_call>`, which a grammar names as they are. Where text is asked for they never come.

    Args:
        tokenizer: of the model.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    @property
    def prepared(self) -> bool:
        """Whether the vocabulary is ready for the next grammar."""
        return self._vocabulary is not None

    def prepare(self) -> None:
        """Do now what the first grammar would wait for: 0.3 s and 50 MB for 128k tokens.

        Raises:
            RequestError: llguidance is not installed, or the model ends no text.
        """
        self._prepared("grammar")

    def compile(self, lark: str, field: str, parts: Mapping[str, str] | None = None) -> Matcher:
        """A matcher at the beginning of a text.

        Args:
            lark: a grammar in Lark's notation.
            field: the argument that it comes from, for error messages.
            parts: further grammars, which it calls `@name`.

        Raises:
            RequestError: it is broken, too large, or admits no text.
        """
        grammars = [{"name": "whole", "lark_grammar": lark}]
        grammars += [{"name": name, "lark_grammar": part} for name, part in (parts or {}).items()]
        source = json.dumps({"grammars": grammars})
        with self._lock:
            found = self._compiled.get(source)
            if found is not None:
                self._compiled.move_to_end(source)
        if found is None:
            found = self._compile(source, field)
            with self._lock:
                self._compiled[source] = found
                while len(self._compiled) > CACHED_GRAMMARS or (
                    len(self._compiled) > 1 and sum(map(len, self._compiled)) > CACHED_BYTES
                ):
                    self._compiled.popitem(last=False)
        return Matcher(found.deep_copy(), self._tokenizer.vocab_size, field)

    def _compile(self, source: str, field: str) -> Any:
        library = llguidance(field)
        limits = library.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        made = library.LLMatcher(self._prepared(field), source, log_level=0, limits=limits)
        if not made.is_error():
            made.compute_bitmask()  # the first one finds what no text satisfies
        if _stuck(made):
            raise RequestError(f"{field}: there is no text that satisfies it")
        if made.is_error():
            raise RequestError(f"{field}: {_error(made)}")
        return made

    def _prepared(self, field: str) -> Any:
        """The vocabulary as llguidance wants it, made once."""
        with self._lock:
            if self._vocabulary is None:
                if not self._stop_ids:
                    raise RequestError(f"{field}: this model has no token that ends a text")
                library = llguidance(field)
                self._vocabulary = library.LLTokenizer(
                    library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._stop_ids[0])),
                    n_vocab=self._tokenizer.vocab_size,
                    eos_token=self._stop_ids,
                    slices=library.LLTokenizer.json_slices(),
                )
            return self._vocabulary


class _Vocabulary:
    """The face of a tokenizer that llguidance wraps."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.added_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, parse_special=False, add_bos=False)
