from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.peer import Settings, first_tokens

STEP_TOKENS = 512  # its default


class LlamaCppPeer:
    """llama.cpp through the low-level functions of llama-cpp-python: no Python per logit.

    Sequences that decode side by side have caches of their own (`kv_unified` off), and flash
    attention is left to it: the fastest of the four combinations.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        import llama_cpp

        self.name = "llama.cpp"
        self._api: Any = llama_cpp
        self._settings = settings
        llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file failed")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(STEP_TOKENS, 0, 1)
        self._context: Any = None
        self._sequences = 0  # that the context is for
        self._filled = 0  # tokens that a decode found in the cache of each

    def prefill(self, tokens: Sequence[int]) -> float:
        self._open(1)
        self._clear()
        start = time.perf_counter()
        self._take_in(0, tokens)
        self._greedy(-1)
        return time.perf_counter() - start

    def decode(self, sequences: int, depth: int, count: int) -> float:
        self._open(sequences)
        memory = self._api.llama_get_memory(self._context)
        if depth == 0 or self._filled != depth:
            self._clear()
            for sequence in range(sequences):
                self._take_in(sequence, [1] * depth)
            self._filled = depth
        else:
            for sequence in range(sequences):  # what the last decode added
                self._api.llama_memory_seq_rm(memory, sequence, depth, -1)
        tokens = first_tokens(sequences)
        start = time.perf_counter()
        for position in range(depth, depth + count):
            self._step([(token, position, i, True) for i, token in enumerate(tokens)])
            tokens = [self._greedy(i) for i in range(sequences)]
        return time.perf_counter() - start

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        if self._context:
            self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _open(self, sequences: int) -> None:
        """A context for so many sequences: it cuts its cache into as many parts."""
        if self._sequences == sequences:
            return
        if self._context:
            self._api.llama_free(self._context)
        settings, parameters = self._settings, self._api.llama_context_default_params()
        parameters.n_seq_max = sequences
        alone = sequences == 1
        parameters.n_ctx = settings.context_size if alone else sequences * settings.shared_size
        parameters.n_batch = parameters.n_ubatch = STEP_TOKENS
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.kv_unified = False
        self._context = self._api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama_init_from_model failed with {sequences} sequences")
        self._sequences, self._filled = sequences, 0

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._filled = 0

    def _take_in(self, sequence: int, tokens: Sequence[int]) -> None:
        last = len(tokens) - 1
        rows = [(token, i, sequence, i == last) for i, token in enumerate(tokens)]
        for begin in range(0, len(rows), STEP_TOKENS):
            self._step(rows[begin : begin + STEP_TOKENS])

    def _step(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Rows of token, position, sequence, and whether logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")

    def _greedy(self, row: int) -> int:
        pointer = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax())


_callbacks: list[Any] = []


def _silent(api: Any) -> Any:
    """A log callback that drops everything; kept alive as long as the library may call it."""

    def drop(_level: int, _text: bytes, _data: Any) -> None:
        return

    _callbacks.append(api.llama_log_callback(drop))
    return _callbacks[-1]
