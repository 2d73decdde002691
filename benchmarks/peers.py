"""The programs that smolrun is compared with, each behind one small face."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np


class Peer(Protocol):
    """A loaded model. Times are seconds of wall clock; nothing is cached between calls."""

    name: str

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds to take a prompt in, up to the logits of its last token."""

    def decode(self, depth: int, count: int) -> float:
        """Seconds for `count` greedy tokens after `depth` tokens of prompt, one at a time."""

    def close(self) -> None: ...


class SmolrunPeer:
    """smolrun through its public API."""

    def __init__(
        self,
        path: Path,
        threads: int,
        context_size: int,
        activations: Literal["exact", "fast"] = "exact",
    ) -> None:
        from smolrun import Model

        self.name = "smolrun"
        self._model = Model(
            path, threads=threads, context_size=context_size, activations=activations
        )

    def prefill(self, tokens: Sequence[int]) -> float:
        self._model.clear_kv_cache()
        ids = np.array([tokens])
        start = time.perf_counter()
        self._model.forward(ids)
        return time.perf_counter() - start

    def decode(self, depth: int, count: int) -> float:
        self._model.clear_kv_cache()
        prompt = np.ones((1, max(depth, 1)), np.int64)
        logits = self._model.forward(prompt)
        position = prompt.shape[1]
        start = time.perf_counter()
        for _ in range(count):
            token = int(logits[0, -1].argmax())
            logits = self._model.forward(np.array([[token]]), position)
            position += 1
        return time.perf_counter() - start

    def close(self) -> None:
        self._model.close()


class LlamaCppPeer:
    """llama.cpp through the low-level functions of llama-cpp-python: no Python per logit."""

    def __init__(self, path: Path, threads: int, context_size: int) -> None:
        import llama_cpp

        self.name = "llama.cpp"
        self._api: Any = llama_cpp
        llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context_size
        parameters.n_batch = 512
        parameters.n_ubatch = 512
        parameters.n_threads = threads
        parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _feed(self, tokens: Sequence[int]) -> None:
        for begin in range(0, len(tokens), 512):
            piece = tokens[begin : begin + 512]
            array = (self._api.llama_token * len(piece))(*piece)
            status = self._api.llama_decode(
                self._context, self._api.llama_batch_get_one(array, len(piece))
            )
            if status:
                raise RuntimeError(f"llama_decode: {status}")

    def _greedy(self) -> int:
        pointer = self._api.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(pointer, (self._vocabulary,)).argmax())

    def prefill(self, tokens: Sequence[int]) -> float:
        self._clear()
        start = time.perf_counter()
        self._feed(tokens)
        self._greedy()
        return time.perf_counter() - start

    def decode(self, depth: int, count: int) -> float:
        self._clear()
        self._feed([1] * max(depth, 1))
        start = time.perf_counter()
        for _ in range(count):
            self._feed([self._greedy()])
        self._greedy()
        return time.perf_counter() - start

    def close(self) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


_callbacks: list[Any] = []


def _silent(api: Any) -> Any:
    """A log callback that drops everything; kept alive as long as the library may call it."""

    def drop(_level: int, _text: bytes, _data: Any) -> None:
        return

    _callbacks.append(api.llama_log_callback(drop))
    return _callbacks[-1]


class TransformersPeer:
    """transformers on torch, from a folder or a GGUF file (dequantized to float32)."""

    def __init__(self, path: Path, threads: int, context_size: int) -> None:
        import torch
        import transformers

        self.name = "transformers"
        torch.set_num_threads(threads)
        self._torch = torch
        source: dict[str, Any] = {"dtype": torch.float32}
        folder = path
        if path.suffix == ".gguf":
            folder, source["gguf_file"] = path.parent, path.name
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **source)

    def prefill(self, tokens: Sequence[int]) -> float:
        with self._torch.no_grad():
            start = time.perf_counter()
            self._model(self._torch.tensor([list(tokens)]), logits_to_keep=1)
            return time.perf_counter() - start

    def decode(self, depth: int, count: int) -> float:
        with self._torch.no_grad():
            ids = self._torch.ones((1, max(depth, 1)), dtype=self._torch.int64)
            out = self._model(ids, use_cache=True, logits_to_keep=1)
            start = time.perf_counter()
            for _ in range(count):
                ids = out.logits[:, -1:].argmax(-1)
                out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
            return time.perf_counter() - start

    def close(self) -> None:
        del self._model


PEERS: dict[str, type[SmolrunPeer] | type[LlamaCppPeer] | type[TransformersPeer]] = {
    "smolrun": SmolrunPeer,
    "llama.cpp": LlamaCppPeer,
    "transformers": TransformersPeer,
}
