"""GGUF files whose metadata contradict themselves or the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from .corpus_case import LAST, TOKENS, Case, changed, gguf
from .images import (
    HEAD_DIM,
    HIDDEN,
    VOCABULARY,
    Metadata,
    Tensors,
    tiny_tensors,
)


def tokenizer_cases() -> Iterator[Case]:
    count = len(VOCABULARY)
    arrays: dict[str, Metadata] = {
        "tokens": {TOKENS: ("[u32]", list(range(count)))},
        "tokens-scalar": {TOKENS: ("string", "a")},
        "token_type": {"tokenizer.ggml.token_type": ("[u8]", [1] * count)},
        "token_type-floats": {"tokenizer.ggml.token_type": ("[f32]", [1.0] * count)},
        "scores": {"tokenizer.ggml.scores": ("[u8]", [0] * count)},
        "scores-strings": {"tokenizer.ggml.scores": ("[string]", ["0"] * count)},
        "merges": {"tokenizer.ggml.merges": ("[i32]", [1, 2])},
        "model": {"tokenizer.ggml.model": ("u32", 2)},
        "pre": {"tokenizer.ggml.pre": ("[string]", ["smollm"])},
        "add_bos_token": {"tokenizer.ggml.add_bos_token": ("u32", 1)},
    }
    for name, metadata in arrays.items():
        (key,) = metadata
        yield gguf(f"{name}-of-wrong-type", changed(metadata), key)
    lengths: Metadata = {
        "tokenizer.ggml.token_type": ("[i32]", [1] * (count - 1)),
        "tokenizer.ggml.scores": ("[f32]", [0.0] * (count + 1)),
        TOKENS: ("[string]", [*VOCABULARY, "one more"]),
    }
    for key, array in lengths.items():
        named = "tokenizer.ggml.token_type" if key == TOKENS else key
        yield gguf(f"{key[15:]}-of-wrong-length", changed({key: array}), named)
    for key in ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id"):
        wrong: tuple[tuple[str, int | str], ...] = (("u32", count), ("u32", (1 << 32) - 1))
        for stored, value in (*wrong, ("i32", -1), ("string", "1")):
            full = f"tokenizer.ggml.{key}"
            yield gguf(
                f"{key}-{stored}-{value}",
                changed({full: (stored, value)}),
                full,
                str(value),
            )
    own: dict[str, tuple[str, object]] = {
        "ignore_merges": ("u32", 1),
        "eos_token_ids": ("[u32]", [1, count]),
        "rope_scaling.truncate": ("string", "no"),
        "rope_scaling.mscale": ("f32", -1.0),
    }
    for key, wrong_value in own.items():
        yield gguf(f"own-{key}", changed({f"smolrun.{key}": wrong_value}), f"smolrun.{key}")
    for name, merges, word in (
        ("unknown-token", ["a b", "x y"], "x"),
        ("one-part", ["ab"], "ab"),
        ("empty", [""], "merges"),
    ):
        yield gguf(
            f"merge-{name}",
            changed({"tokenizer.ggml.merges": ("[string]", merges)}),
            word,
        )
    yield gguf(
        "duplicate-token",
        changed({TOKENS: ("[string]", [*VOCABULARY[:-1], "a"])}),
        "tokens",
        "'a'",
    )
    yield gguf(
        "token-type-77",
        changed({"tokenizer.ggml.token_type": ("[i32]", [77] * count)}),
        "token_type",
        "77",
    )
    for key, named in (("model", "llama"), ("pre", "no-such-pattern")):
        full = f"tokenizer.ggml.{key}"
        yield gguf(f"{key}-{named}", changed({full: ("string", named)}), full, named)
    for key in ("tokens", "merges", "pre"):
        yield gguf(
            f"without-{key}",
            changed(without=f"tokenizer.ggml.{key}"),
            f"tokenizer.ggml.{key}",
        )
    yield gguf(
        "template-as-number",
        changed({"tokenizer.chat_template": ("u32", 1)}),
        "tokenizer.chat_template",
    )
    temperatures: tuple[tuple[str, object], ...] = (("f32", math.nan), ("f32", -1.0))
    for stored, found in (*temperatures, ("string", "hot"), ("bool", True)):
        yield gguf(
            f"temperature-{found}",
            changed({"general.sampling.temp": (stored, found)}),
            "general.sampling",
            "temperature",
        )


def configuration_cases() -> Iterator[Case]:
    sizes = {
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.embedding_length": HIDDEN,
        "llama.context_length": 64,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.feed_forward_length": 64,
        "llama.vocab_size": len(VOCABULARY),
    }
    for key, value in sizes.items():
        for number in (0, (1 << 31) - 1, (1 << 32) - 1):
            yield gguf(f"{key}-{number}", changed({key: ("u32", number)}), key)
        if key != "llama.context_length":  # which one more position does not contradict
            yield gguf(f"{key}-one-more", changed({key: ("u32", value + 1)}))
        yield gguf(f"{key}-as-array", changed({key: ("[u32]", [value] * 2)}), key)
        yield gguf(f"{key}-as-string", changed({key: ("string", "8")}), key)
        yield gguf(f"{key}-as-float", changed({key: ("f32", 8.5)}), key)
    for key in ("llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"):
        for real in (math.nan, math.inf, -1.0, 0.0):
            yield gguf(f"{key}-{real}", changed({key: ("f32", real)}), key)
    architecture = "general.architecture"
    yield gguf("foreign-architecture", changed({architecture: ("string", "qwen2")}), "qwen2")
    yield gguf("architecture-as-number", changed({architecture: ("u32", 1)}), architecture)
    yield gguf("without-architecture", changed(without=architecture), architecture)
    yield gguf("without-layers", changed(without="llama.block_count"), "block_count")

    def change(name: str, sizes: tuple[int, ...]) -> Callable[[Tensors], None]:
        def apply(tensors: Tensors) -> None:
            count = int(math.prod(sizes))
            tensors[name] = ("F32", sizes, bytes(4 * count))

        return apply

    def remove(name: str) -> Callable[[Tensors], None]:
        def apply(tensors: Tensors) -> None:
            del tensors[name]

        return apply

    all_sizes = {name: sizes for name, (_, sizes, _) in tiny_tensors().items()}
    for name, content in all_sizes.items():
        wrong = [(*content[:-1], content[-1] + 1), (content[0] + 1, *content[1:])]
        if len(content) == 2:
            wrong += [content[::-1], (content[0] * content[1],)]
        for shape in dict.fromkeys(wrong):
            if shape != content:
                yield gguf(
                    f"{name}-of-shape-{'x'.join(map(str, shape))}",
                    changed(tensors=change(name, shape)),
                    name,
                    str(tuple(reversed(shape))),
                    str(tuple(reversed(content))),
                )
        yield gguf(f"without-{name}", changed(tensors=remove(name)), "missing")
    for name in ("blk.1.attn_q.weight", "blk.00.attn_q.weight", "rope_freqs.weight", "other"):
        yield gguf(f"with-{name}", changed(tensors=change(name, (8,))), name)
    yield gguf(
        "quantized-vector",
        changed(tensors=lambda tensors: tensors.update({LAST: ("Q8_0", (HIDDEN,), bytes(34))})),
        "Q8_0",
        LAST,
    )
