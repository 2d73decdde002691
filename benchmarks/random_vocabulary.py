"""A vocabulary of real size for a random model: from a GGUF file, or made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

SMOLLM2_SPECIALS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
    *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"),
    *("<jupyter_script>", "<empty_output>"),
]
SMOLLM3_FIRST_SPECIAL = 128000
SMOLLM3_SPECIALS = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>"),
    *("<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>", "<code>", "</code>"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|im_start|>assistant\n'}}{% endif %}"
)


@dataclass
class Vocabulary:
    tokens: list[str]  # in GPT-2's alphabet of bytes
    token_types: list[int]
    merges: list[str]
    pre_tokenizer: str
    bos_token_id: int
    eos_token_id: int


def vocabulary_from_gguf(path: Path, model_type: str) -> Vocabulary:
    """The vocabulary of a GGUF file; of a Llama-3 one, the specials renamed to SmolLM3's."""
    from smolrun.files.gguf import GgufFile
    from smolrun.files.tokenizer_data import gguf_tokenizer

    data = gguf_tokenizer(GgufFile.open(path))
    if data is None:
        raise SystemExit(f"{path} holds no vocabulary")
    tokens, types, merges = list(data.tokens), list(data.token_types), list(data.merges)
    if model_type == "smollm3" and len(tokens) > SMOLLM3_FIRST_SPECIAL:
        _name_smollm3_specials(tokens, types)
    return _vocabulary(tokens, types, merges, model_type)


def synthetic_vocabulary(size: int, model_type: str) -> Vocabulary:
    """A made-up byte-level BPE vocabulary: 256 bytes, then strings of 16 common letters.

    With 128256 tokens it has 280147 merges, with 49152 it has 48900, as SmolLM3 and SmolLM2.
    """
    at_end = model_type == "smollm3" and size > SMOLLM3_FIRST_SPECIAL
    specials = size - SMOLLM3_FIRST_SPECIAL if at_end else len(SMOLLM2_SPECIALS)
    words = list(islice(_words(), max(0, size - specials - 256)))
    merges_wanted = 280147 if at_end else max(0, size - 252)
    known = set(words)
    merges = [f"{word[:-1]} {word[-1]}" for word in words]
    for word in words:
        for cut in range(1, len(word) - 1):
            if len(merges) >= merges_wanted:
                break
            if cut == 1 or word[:cut] in known:
                merges.append(f"{word[:cut]} {word[cut:]}")
    ordinary = [*_byte_characters(), *words]
    types = [NORMAL] * len(ordinary)
    if at_end:
        tokens = ordinary + [
            f"<|reserved_special_token_{i}|>" for i in range(1000, 1000 + specials)
        ]
        types += [CONTROL] * specials
        _name_smollm3_specials(tokens, types)
    else:
        tokens = SMOLLM2_SPECIALS + ordinary
        types = [CONTROL] * specials + types
    return _vocabulary(tokens, types, merges, model_type)


def _vocabulary(
    tokens: list[str], types: list[int], merges: list[str], model_type: str
) -> Vocabulary:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    end = ids.get("<|im_end|>", 0)
    begin = ids.get("<|begin_of_text|>", ids.get("<|im_start|>", 0))
    pre_tokenizer = "smaug-bpe" if model_type == "smollm3" else "smollm"
    return Vocabulary(tokens, types, merges, pre_tokenizer, begin, end)


def _name_smollm3_specials(tokens: list[str], types: list[int]) -> None:
    for place, text in enumerate(SMOLLM3_SPECIALS):
        token_id = SMOLLM3_FIRST_SPECIAL + place
        tokens[token_id] = text
        types[token_id] = CONTROL if text.startswith("<|") else USER_DEFINED


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes, in their order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [characters.get(byte, chr(byte)) for byte in range(256)]


def _words() -> Iterator[str]:
    """Strings of two, three, ... letters, short ones first, so that all parts of one exist."""
    letters = "Ġetaoinshrdlucmf"
    for length in range(2, 8):
        for word in product(letters, repeat=length):
            yield "".join(word)
