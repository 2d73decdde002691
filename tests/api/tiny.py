"""A model folder made on the spot: random weights, a small trained tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import save_folder, small_config

TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think>

</think>
{% endif -%}
{%- endif -%}
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<think>", "</think>"]
VOCABULARY = 400
TEXT = """The sky is blue because air scatters short waves of light more than long ones.
A small model answers in small words. def add(a, b): return a + b
Numbers such as 1234 and 5.6, ünïcödé, 中文 and 👍 are cut into bytes when they are rare."""


def train_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of VOCABULARY tokens, or a few less."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # SmolLM2's, which GGUF has a name for.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKUP),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKUP])
    tokenizer.save(str(path))


def make_folder(folder: Path, **changes: Any) -> Path:
    """A SmolLM3 of VOCABULARY tokens with everything that a folder from the Hub has."""
    config = small_config(
        **{
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_ids": (2,),
            "tie_word_embeddings": False,
            **changes,
        }
    )
    save_folder(config, random_weights(config, 3, WeightType.F32), folder)
    train_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
