"""Tokenizers from tokenizer.json to GGUF and back: the same ids for any text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolrun.errors import ModelFormatError, UnsupportedError
from smolrun.files.gguf import GgufFile
from smolrun.files.gguf_vocabulary import gguf_vocabulary, tokenizer_json
from smolrun.files.tokenizer_data import (
    CONTROL,
    IGNORES_MERGES,
    LLAMA3_PATTERN,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    TokenizerData,
    gguf_tokenizer,
)
from smolrun.text.tokenizer import Tokenizer as OurTokenizer

TEXT = """The sky is blue because air scatters short waves of light more than long ones.
def add(a, b):\n\treturn a + b   # 1234567 and 5.6
ünïcödé, 中文, 👍🏽, I'm HERE, it'S; \u0085 odd \u200d spaces\u00a0and   \r\n\r\n tabs\t\t"""
ROWS = 420


def splitter(name: str) -> Any:
    if name == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        from tokenizers import Regex

        first = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    return pre_tokenizers.Sequence([first, second])


def trained(name: str) -> Tokenizer:
    """A tokenizer of some 400 tokens that cuts text as SmolLM2 or SmolLM3 does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=IGNORES_MERGES[name]))
    tokenizer.pre_tokenizer = splitter(name)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 20,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    tokenizer.add_tokens([AddedToken("<|tool|>", normalized=False, special=False)])
    return tokenizer


def folder_data(tokenizer: Tokenizer | dict[str, Any], **config: Any) -> TokenizerData:
    text = json.dumps(tokenizer) if isinstance(tokenizer, dict) else tokenizer.to_str()
    return TokenizerData(origin="tokenizer.json", json=text.encode(), config=config)


def gguf_data(data: TokenizerData, vocab_size: int, **config: Any) -> TokenizerData:
    """The tokenizer as a reader of the GGUF file finds it."""
    metadata = gguf_vocabulary(data, config, vocab_size)
    file = GgufFile()
    file.path = Path("m.gguf")
    file.metadata = {key: typed.value for key, typed in metadata.items()}
    file.types = {key: typed.type for key, typed in metadata.items()}
    found = gguf_tokenizer(file)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["smollm", "smaug-bpe"])
def test_text_is_cut_alike_in_every_form(name: str) -> None:
    oracle = trained(name)
    data = gguf_data(folder_data(oracle, eos_token="<|im_end|>"), ROWS)
    assert data.pre_tokenizer == name
    assert data.eos_token_id == 2
    back = tokenizer_json(data)
    again = gguf_data(folder_data(back, eos_token="<|im_end|>"), ROWS)
    assert dataclasses.replace(again, origin="") == dataclasses.replace(data, origin="")
    library = Tokenizer.from_str(json.dumps(back))
    ours = OurTokenizer(data, ROWS)
    for text in [*TEXT.split(" "), TEXT, "<|im_start|>a<think>b</think><|tool|>\n<|im_end|>", ""]:
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert library.encode(text).ids == ids
        assert ours.encode(text) == ids
        assert library.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert json.loads(ours._library.to_str())["pre_tokenizer"] == back["pre_tokenizer"]


@pytest.mark.parametrize("name", ["llama-bpe", "starcoder"])
def test_golden_encodings_from_our_tokenizer_json(shared_data: Path, name: str) -> None:
    """47 texts with the ids that llama.cpp's own tests expect."""
    path = shared_data / "vocab-tests" / f"ggml-vocab-{name}.gguf"
    data = gguf_tokenizer(GgufFile.open(path))
    assert data is not None
    if name == "starcoder":  # cuts text as SmolLM2 does
        data = dataclasses.replace(data, pre_tokenizer="smollm")
    data = dataclasses.replace(data, add_bos_token=False)
    library = Tokenizer.from_str(json.dumps(tokenizer_json(data)))
    texts = path.with_name(path.name + ".inp").read_text().split("\n__ggml_vocab_test__\n")
    expected = path.with_name(path.name + ".out").read_text().splitlines()
    for text, ids in zip(texts, expected, strict=False):
        assert library.encode(text).ids == [int(token_id) for token_id in ids.split()]


def test_types_of_tokens() -> None:
    metadata = gguf_vocabulary(folder_data(trained("smaug-bpe")), {}, ROWS)
    types = metadata["tokenizer.ggml.token_type"].value
    tokens = metadata["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(types) == ROWS
    assert types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert types[tokens.index("<think>")] == USER_DEFINED
    # llama.cpp's converter goes by the look of it, whatever the flag says.
    assert types[tokens.index("<|tool|>")] == CONTROL
    assert (tokens[-1], types[-1]) == (f"[PAD{ROWS - 1}]", UNUSED)
    assert "[PAD" not in json.dumps(tokenizer_json(gguf_data(folder_data(trained("smollm")), ROWS)))


@pytest.mark.parametrize("name", ["smollm", "smaug-bpe"])
def test_ignore_merges_has_a_key_of_ours_where_the_name_means_otherwise(name: str) -> None:
    values = json.loads(trained(name).to_str())
    assert gguf_data(folder_data(values), ROWS).ignore_merges is None
    values["model"]["ignore_merges"] = not IGNORES_MERGES[name]
    data = gguf_data(folder_data(values), ROWS)
    assert data.ignore_merges is data.ignores_merges is not IGNORES_MERGES[name]
    assert tokenizer_json(data)["model"]["ignore_merges"] is data.ignore_merges


def template(bos: str) -> dict[str, Any]:
    pieces: list[Any] = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    pieces.append({"Sequence": {"id": "A", "type_id": 0}})
    special = {bos: {"id": bos, "ids": [0], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("processor", "config", "vocab_size", "expected"),
    [
        (None, {}, ROWS, None),
        (None, {"add_bos_token": True}, ROWS, True),
        ({"type": "ByteLevel"}, {}, ROWS, False),
        (template("<|endoftext|>"), {}, ROWS, True),
        (template("<|endoftext|>"), {"bos_token": "<|endoftext|>"}, ROWS, True),
        (template("<|endoftext|>"), {"bos_token": "<|im_start|>"}, ROWS, False),
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<|endoftext|>")]},
            {},
            ROWS,
            True,
        ),
        (template("<|endoftext|>"), {}, 49152, False),
        ({"processors": 5}, {}, ROWS, None),
        ({"processors": [5, {"type": "TemplateProcessing", "single": [5, 6]}]}, {}, ROWS, None),
    ],
)
def test_whether_bos_is_added(
    processor: Any, config: dict[str, Any], vocab_size: int, expected: bool | None
) -> None:
    values = {**json.loads(trained("smaug-bpe").to_str()), "post_processor": processor}
    metadata = gguf_vocabulary(folder_data(values, **config), {"bos_token_id": 0}, vocab_size)
    added = metadata.get("tokenizer.ggml.add_bos_token")
    assert (added and added.value) == expected
    assert metadata["tokenizer.ggml.pre"].value == ("llama-bpe" if expected else "smaug-bpe")


def test_a_bos_that_is_added_is_added_by_the_folder_too() -> None:
    data = gguf_data(folder_data(trained("smaug-bpe"), add_bos_token=True), ROWS, bos_token_id=1)
    library = Tokenizer.from_str(json.dumps(tokenizer_json(data)))
    plain = library.encode("The sky", add_special_tokens=False).ids
    assert library.encode("The sky").ids == [1, *plain]


def test_special_tokens_by_text_then_by_id() -> None:
    config = {"eos_token_id": 0, "bos_token_id": [1, 2], "pad_token_id": None, "unk_token_id": ROWS}
    data = folder_data(trained("smollm"), eos_token={"content": "<|im_end|>"}, pad_token="unheard")
    metadata = gguf_vocabulary(data, config, ROWS)
    found = {key: typed for key, typed in metadata.items() if key.endswith("_token_id")}
    assert found == {
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
    }


def test_merges_of_either_spelling() -> None:
    values = json.loads(trained("smollm").to_str())
    values["model"]["merges"] = [["a", "b c"], "d e"]
    merges = gguf_vocabulary(folder_data(values), {}, ROWS)["tokenizer.ggml.merges"].value
    assert merges == ["a b\u0120c", "d e"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, UnsupportedError, "normalizer"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, UnsupportedError, "pre_tokenizer"),
        ({"pre_tokenizer": None}, UnsupportedError, "pre_tokenizer"),
        ({"model": {"type": "Unigram"}}, UnsupportedError, "byte-level BPE"),
        ({"model": {"vocab": [], "merges": []}}, ModelFormatError, "model.vocab"),
        ({"model": {"vocab": {"a": ROWS}, "merges": []}}, ModelFormatError, "id below 420"),
        ({"model": {"vocab": {"a": True}, "merges": []}}, ModelFormatError, "id below 420"),
        ({"model": {"vocab": {"a": 1, "b": 1}, "merges": []}}, ModelFormatError, "another token"),
        ({"model": {"vocab": {}, "merges": {}}, "added_tokens": []}, ModelFormatError, "merges"),
        ({"model": {"vocab": {}, "merges": [5]}, "added_tokens": []}, ModelFormatError, "pairs"),
        ({"added_tokens": [{"id": 5, "content": "<think>"}]}, ModelFormatError, "found 5"),
        ({"added_tokens": [{"id": 5, "content": "<|im_end|>"}]}, ModelFormatError, "id 2, found 5"),
        ({"added_tokens": [{"id": 0, "content": "<|endoftext|>"}] * 2}, ModelFormatError, "twice"),
        (
            {
                "model": {"vocab": {"a": 1}, "merges": []},
                "added_tokens": [{"id": 1, "content": "x"}],
            },
            ModelFormatError,
            "id 1 is that of another",
        ),
        ({"added_tokens": [5]}, ModelFormatError, "added_tokens"),
        ({"added_tokens": [{"id": ROWS, "content": "x"}]}, ModelFormatError, "420 rows"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    values = {**json.loads(trained("smollm").to_str()), **change}
    with pytest.raises(error, match=message):
        gguf_vocabulary(folder_data(values), {}, ROWS)


def test_two_tokens_of_one_text() -> None:
    data = TokenizerData(
        origin="m.gguf", tokens=["a", "b", "a"], token_types=[1] * 3, pre_tokenizer="smollm"
    )
    with pytest.raises(ModelFormatError, match=r"tokens\[2\] repeats 'a' of .*tokens\[0\]"):
        tokenizer_json(data)


def test_spaces_that_a_token_takes_along_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    values = json.loads(trained("smollm").to_str())
    values["added_tokens"][-1]["lstrip"] = True
    gguf_vocabulary(folder_data(values), {}, ROWS)
    assert "GGUF can not say that it takes the spaces" in caplog.text


def test_a_way_of_cutting_that_is_not_known() -> None:
    data = TokenizerData(origin="m.gguf", tokens=["a"], token_types=[1], pre_tokenizer="qwen2")
    with pytest.raises(UnsupportedError, match="'qwen2'; smolrun knows smollm"):
        tokenizer_json(data)
