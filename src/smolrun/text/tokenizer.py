"""Text to token ids and back, exactly as the model was trained.

The work is done by the `tokenizers` library. Its tokenizer comes from tokenizer.json as it is, or
is put together from the vocabulary and merges of a GGUF file.

Bytes that the vocabulary cannot spell (SmolLM2 lacks 21 of the 256, among them the controls 04
and 16 hex) are dropped in encoding, as by the library the models were trained with.
"""

from __future__ import annotations

import codecs
import functools
import json
import operator
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from smolrun.errors import ModelFormatError, RequestError, UnsupportedError
from smolrun.files.tokenizer_data import (
    CONTROL,
    IGNORES_MERGES,
    LLAMA3_PATTERN,
    USER_DEFINED,
    merge_pairs,
    repeated_token,
)

if TYPE_CHECKING:
    from smolrun.files.checkpoint import TokenizerData

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
"""Control tokens that end an answer whatever the file declares as its end of sequence."""

MARKUP_TOKENS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<code>", "</code>"),
)
"""Tokens of the answer's own structure. They are parsed, so they are never hidden as control."""

# From this length on (characters) a text is encoded without the GIL, so that one long prompt
# stalls no other thread: 1 MB takes 0.3 s. Shorter ones are not worth starting the pool for.
_LONG_TEXT = 16_384

# A letter or underscore as an escape of JSON, and not as a backslash and what follows it.
_HIDDEN_LETTER = re.compile(rb"(?<!\\)(?:\\\\)*\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")

_T = TypeVar("_T")


def _llama3_splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _smollm_splitter() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


# Name in tokenizer.ggml.pre: how text is cut.
_SPLITTERS: dict[str, Callable[[], Any]] = {
    name: _smollm_splitter if name == "smollm" else _llama3_splitter for name in IGNORES_MERGES
}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: one printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


_BYTES = _byte_of_character()


class Tokenizer:
    """The tokenizer of one model.

    Args:
        data: what the model's files say about its vocabulary.
        vocab_size: rows of the embedding; no id may reach it.

    Raises:
        UnsupportedError: a pre-tokenizer or tokenizer type that smolrun does not know.
        ModelFormatError: a vocabulary that contradicts itself or does not fit `vocab_size`.
    """

    def __init__(self, data: TokenizerData, vocab_size: int) -> None:
        self.origin = data.origin
        self.vocab_size = vocab_size
        self.bos_token_id = _known_id(data.bos_token_id, "bos_token_id", vocab_size, data.origin)
        self.eos_token_id = _known_id(data.eos_token_id, "eos_token_id", vocab_size, data.origin)
        self.pad_token_id = _known_id(data.pad_token_id, "pad_token_id", vocab_size, data.origin)
        self.add_bos_token = data.add_bos_token
        if self.add_bos_token and self.bos_token_id is None:
            raise ModelFormatError(
                f"{data.origin}: add_bos_token is true, but there is no bos_token_id"
            )
        self._library = _from_json(data) if data.json is not None else _from_gguf(data, vocab_size)
        self._added: dict[int, Any] = self._library.get_added_tokens_decoder()
        highest = max(self._added, default=-1)
        self.token_count: int = max(self._library.get_vocab_size(), highest + 1)
        if self.token_count > vocab_size:
            raise ModelFormatError(
                f"{data.origin}: the tokenizer has {self.token_count} tokens, the model's "
                f"embedding {vocab_size} rows; the files do not belong together"
            )
        self._special = frozenset(
            token_id
            for token_id, token in self._added.items()
            if token.special and token.content not in MARKUP_TOKENS
        )
        self._plain: Any = None
        self._bytes: dict[int, bytes] = {}

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the control tokens, in order of their ids."""
        return tuple(self._added[token_id].content for token_id in sorted(self._special))

    @property
    def added_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that are found before text is cut: control tokens and markup."""
        return tuple(sorted(self._added))

    @functools.cached_property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of the control tokens."""
        return tuple(sorted(self._special))

    @functools.cached_property
    def silent_ids(self) -> tuple[int, ...]:
        """Ids of tokens that show nothing: control tokens, white space, padding rows."""
        return tuple(
            token_id
            for token_id in range(self.vocab_size)
            if token_id in self._special or not self.token_bytes(token_id).strip()
        )

    def encode(
        self, text: str, *, parse_special: bool = True, add_bos: bool | None = None
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any string; a lone surrogate counts as U+FFFD.
            parse_special: whether the text of a control token means that token. If false it is
                ordinary text; tokens such as `<think>`, which are not control, are found anyway.
            add_bos: put the beginning-of-sequence token in front; None does what the file says,
                which for the SmolLM family is no.
        """
        if not isinstance(text, str):
            raise RequestError(f"text: expected a str, found {type(text).__name__}")
        library = self._library if parse_special else self._without_control_tokens()
        text = _without_lone_surrogates(text)
        try:
            if len(text) < _LONG_TEXT:
                encoding = library.encode(text, add_special_tokens=False)
            else:
                encoding = library.encode_batch_fast([text], add_special_tokens=False)[0]
        except BaseException as error:
            raise _as_format_error(error, self.origin) from error
        ids: list[int] = encoding.ids
        if ids and max(ids) >= self.vocab_size:
            raise ModelFormatError(
                f"{self.origin}: the tokenizer gave id {max(ids)}, the model's embedding has "
                f"{self.vocab_size} rows"
            )
        if self.add_bos_token if add_bos is None else add_bos:
            if self.bos_token_id is None:
                raise RequestError(f"add_bos: {self.origin} has no beginning-of-sequence token")
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids, byte for byte; invalid UTF-8 becomes U+FFFD.

        Args:
            ids: token ids, each within the model's vocabulary.
            skip_special: leave control tokens out.
        """
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise RequestError(f"ids: expected token ids, found {type(ids).__name__}")
        if skip_special:
            ids = (token_id for token_id in ids if token_id not in self._special)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for a padding row of the embedding."""
        try:
            token_id = operator.index(token_id)
        except TypeError:
            raise RequestError(f"expected a token id, found {token_id!r:.80}") from None
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is outside of the vocabulary (0 to {self.vocab_size - 1})"
            )
        added = self._added.get(token_id)
        token: str | None = added.content if added else self._library.id_to_token(token_id)
        if token is None:
            found = b""
        elif added:
            found = token.encode()
        else:
            try:
                found = bytes([_BYTES[character] for character in token])
            except KeyError:
                found = token.encode()
        self._bytes[token_id] = found
        return found

    def id_of(self, token_text: str) -> int | None:
        """Id of the token with this text (in the vocabulary's spelling), or None."""
        found: int | None = self._library.token_to_id(token_text)
        return found

    def added_id_of(self, token_text: str) -> int | None:
        """Id of the added token with this text: one that is found before text is cut; or None."""
        token_id = self.id_of(token_text)
        return token_id if token_id in self._added else None

    def is_special(self, token_id: int) -> bool:
        """Whether a token is control: it steers the model and is no part of any text."""
        return token_id in self._special

    def stop_ids(self, config_eos: Iterable[int] = ()) -> frozenset[int]:
        """Ids that end an answer.

        Args:
            config_eos: ids from config.json, generation_config.json or GGUF metadata.
        """
        found = {token_id for token_id in config_eos if 0 <= token_id < self.vocab_size}
        if self.eos_token_id is not None:
            found.add(self.eos_token_id)
        for text in STOP_TOKENS:
            token_id = self.id_of(text)
            if token_id is not None and self.is_special(token_id):
                found.add(token_id)
        return frozenset(found)

    def _without_control_tokens(self) -> Any:
        # A second tokenizer over the same vocabulary (80 MB for SmolLM3, held once). Switching
        # `encode_special_tokens` on the first one instead would race with other threads.
        if self._plain is None:
            from tokenizers import Tokenizer as Library

            plain = Library(self._library.model)
            for part in ("normalizer", "pre_tokenizer", "decoder"):
                value = getattr(self._library, part)
                if value is not None:
                    setattr(plain, part, value)
            plain.add_tokens([_as_markup(self._added[i]) for i in sorted(self._added)])
            plain.encode_special_tokens = True
            if plain.get_added_tokens_decoder().keys() != self._added.keys():
                raise ModelFormatError(
                    f"{self.origin}: the ids of the added tokens leave gaps after the vocabulary"
                )
            self._plain = plain
        return self._plain


class IncrementalDecoder:
    """Turns a stream of token ids into text as it comes, never cutting a character.

    Bytes that may still become a character are held back. The pieces, `flush` included, join to
    what `Tokenizer.decode` makes of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is complete now that this token has come."""
        data = self._tokenizer.token_bytes(token_id)
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _guarded(origin: str, build: Callable[[], _T]) -> _T:
    """Runs the library on a stranger's data; whatever it raises becomes a ModelFormatError."""
    try:
        return build()
    except BaseException as error:
        raise _as_format_error(error, origin) from error


def _as_format_error(error: BaseException, origin: str) -> BaseException:
    # A panic of the library derives from BaseException, beside what must go on as it is.
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
        return error
    # The library quotes the file, which may hold what a terminal would obey.
    problem = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))
    return ModelFormatError(f"{origin}: not a usable tokenizer: {problem}")


def _from_json(data: TokenizerData) -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    assert data.json is not None
    content = data.json
    # Where merges do not fit it, the library ends the whole process, so it must not see one. An
    # escape that spells a plain letter could hide the key, and no writer has one.
    if re.search(rb'"continuing_subword_prefix"\s*:\s*"[^"]', content) or _HIDDEN_LETTER.search(
        content
    ):
        raise UnsupportedError(
            f"{data.origin}: model.continuing_subword_prefix of tokenizer.json: expected none, and "
            "letters not spelled as escapes, for byte-level BPE"
        )
    library = _guarded(data.origin, lambda: Library.from_buffer(content))
    if not isinstance(library.model, models.BPE):
        raise UnsupportedError(
            f"{data.origin}: tokenizer.json holds a {type(library.model).__name__} model; "
            "smolrun runs BPE tokenizers"
        )
    _check_parts(library, data.origin)
    # A file may ask to shorten or pad every text, or to leave out merges at random as in training;
    # a prompt must stay whole and the same.
    library.no_truncation()
    library.no_padding()
    library.model.dropout = None
    return library


def _check_parts(library: Any, origin: str) -> None:
    """Refuses what is not byte-level BPE: its text would be decoded wrongly, or grow unbounded."""
    for name, known, needed in (
        ("normalizer", {"NFC", "NFD", "NFKC", "NFKD", "Sequence"}, None),
        ("pre_tokenizer", {"ByteLevel", "Digits", "Punctuation", "Split", "Sequence"}, "ByteLevel"),
        ("decoder", {"ByteLevel", "Sequence"}, "ByteLevel"),
    ):
        part = getattr(library, name)
        types = set() if part is None else _types(json.loads(part.__getstate__()))
        if types - known or (needed and needed not in types):
            raise UnsupportedError(
                f"{origin}: {name} of tokenizer.json: expected {' and '.join(sorted(known))} for "
                f"byte-level BPE, found {' and '.join(sorted(types)) or 'none'}"
            )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if getattr(library.model, name):
            raise UnsupportedError(
                f"{origin}: model.{name} of tokenizer.json: expected none for byte-level BPE"
            )


def _types(part: Any) -> set[str]:
    parts = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return {part["type"]}.union(*map(_types, parts))


def _from_gguf(data: TokenizerData, vocab_size: int) -> Any:
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Library

    tokens, types = data.tokens, data.token_types
    if data.pre_tokenizer is None or data.pre_tokenizer not in _SPLITTERS:
        raise UnsupportedError(
            f"{data.origin}: tokenizer.ggml.pre is {data.pre_tokenizer!r}; smolrun knows "
            f"{', '.join(_SPLITTERS)}. Any other would cut the text differently"
        )
    if not tokens:
        raise ModelFormatError(f"{data.origin}: tokenizer.ggml.tokens is missing or empty")
    if len(tokens) > vocab_size:
        raise ModelFormatError(
            f"{data.origin}: tokenizer.ggml.tokens has {len(tokens)} entries, the model's "
            f"embedding {vocab_size} rows"
        )
    if types and len(types) != len(tokens):
        raise ModelFormatError(
            f"{data.origin}: tokenizer.ggml.token_type has {len(types)} entries, "
            f"tokenizer.ggml.tokens {len(tokens)}"
        )
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if repeated := repeated_token(tokens):
        raise ModelFormatError(f"{data.origin}: {repeated}")
    pairs = merge_pairs(data.merges, data.origin)
    # Of the ways to build the model this is the fastest (128k tokens, 280k merges: 0.2 s; writing
    # a tokenizer.json in memory and parsing it takes 0.32 s).
    model = _guarded(
        data.origin, lambda: models.BPE(vocabulary, pairs, ignore_merges=data.ignores_merges)
    )
    library = Library(model)
    library.pre_tokenizer = _SPLITTERS[data.pre_tokenizer]()
    library.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL and token not in MARKUP_TOKENS, normalized=False)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    _guarded(data.origin, lambda: library.add_tokens(added))
    return library


def _as_markup(token: Any) -> Any:
    """An added token; as no control token if it is markup, whatever the file calls it."""
    from tokenizers import AddedToken

    if not token.special or token.content not in MARKUP_TOKENS:
        return token
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )


def _known_id(token_id: int | None, name: str, vocab_size: int, origin: str) -> int | None:
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise ModelFormatError(
            f"{origin}: {name} is {token_id}; expected 0 to {vocab_size - 1} (the vocabulary)"
        )
    return token_id


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
