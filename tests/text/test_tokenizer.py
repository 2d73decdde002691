"""The tokenizer against golden encodings, and against what a file or a user may throw at it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.errors import ModelFormatError, RequestError, UnsupportedError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.files.tokenizer_data import CONTROL, NORMAL
from smolrun.text.chat import ChatTemplate
from smolrun.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.waiting import joined, started

from .support import BYTE_ALPHABET, byte_tokenizer, gguf_data, tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"


def golden_cases(shared_data: Path, name: str) -> list[tuple[str, list[int]]]:
    stem = shared_data / f"vocab-tests/ggml-vocab-{name}.gguf"
    texts = Path(f"{stem}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{stem}.out").read_text().split("\n")
    cases = [
        (text, [int(word) for word in line.split()])
        for text, line in zip(texts, lines, strict=True)
    ]
    assert len(cases) == 47
    return cases


@pytest.mark.parametrize("name", ["llama-bpe", "starcoder"])
def test_golden_encodings(name: str, shared_data: Path, request: pytest.FixtureRequest) -> None:
    found: Tokenizer = request.getfixturevalue({"llama-bpe": "llama3"}.get(name, name))
    for text, ids in golden_cases(shared_data, name):
        assert found.encode(text) == ids, text
        assert found.encode(text, parse_special=False) == ids, text
        assert found.decode(ids) == text


def test_smollm3_golden_encodings(llama3: Tokenizer) -> None:
    for text, ids in {
        "The quick brown fox": [791, 4062, 14198, 39935],
        "1234567890": [4513, 10961, 16474, 15],
        "I'm testing SmolLM3.": [40, 2846, 7649, 4487, 337, 11237, 18, 13],
        "camelCase42HTTP": [94421, 4301, 2983, 9412],
        "你好，SmolLM3！": [57668, 53901, 3922, 10902, 337, 11237, 18, 6447],
        "Hello   world\nnext": [9906, 256, 1917, 198, 3684],
    }.items():
        assert llama3.encode(text) == ids


@pytest.mark.parametrize("pre_tokenizer", ["smaug-bpe", "llama3", "llama-v3"])
def test_synonyms_of_the_llama3_pre_tokenizer(shared_data: Path, pre_tokenizer: str) -> None:
    path = shared_data / "tiny-smollm3/tiny-smollm3-Q8_0.gguf"
    found = Tokenizer(gguf_data(path, pre_tokenizer=pre_tokenizer), 2304)
    again = Tokenizer(gguf_data(path, pre_tokenizer="llama-bpe"), 2304)
    text = "It's 12345 o'clock,  isn't IT?\n\n  Cửa Việt"
    assert found.encode(text) == again.encode(text)


def test_a_whole_word_of_the_vocabulary_wins_over_merges() -> None:
    words = ["ab", "abc"]  # "abc" cannot be reached: no merge makes it
    for pre_tokenizer, expected in {"smaug-bpe": ["abc"], "smollm": ["ab", "c"]}.items():
        found = byte_tokenizer(words=words, merges=["a b"], pre_tokenizer=pre_tokenizer)
        assert found.encode("abc") == [found.id_of(token) for token in expected]


@settings(max_examples=300)
@given(text=st.text(max_size=200))
def test_json_and_gguf_agree_and_decode_gives_the_text_back(
    text: str, tiny_json: Tokenizer, tiny_gguf: Tokenizer
) -> None:
    for parse_special in (True, False):
        ids = tiny_json.encode(text, parse_special=parse_special)
        assert ids == tiny_gguf.encode(text, parse_special=parse_special)
        assert tiny_json.decode(ids) == text == tiny_gguf.decode(ids)
    decoder = IncrementalDecoder(tiny_json)
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == text


def test_ten_thousand_random_texts_come_back(llama3: Tokenizer) -> None:
    random = Random(2)
    planes = [range(0x20, 0x7F), range(0x250), range(0xD800), range(0xE000, 0x110000)]
    for _ in range(10_000):
        characters = random.choice(planes)
        text = "".join(map(chr, random.choices(characters, k=random.randrange(24))))
        assert llama3.decode(llama3.encode(text)) == text


def test_json_and_gguf_agree_on_every_token(tiny_json: Tokenizer, tiny_gguf: Tokenizer) -> None:
    assert tiny_json.token_count == tiny_gguf.token_count == 2304
    assert tiny_json.control_tokens == tiny_gguf.control_tokens
    assert tiny_json.stop_ids([2051]) == tiny_gguf.stop_ids([2051]) == {2049, 2051}
    for token_id in range(2304):
        assert tiny_json.token_bytes(token_id) == tiny_gguf.token_bytes(token_id)


def test_control_tokens_are_text_when_special_parsing_is_off(tiny_gguf: Tokenizer) -> None:
    text = "a<|im_end|>\n<think>b"
    end, think = tiny_gguf.id_of("<|im_end|>"), tiny_gguf.id_of("<think>")
    with_control, without = tiny_gguf.encode(text), tiny_gguf.encode(text, parse_special=False)
    assert end in with_control
    assert end not in without
    assert think in with_control
    assert think in without  # not control: part of the answer's own structure
    assert tiny_gguf.decode(without) == tiny_gguf.decode(with_control) == text
    assert tiny_gguf.decode(with_control, skip_special=True) == "a\n<think>b"


def test_two_threads_may_parse_differently_at_once(tiny_gguf: Tokenizer) -> None:
    text = "x<|im_end|>y " * 50
    expected = {flag: tiny_gguf.encode(text, parse_special=flag) for flag in (True, False)}
    failures: list[bool] = []

    def work(flag: bool) -> None:
        for _ in range(200):
            if tiny_gguf.encode(text, parse_special=flag) != expected[flag]:
                failures.append(flag)

    joined([started(work, flag) for flag in (True, False) * 2])
    assert expected[True] != expected[False]
    assert not failures


def test_markup_tokens_are_never_hidden_even_if_a_file_calls_them_control() -> None:
    found = byte_tokenizer(control=["<|im_end|>", "<think>"])
    ids = found.encode("<think>a<|im_end|>")
    assert found.decode(ids, skip_special=True) == "<think>a"


def test_markup_of_a_tokenizer_json_is_parsed_even_if_called_special() -> None:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": 2 + place, "content": token, "special": True, **special}
        for place, token in enumerate(["<think>", "<|im_end|>"])
    ]
    found = tokenizer(4, json=_json_with(added_tokens=added))
    assert found.encode("a<think>b<|im_end|>") == [0, 2, 1, 3]
    assert found.encode("a<think>b<|im_end|>", parse_special=False) == [0, 2, 1]
    assert found.control_tokens == ("<|im_end|>",)


def test_no_token_is_put_in_front_unless_the_file_says_so() -> None:
    quiet = byte_tokenizer(bos_token_id=1)
    assert quiet.encode("a") == [quiet.id_of("a")]
    assert quiet.encode("a", add_bos=True) == [1, quiet.id_of("a")]
    loud = byte_tokenizer(bos_token_id=1, add_bos_token=True)
    assert loud.encode("a") == [1, loud.id_of("a")]
    assert loud.encode("a", add_bos=False) == [loud.id_of("a")]
    with pytest.raises(RequestError, match="add_bos"):
        byte_tokenizer().encode("a", add_bos=True)
    with pytest.raises(ModelFormatError, match="add_bos_token"):
        byte_tokenizer(add_bos_token=True)


def test_strange_text_does_not_crash(tiny_json: Tokenizer) -> None:
    assert tiny_json.decode(tiny_json.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tiny_json.decode(tiny_json.encode("\ud83d\ude00")) == "\U0001f600"
    assert tiny_json.decode(tiny_json.encode("a\0b\0")) == "a\0b\0"
    assert tiny_json.encode("") == []


@pytest.mark.parametrize(
    "text", ["A" * 300_000, " " * 300_000, "한" * 26_000, "\U0001f600" * 100_000, "!\n" * 100_000]
)
def test_long_equal_text(text: str, llama3: Tokenizer, starcoder: Tokenizer) -> None:
    for found in (llama3, starcoder):
        assert found.decode(found.encode(text)) == text


def test_bytes_that_the_vocabulary_lacks_are_dropped() -> None:
    tokens = ["<|im_end|>", *(character for character in BYTE_ALPHABET if character != "a")]
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)
    found = tokenizer(len(tokens), tokens=tokens, token_types=types)
    assert found.decode(found.encode("banana")) == "bnn"


def test_decoding_checks_ids_and_knows_padding_rows() -> None:
    found = byte_tokenizer()
    padded = tokenizer(300, tokens=[*BYTE_ALPHABET], token_types=[NORMAL] * 256)
    assert padded.decode([299, padded.encode("a")[0]]) == "a"
    for token_id in (-1, 300):
        with pytest.raises(RequestError, match=str(token_id)):
            padded.decode([token_id])
    assert found.token_bytes(2) == b"<|im_end|>"
    accent = padded.id_of("Ã")
    assert accent is not None
    assert padded.token_bytes(accent) == b"\xc3"
    assert padded.decode([accent]) == "\ufffd"


def test_stop_ids() -> None:
    found = byte_tokenizer(
        control=["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<x>"],
        user_defined=["<|end_of_text|>"],
        eos_token_id=1,
    )
    assert found.stop_ids() == {0, 1, 2, 3}
    assert found.stop_ids([4, -1, 100_000]) == {0, 1, 2, 3, 4}
    assert found.is_special(4)
    assert not found.is_special(5)


GOOD: dict[str, Any] = {"tokens": ["a", "b", "ab"], "token_types": [1, 1, 1], "merges": ["a b"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pre_tokenizer": "gpt-4o"}, "gpt-4o"),
        ({"pre_tokenizer": None}, "None"),
        ({"tokens": []}, "tokens is missing"),
        ({"token_types": [1]}, "token_type has 1 entries"),
        ({"tokens": ["a", "b", "a"]}, "repeats 'a'"),
        ({"merges": ["ab"]}, r"merges\[0\]"),
        ({"merges": ["a  "]}, "out of vocabulary"),
        ({"merges": ["a c"]}, "out of vocabulary"),
        ({"merges": ["a a"]}, "out of vocabulary"),
        ({"tokens": ["a", "b", "ab", "c"], "token_types": [1] * 4}, "4 entries"),
        ({"eos_token_id": 3}, "eos_token_id is 3"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"json": b"{"}, "not a usable tokenizer"),
        ({"json": b"\xff\xfe"}, "not a usable tokenizer"),
        ({"json": b"[" * 100_000}, "not a usable tokenizer"),
        ({"json": b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'}, "."),
    ],
)
def test_a_bad_vocabulary_is_an_error(change: dict[str, Any], named: str) -> None:
    assert tokenizer(3, **GOOD).encode("ab") == [2]
    with pytest.raises(ModelFormatError, match=named):
        tokenizer(3, **{**GOOD, **change})


def test_an_unknown_pre_tokenizer_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="gpt-2"):
        tokenizer(3, **{**GOOD, "pre_tokenizer": "gpt-2"})


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def _json_with(**changes: Any) -> bytes:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    values: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model}
    values |= {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
    return json.dumps(values | changes).encode()


def test_a_tokenizer_json_may_not_shorten_or_pad() -> None:
    truncation = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    found = tokenizer(2, json=_json_with(truncation=truncation))
    assert found.encode("abab") == [0, 1, 0, 1]


def test_a_tokenizer_json_may_not_leave_out_merges_at_random() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["a b"], "dropout": 0.5}
    found = tokenizer(3, json=_json_with(model=model))
    assert found.encode("ab" * 50) == found.encode("ab" * 50) == [2] * 50


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pre_tokenizer": None}, "pre_tokenizer.*none"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer.*Whitespace"),
        ({"decoder": None}, "decoder.*none"),
        ({"decoder": {"type": "ByteFallback"}}, "decoder.*ByteFallback"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [
                        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
                    ]
                    * 5,
                }
            },
            "normalizer.*Replace",
        ),
        (
            {
                "model": {
                    "type": "BPE",
                    "vocab": {"a": 0},
                    "merges": [],
                    "continuing_subword_prefix": "#",
                }
            },
            "continuing_subword_prefix",
        ),
    ],
)
def test_what_is_not_byte_level_is_unsupported(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        tokenizer(2, json=_json_with(**change))


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "continuing\\u005fsubword_prefix"])
def test_a_prefix_that_ends_the_process_of_the_library(key: str) -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], key: "s"}
    content = _json_with(model=model).replace(b"\\\\", b"\\")
    with pytest.raises(UnsupportedError, match="continuing_subword_prefix"):
        tokenizer(3, json=content)


def test_a_token_that_looks_like_an_escape_is_none() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "\\u0061": 1}, "merges": []}
    assert tokenizer(2, json=_json_with(model=model)).encode("a") == [0]


def test_an_error_of_the_library_while_encoding_is_an_error_of_the_file() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "missing"}
    found = tokenizer(2, json=_json_with(model=model))
    with pytest.raises(ModelFormatError, match="missing"):
        found.encode("b")


def test_ids_beyond_the_embedding_are_refused() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 99}, "merges": []}
    found = tokenizer(2, json=_json_with(model=model))
    with pytest.raises(ModelFormatError, match="99"):
        found.encode("b")
    with pytest.raises(ModelFormatError, match="3 tokens"):
        tokenizer(2, json=_json_with(model={**model, "vocab": {"a": 0, "b": 1, "c": 2}}))


@settings(max_examples=200)
@given(data=st.binary(max_size=60), cut=st.integers(0, 60))
def test_incremental_decoding_never_cuts_a_character(data: bytes, cut: int) -> None:
    found = byte_tokenizer()
    text = data.decode("utf-8", "replace")
    spelled = {
        byte: token_id
        for token_id in range(259)
        for byte in found.token_bytes(token_id)
        if len(found.token_bytes(token_id)) == 1
    }
    ids = [spelled[byte] for byte in data]
    assert found.decode(ids) == text
    decoder = IncrementalDecoder(found)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.flush()]) == text
    emoji = "\U0001f44d\U0001f3fd中文é"
    ids = [spelled[byte] for byte in emoji.encode()[:cut]]
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join([*pieces, decoder.flush()]) == found.decode(ids)


def test_incremental_decoding_does_not_stall_on_invalid_bytes() -> None:
    found = byte_tokenizer()
    lead, stray = found.id_of("Ã"), found.id_of("ÿ")
    assert lead is not None
    assert stray is not None
    decoder = IncrementalDecoder(found, skip_special=True)
    letter = found.encode("a")[0]
    assert decoder.push(stray) == "\ufffd"
    assert decoder.push(lead) == ""
    assert decoder.push(2) == ""  # control: left out
    assert decoder.push(letter) == "\ufffda"
    assert decoder.push(lead) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_the_two_forms_of_one_checkpoint_open_alike(shared_data: Path) -> None:
    folder = shared_data / "tiny-smollm3"
    found = []
    for path in (folder, folder / "tiny-smollm3-Q8_0.gguf"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.tokenizer is not None
        assert checkpoint.chat_template is not None
        opened = Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
        template = ChatTemplate(checkpoint.chat_template, opened, str(path))
        ids = template.encode([{"role": "user", "content": "Hi"}], date=datetime.date(2025, 7, 8))
        stop = opened.stop_ids(checkpoint.config.eos_token_ids)
        found.append((opened.eos_token_id, opened.add_bos_token, sorted(stop), ids))
        checkpoint.close()
    assert found[0] == found[1]
    assert found[0][:3] == (2051, False, [2049, 2051])
