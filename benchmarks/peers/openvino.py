from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.peer import Settings, first_tokens


class OpenVinoPeer:
    """openvino-genai on a GGUF file: its default backend, paged attention, is the faster of two.

    It would remember prompts between calls, so prefix caching is off. Times are those that it takes
    itself, up to a token and between tokens; they include its greedy choice.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        import openvino
        import openvino_genai

        self.name = "openvino-genai"
        self._tensor: Any = openvino.Tensor
        self._api: Any = openvino_genai
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.enable_prefix_caching = False
        scheduling.max_num_batched_tokens = settings.most_tokens + settings.sequences
        scheduling.max_num_seqs = settings.sequences
        self._pipeline = openvino_genai.LLMPipeline(
            str(path),
            "CPU",
            scheduler_config=scheduling,
            INFERENCE_NUM_THREADS=settings.threads,
        )

    def prefill(self, tokens: Sequence[int]) -> float:
        metrics = self._generate(np.array([tokens]), 1)
        return float(metrics.get_ttft().mean) / 1e3

    def decode(self, sequences: int, depth: int, count: int) -> float:
        # It decodes only after a prompt, whose last token is the one that goes on.
        prompt = np.ones((sequences, depth + 1), np.int64)
        prompt[:, -1] = first_tokens(sequences)
        times = self._generate(prompt, count + 1).raw_metrics.m_new_token_times
        if len(times) != count + 1:
            raise RuntimeError(f"{len(times)} tokens came, not {count + 1}")
        return float(times[-1] - times[0]) / 1e3

    def close(self) -> None:
        del self._pipeline

    def _generate(self, ids: npt.NDArray[np.int64], count: int) -> Any:
        inputs = self._api.TokenizedInputs(self._tensor(ids), self._tensor(np.ones_like(ids)))
        options = {"max_new_tokens": count, "ignore_eos": True, "do_sample": False}
        return self._pipeline.generate(inputs, **options).perf_metrics
