"""A tokenizer.json in the keys of GGUF, and back. What both say about text is the same.

Source: llama.cpp's converter, `conversion/base.py` and `gguf-py/gguf/vocab.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.gguf_writer import TypedValue
from smolrun.files.mapping import parse_json_object, shown
from smolrun.files.tokenizer_data import (
    CONTROL,
    IGNORES_MERGES,
    LLAMA3_PATTERN,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    TokenizerData,
    merge_pairs,
    repeated_token,
)

logger = logging.getLogger("smolrun")

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {**_BYTE_LEVEL, "use_regex": True},
    ],
}
_LLAMA3 = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
_PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

# Special token in tokenizer_config.json: its key in GGUF
_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
# Of models with this vocabulary llama.cpp's converter says that no BOS is added: SmolLM, SmolLM2.
_SIZE_WITHOUT_BOS = 49152


def gguf_vocabulary(
    data: TokenizerData, config: Mapping[str, Any], vocab_size: int
) -> dict[str, TypedValue]:
    """The tokenizer of a folder as tokenizer.ggml.*, and what GGUF has no key for as smolrun.*.

    Args:
        data: the tokenizer of a Hugging Face folder.
        config: its config.json, which names special tokens that tokenizer_config.json does not.
        vocab_size: rows of the embedding; rows without a token get a name of their own.

    Raises:
        ModelFormatError: tokenizer.json contradicts itself or does not fit `vocab_size`.
        UnsupportedError: it cuts text in a way that GGUF has no name for.
    """
    assert data.json is not None
    file = _TokenizerJson(parse_json_object(data.json, data.origin), data.origin)
    added = file.added_tokens()
    tokens, types = file.tokens(added, vocab_size)
    adds = _added_at_the_ends(file.values.get("post_processor"), data.config)
    if vocab_size == _SIZE_WITHOUT_BOS:
        adds["bos"] = False
    pre_tokenizer = file.pre_tokenizer(bool(adds.get("bos")))
    keys = {
        "model": TypedValue("string", "gpt2"),
        "pre": TypedValue("string", pre_tokenizer),
        "tokens": TypedValue("string[]", tokens),
        "token_type": TypedValue("i32[]", types),
        "merges": TypedValue("string[]", file.merges()),
    }
    ids = {entry["content"]: token_id for token_id, entry in added.items()}
    for name, key in _SPECIAL_KEYS.items():
        token_id = ids.get(_text(data.config.get(f"{name}_token")) or "")
        if token_id is None:
            token_id = config.get(f"{name}_token_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if type(token_id) is int and 0 <= token_id < vocab_size:
            keys[key] = TypedValue("u32", token_id)
    for name, value in adds.items():
        keys[f"add_{name}_token"] = TypedValue("bool", value)
    if isinstance(prefix := data.config.get("add_prefix_space"), bool):
        keys["add_space_prefix"] = TypedValue("bool", prefix)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    ignores_merges = file.model.get("ignore_merges") is True
    if ignores_merges != IGNORES_MERGES[pre_tokenizer]:
        metadata["smolrun.ignore_merges"] = TypedValue("bool", ignores_merges)
    return metadata


class _TokenizerJson:
    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin
        model = values.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise UnsupportedError(f"{origin}: model: expected byte-level BPE")
        self.model = model

    def fail(self, field: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.origin}: {field}: {problem}")

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """The entries of added_tokens by id."""
        entries = self.values.get("added_tokens") or []
        added: dict[int, dict[str, Any]] = {}
        for entry in entries if isinstance(entries, list) else [entries]:
            if (
                not isinstance(entry, dict)
                or type(entry.get("id")) is not int
                or not isinstance(entry.get("content"), str)
            ):
                self.fail("added_tokens", f"expected id and content, found {shown(entry)}")
            if entry["id"] in added:
                self.fail("added_tokens", f"the id {entry['id']} stands twice")
            added[entry["id"]] = entry
        return added

    def tokens(
        self, added: Mapping[int, dict[str, Any]], vocab_size: int
    ) -> tuple[list[str], list[int]]:
        """Text and type of every row of the embedding."""
        vocabulary = self.model.get("vocab")
        if not isinstance(vocabulary, dict):
            self.fail("model.vocab", f"expected tokens and their ids, found {shown(vocabulary)}")
        tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
        types = [UNUSED] * vocab_size
        for token, token_id in vocabulary.items():
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                self.fail(
                    f"model.vocab: {shown(token)}",
                    f"expected an id below {vocab_size}, the rows of the model's embedding, "
                    f"found {shown(token_id)}",
                )
            if types[token_id] != UNUSED:
                self.fail(
                    f"model.vocab: {shown(token)}", f"id {token_id} is that of another token too"
                )
            tokens[token_id], types[token_id] = token, NORMAL
        free = len(vocabulary)
        for token_id, entry in added.items():
            text = entry["content"]
            field = f"added_tokens: {shown(text)}"
            if not 0 <= token_id < vocab_size:
                self.fail(field, f"id {token_id}; the model's embedding has {vocab_size} rows")
            # The library goes by the vocabulary, else counts on, whatever id stands in the file.
            expected = vocabulary.get(text, free)
            if token_id != expected:
                self.fail(field, f"expected id {expected}, found {token_id}")
            if types[token_id] != UNUSED and tokens[token_id] != text:
                self.fail(field, f"id {token_id} is that of another token too")
            free = max(free, token_id + 1)
            if any(entry.get(flag) is True for flag in ("single_word", "lstrip", "rstrip")):
                logger.warning(
                    "%s: %s: GGUF can not say that it takes the spaces beside it, or is found only "
                    "between words; other programs will cut text around it otherwise",
                    self.origin,
                    field,
                )
            control = entry.get("special") is True or _looks_special(text)
            # llama.cpp expects the space of SentencePiece written out in tokens of the user.
            tokens[token_id] = text if control else text.replace("\u2581", " ")
            types[token_id] = CONTROL if control else USER_DEFINED
        if repeated := repeated_token(tokens):
            self.fail("model.vocab", repeated)
        return tokens, types

    def merges(self) -> list[str]:
        """The merges, each as "left right"."""
        merges = self.model.get("merges")
        if not isinstance(merges, list):
            self.fail("model.merges", f"expected a list, found {shown(merges)}")
        found = []
        for merge in merges:
            if isinstance(merge, list) and len(merge) == 2:
                # A space inside a part is spelled as byte-level BPE spells the byte.
                merge = " ".join(str(part).replace(" ", "\u0120") for part in merge)
            if not isinstance(merge, str):
                self.fail("model.merges", f"expected pairs of tokens, found {shown(merge)}")
            found.append(merge)
        return found

    def pre_tokenizer(self, adds_bos: bool) -> str:
        """GGUF's name of how text is cut before merging."""
        if self.values.get("normalizer") is not None:
            raise UnsupportedError(
                f"{self.origin}: normalizer: GGUF has no key for one; expected null, found "
                f"{shown(self.values['normalizer'])}"
            )
        found = self.values.get("pre_tokenizer")
        if _means(found, _SMOLLM):
            return "smollm"
        if _means(found, _LLAMA3):
            # The same cut under two names, by which llama.cpp tells whether to add BOS.
            return "llama-bpe" if adds_bos else "smaug-bpe"
        raise UnsupportedError(
            f"{self.origin}: pre_tokenizer: expected that of SmolLM2 (digits one by one) or of "
            f"SmolLM3 (Llama 3's pattern), which GGUF has names for, found {shown(found)}"
        )


def _looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for control whatever its flag says."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


def _means(found: object, expected: Any) -> bool:
    """Whether a part of tokenizer.json says what is expected; offsets make no difference."""
    if isinstance(expected, list):
        return (
            isinstance(found, list)
            and len(found) == len(expected)
            and all(map(_means, found, expected))
        )
    if not isinstance(expected, dict):
        return bool(found == expected)
    return isinstance(found, dict) and all(
        _means(found.get(key, _DEFAULTS.get(key)), value)
        for key, value in expected.items()
        if key != "trim_offsets"
    )


_DEFAULTS = {"use_regex": True, "invert": False}


def _added_at_the_ends(processor: Any, config: Mapping[str, Any]) -> dict[str, bool]:
    """Whether "bos" and "eos" are put around a text, as far as the files say."""
    adds: dict[str, bool] = {}
    for part in _parts(processor):
        if part.get("type") == "ByteLevel":
            adds = {"bos": False, "eos": False, **adds}
        single = part.get("single") if part.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and len(single) > 1:
            for name, piece in (("bos", single[0]), ("eos", single[-1])):
                special = piece.get("SpecialToken") if isinstance(piece, dict) else None
                text = special.get("id") if isinstance(special, dict) else None
                if text:
                    adds[name] = text == (_text(config.get(f"{name}_token")) or text)
    for name in ("bos", "eos", "sep"):
        if isinstance(value := config.get(f"add_{name}_token"), bool):
            adds.setdefault(name, value)
    return adds


def _parts(processor: Any) -> list[dict[str, Any]]:
    """The post-processors of a sequence, or the one that there is."""
    values = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _text(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def tokenizer_json(data: TokenizerData) -> dict[str, Any]:
    """A tokenizer.json that encodes and decodes as the vocabulary of a GGUF file does.

    UnsupportedError where the file names a way of cutting text that smolrun does not know.
    """
    if data.pre_tokenizer not in IGNORES_MERGES:
        raise UnsupportedError(
            f"{data.origin}: tokenizer.ggml.pre is {data.pre_tokenizer!r}; smolrun knows "
            f"{', '.join(IGNORES_MERGES)}. Any other would cut the text differently"
        )
    if repeated := repeated_token(data.tokens):
        raise ModelFormatError(f"{data.origin}: {repeated}")
    numbered = list(enumerate(zip(data.tokens, data.token_types, strict=True)))
    vocabulary = {
        token: token_id
        for token_id, (token, kind) in numbered
        if kind != UNUSED or token != f"[PAD{token_id}]"
    }
    post_processor = None
    if data.add_bos_token and data.bos_token_id is not None:
        post_processor = _puts_in_front(data.tokens[data.bos_token_id], data.bos_token_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **_PLAIN_TOKEN, "special": kind == CONTROL}
            for token_id, (token, kind) in numbered
            if kind in (CONTROL, USER_DEFINED) and token
        ],
        "normalizer": None,
        "pre_tokenizer": _SMOLLM if data.pre_tokenizer == "smollm" else _LLAMA3,
        "post_processor": post_processor,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": data.ignores_merges,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merge_pairs(data.merges, data.origin)],
        },
    }


def _puts_in_front(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that begins every text with a token."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
