"""What a model's files say about its tokenizer, checked, but not yet built into one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.gguf import GgufFile
from smolrun.files.mapping import optional_string, read_json_file, read_small_file, shown

MAX_TOKENIZER_JSON_BYTES = 64 << 20  # SmolLM3's has 17 MB
MAX_TEMPLATE_BYTES = 1 << 20

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types of GGUF."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

IGNORES_MERGES = {
    "smollm": False,
    "smaug-bpe": True,
    "llama-bpe": True,
    "llama3": True,
    "llama-v3": True,
}
"""Name in tokenizer.ggml.pre: whether a whole piece of text that is in the vocabulary is taken
without merging it. smaug-bpe is what GGUF files of SmolLM3 say; the flag is on for it because
SmolLM3 took over Llama 3's tokenizer, 588 tokens of which no merge reaches. All but smollm cut text
by Llama 3's pattern."""

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerData:
    """The parts of a tokenizer: a tokenizer.json, or the vocabulary of a GGUF file.

    Ids of a GGUF file lie inside its vocabulary. Those of a folder are looked up from the texts in
    tokenizer_config.json; None where it names no such token.
    """

    origin: str  # for messages
    json: bytes | None = None  # tokenizer.json
    tokens: Sequence[str] = ()  # (vocabulary,) in the byte-level alphabet of GPT-2
    token_types: Sequence[int] = ()  # (vocabulary,) 1 normal, 2 unknown, 3 control, 4 user, ...
    merges: Sequence[str] = ()  # "left right", best first
    pre_tokenizer: str | None = None  # GGUF's name of it: "smollm", "smaug-bpe", ...
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos_token: bool = False
    ignore_merges: bool | None = None  # as a GGUF file says in a key of smolrun's own
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json

    @property
    def ignores_merges(self) -> bool:
        """Of a GGUF file: whether a piece that is in the vocabulary is taken without merging."""
        if self.ignore_merges is not None:
            return self.ignore_merges
        return IGNORES_MERGES.get(self.pre_tokenizer or "", False)


def gguf_tokenizer(file: GgufFile) -> TokenizerData | None:
    """The tokenizer in a GGUF file, None if it has none.

    ModelFormatError: a field of the wrong type, arrays of unequal length, an id outside the
    vocabulary. UnsupportedError: a tokenizer that is not byte-level BPE.
    """
    keys = _GgufKeys(file)
    kind = keys.get("model", "string")
    tokens = keys.get("tokens", "string[]")
    if kind is None and tokens is None:
        return None
    if kind != "gpt2":
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.model: expected gpt2 (byte-level BPE), "
            f"found {shown(kind)}"
        )
    merges = keys.get("merges", "string[]")
    for name, value in (("tokens", tokens), ("merges", merges)):
        if value is None:
            keys.fail(name, "missing; the file has no usable tokenizer, convert the model again")
    token_types = keys.get("token_type", "i32[]")
    scores = keys.get("scores", "f32[]")
    for name, array in (("token_type", token_types), ("scores", scores)):
        if array is not None and len(array) != len(tokens):
            keys.fail(name, f"{len(array)} values for {len(tokens)} tokens")
    if not tokens:
        keys.fail("tokens", "expected at least one")
    unknown_types = set(token_types or ()) - set(range(7))
    if unknown_types:
        keys.fail("token_type", f"expected 0 to 6, found {shown(sorted(unknown_types)[0])}")

    return TokenizerData(
        origin=str(file.path),
        tokens=tokens,
        token_types=token_types if token_types is not None else [1] * len(tokens),
        merges=merges,
        pre_tokenizer=keys.get("pre", "string"),
        bos_token_id=keys.token_id("bos_token_id", len(tokens)),
        eos_token_id=keys.token_id("eos_token_id", len(tokens)),
        unk_token_id=keys.token_id("unknown_token_id", len(tokens)),
        pad_token_id=keys.token_id("padding_token_id", len(tokens)),
        # A silent file means no: nothing of the SmolLM family was trained with one.
        add_bos_token=bool(keys.get("add_bos_token", "bool")),
        ignore_merges=_own_switch(file, "smolrun.ignore_merges"),
    )


def _own_switch(file: GgufFile, key: str) -> bool | None:
    value = file.metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelFormatError(f"{file.path}: {key}: expected a bool, found {shown(value)}")
    return value


def merge_pairs(merges: Sequence[str], origin: str) -> list[Any]:
    """The merges of a GGUF file, "left right" each, as pairs; ModelFormatError where one is not."""
    pairs: list[tuple[str, ...]] = [tuple(merge.split(" ")) for merge in merges]
    for index, pair in enumerate(pairs):
        if len(pair) != 2:
            # The left part may itself begin with a space, so the cut is sought from index 1.
            place = merges[index].find(" ", 1)
            if place < 0:
                raise ModelFormatError(
                    f"{origin}: tokenizer.ggml.merges[{index}] is {merges[index]!r}; expected "
                    "two tokens with a space between"
                )
            pairs[index] = (merges[index][:place], merges[index][place + 1 :])
    return pairs


def repeated_token(tokens: Sequence[str]) -> str | None:
    """What is wrong where a text names two tokens; None where none does."""
    if len(set(tokens)) == len(tokens):
        return None
    seen: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if token in seen:
            break
        seen[token] = token_id
    return (
        f"tokenizer.ggml.tokens[{token_id}] repeats {token!r} of "
        f"tokenizer.ggml.tokens[{seen[token]}]"
    )


class _GgufKeys:
    """Typed access to tokenizer.ggml.*"""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self.file.path}: tokenizer.ggml.{name}: {problem}")

    def get(self, name: str, stored: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        found = self.file.types.get(key)
        if found is not None and found != stored:
            self.fail(name, f"expected type {stored}, found {found}")
        return self.file.metadata.get(key)

    def token_id(self, name: str, vocabulary: int) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < vocabulary:
            self.fail(name, f"expected an id from 0 to {vocabulary - 1}, found {shown(value)}")
        return value


def folder_tokenizer(folder: Path) -> TokenizerData | None:
    """The tokenizer of a Hugging Face folder, None without a tokenizer.json."""
    path = folder / "tokenizer.json"
    content = read_small_file(path, MAX_TOKENIZER_JSON_BYTES)
    if content is None:
        return None
    config_path = folder / "tokenizer_config.json"
    config = read_json_file(config_path) or {}
    add_bos_token = config.get("add_bos_token")
    if add_bos_token is not None and not isinstance(add_bos_token, bool):
        raise ModelFormatError(
            f"{config_path}: add_bos_token: expected true or false, found {shown(add_bos_token)}"
        )
    ids = _special_ids(config, content)
    return TokenizerData(
        origin=str(path),
        json=content,
        bos_token_id=ids["bos_token"],
        eos_token_id=ids["eos_token"],
        unk_token_id=ids["unk_token"],
        pad_token_id=ids["pad_token"],
        add_bos_token=bool(add_bos_token),
        config=config,
    )


def _special_ids(config: Mapping[str, Any], content: bytes) -> dict[str, int | None]:
    """Ids of the special tokens that tokenizer_config.json names by text."""
    texts: dict[str, str] = {}
    for key in _SPECIAL_TOKENS:
        value = config.get(key)
        if isinstance(value, dict):  # an added token with its flags
            value = value.get("content")
        if isinstance(value, str):
            texts[key] = value
    ids = _added_tokens(config.get("added_tokens_decoder"))
    if not ids.keys() >= set(texts.values()):
        # Files of transformers 5 name them in tokenizer.json only. Whether that file is sound is
        # for the tokenizer built from it to say.
        try:
            added = json.loads(content).get("added_tokens")
            ids.update({entry["content"]: entry["id"] for entry in added})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
    found = {key: ids.get(texts.get(key, "")) for key in _SPECIAL_TOKENS}
    return {key: value if type(value) is int else None for key, value in found.items()}


def _added_tokens(decoder: object) -> dict[str, int]:
    """Text to id of added_tokens_decoder, {"128012": {"content": "<|im_end|>", ...}, ...}."""
    if not isinstance(decoder, dict):
        return {}
    return {
        token["content"]: int(token_id)
        for token_id, token in decoder.items()
        if token_id.isdecimal()
        and len(token_id) < 10
        and isinstance(token, dict)
        and isinstance(token.get("content"), str)
    }


def gguf_chat_template(file: GgufFile) -> str | None:
    """The chat template in a GGUF file."""
    template = optional_string(file.metadata, "tokenizer.chat_template", str(file.path))
    if template is not None and len(template) > MAX_TEMPLATE_BYTES:
        raise ModelFormatError(
            f"{file.path}: tokenizer.chat_template: {len(template)} characters, "
            f"expected at most {MAX_TEMPLATE_BYTES}"
        )
    return template


def folder_chat_template(folder: Path) -> str | None:
    """The chat template of a folder: of three places, the newest form that is there wins.

    chat_template.jinja, then chat_template.json, then tokenizer_config.json; in the last two a list
    of named templates stands for its "default".
    """
    path = folder / "chat_template.jinja"
    content = read_small_file(path, MAX_TEMPLATE_BYTES)
    if content is not None:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{path}: byte {error.start} is not UTF-8") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        values = read_json_file(folder / name) or {}
        template = _template(values.get("chat_template"), f"{folder / name}: chat_template")
        if template is not None:
            return template
    return None


def _template(value: Any, origin: str) -> str | None:
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in value
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
        if "default" not in named:
            raise ModelFormatError(
                f"{origin}: expected a template named 'default', found {shown(list(named))}"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise ModelFormatError(f"{origin}: expected text, found {shown(value)}")
    return value
