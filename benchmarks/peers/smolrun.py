from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peers.peer import Settings, first_tokens


class SmolrunPeer:
    """smolrun through its public API."""

    def __init__(self, path: Path, settings: Settings) -> None:
        from smolrun import Model

        self.name = "smolrun"
        self._model = Model(
            path,
            threads=settings.threads,
            context_size=max(settings.context_size, settings.shared_size),
            max_sequences=settings.sequences,
            activations=settings.activations,
        )
        self._filled = (0, 0)  # sequences and tokens of each that the cache holds

    def prefill(self, tokens: Sequence[int]) -> float:
        self._clear()
        ids = np.array([tokens])
        start = time.perf_counter()
        self._model.forward(ids)
        return time.perf_counter() - start

    def decode(self, sequences: int, depth: int, count: int) -> float:
        if self._filled != (sequences, depth):
            self._clear()
            if depth:
                self._model.forward(np.ones((sequences, depth), np.int64))
            self._filled = sequences, depth
        tokens = np.array(first_tokens(sequences))
        start = time.perf_counter()
        for position in range(depth, depth + count):
            logits = self._model.forward(tokens[:, None], position)
            tokens = logits[:, -1].argmax(axis=1)
        return time.perf_counter() - start

    def close(self) -> None:
        self._model.close()

    def _clear(self) -> None:
        self._model.clear_kv_cache()
        self._filled = 0, 0
