"""Opening a file, and using what opened, as a program would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from smolrun._core import Runner
from smolrun.files.checkpoint import Checkpoint, open_checkpoint
from smolrun.files.weights import WeightLoading
from smolrun.model.llama import build
from smolrun.text.tokenizer import Tokenizer


def open_whole(path: Path) -> tuple[Checkpoint, Tokenizer | None]:
    """The checkpoint and its tokenizer; whatever is wrong with the files must show here."""
    checkpoint = open_checkpoint(path)
    if checkpoint.tokenizer is None:
        return checkpoint, None
    return checkpoint, Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)


def run(checkpoint: Checkpoint, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocabulary] from the native kernels."""
    config = checkpoint.config
    program = build(config)
    frequencies, factor = config.rope_parameters()
    with WeightLoading.from_file(checkpoint, program, threads=1) as loading:
        weights = loading.finish()
    runner = Runner(
        [operation.as_dict() for operation in program.operations],
        weights,
        program.buffers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_hidden_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        inverse_frequencies=frequencies,
        attention_factor=factor,
        kv_blocks=1,
        threads=1,
        isa="scalar",
    )
    n = len(tokens)
    logits = np.zeros((n, config.vocab_size), np.float32)
    runner.step(
        np.array(tokens, np.int32),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.zeros((1, 1), np.int32),
        np.arange(n, dtype=np.int32),
        logits,
    )
    return logits
