from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.peer import Settings, first_tokens


class TransformersPeer:
    """transformers on torch, from a folder or a GGUF file, whose weights it dequantizes."""

    def __init__(self, path: Path, settings: Settings, dtype: str) -> None:
        import torch
        import transformers

        self.name = f"transformers {dtype}"
        torch.set_num_threads(settings.threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch = torch
        source: dict[str, Any] = {"dtype": getattr(torch, dtype)}
        folder = path
        if path.suffix == ".gguf":
            folder, source["gguf_file"] = path.parent, path.name
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **source)
        self._filled = (0, 0)  # sequences and tokens of each that the cache holds
        self._cache: Any = None

    def prefill(self, tokens: Sequence[int]) -> float:
        self._filled, self._cache = (0, 0), None
        with self._torch.inference_mode():
            ids = self._torch.tensor([list(tokens)])
            start = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

    def decode(self, sequences: int, depth: int, count: int) -> float:
        with self._torch.inference_mode():
            if depth == 0 or self._filled != (sequences, depth):
                self._cache = None
                if depth:
                    ids = self._torch.ones((sequences, depth), dtype=self._torch.int64)
                    self._cache = self._step(ids).past_key_values
                self._filled = sequences, depth
            else:
                self._cache.crop(depth - self._cache.get_seq_length())  # what the last decode added
            ids = self._torch.tensor(first_tokens(sequences))
            start = time.perf_counter()
            for _ in range(count):
                out = self._step(ids[:, None])
                self._cache = out.past_key_values
                ids = out.logits[:, -1].argmax(-1)
            return time.perf_counter() - start

    def close(self) -> None:
        del self._model, self._cache

    def _step(self, ids: Any) -> Any:
        return self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
