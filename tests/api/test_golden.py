"""The small SmolLM3 of the golden data: transformers' and llama.cpp's numbers, and our own bounds.

What quantization itself loses is no error of ours: quantized weights are held against the same
weights in float32, as llama.cpp's results are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun import Model
from smolrun.engine.load import load_config
from smolrun.engine.native import Activations
from smolrun.files.checkpoint import open_checkpoint
from smolrun.quant.blocks import tensor_values
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType
from tests.models import nmse

Array = npt.NDArray[np.float32]
TEXTS = ("short", "medium", "long", "chat")
GGUFS = ("bf16", "Q8_0", "Q4_K_M")
# Design bounds on the squared error against transformers; our own figures are 1e-9.
BOUNDS: dict[Any, float] = {"f32": 1e-6, "f16": 2e-6, "bf16": 5e-5, "auto": 5e-5}


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "tiny-smollm3"


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Any]:
    return dict(np.load(folder / "golden.npz"))


def logits_of(model: Model, golden: dict[str, Any]) -> dict[str, Array]:
    return {
        text: model.forward(golden[f"{text}_ids"], all_positions=True)[0][golden[f"{text}_rows"]]
        for text in TEXTS
    }


def divergence(reference: Array, other: Array) -> float:
    """Mean KL divergence over positions, in nats."""

    def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@contextmanager
def dequantized(path: Path) -> Iterator[Model]:
    """The model of a GGUF file with its weights in float32."""
    checkpoint = open_checkpoint(path)
    tensors = {
        name: Tensor(
            name,
            WeightType.F32,
            tensor.shape,
            np.ascontiguousarray(tensor_values(tensor)).reshape(-1).view(np.uint8),
            tensor.origin,
        )
        for name, tensor in checkpoint.tensors.items()
    }
    model = Model._of(load_config(checkpoint.config, tensors))
    checkpoint.close()
    with model:
        yield model


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_safetensors_against_transformers(folder: Path, golden: dict[str, Any], dtype: Any) -> None:
    with Model(folder, dtype=dtype) as model:
        for text, logits in logits_of(model, golden).items():
            assert nmse(logits, golden[f"{text}_logits"]) <= BOUNDS[dtype]
            assert (logits.argmax(-1) == golden[f"{text}_logits"].argmax(-1)).mean() >= 0.999


def test_greedy_continuations(folder: Path, golden: dict[str, Any]) -> None:
    prompts = [golden[f"{text}_ids"].tolist() for text in TEXTS]
    with Model(folder, dtype="f32") as model:
        results = model.generate(prompts, temperature=0, max_tokens=48, ignore_eos=True)
    for text, result in zip(TEXTS, results, strict=True):
        assert list(result.token_ids) == golden[f"{text}_greedy"].tolist(), text


@pytest.mark.parametrize(("activations", "share"), [("exact", 0.1), ("fast", 1.0)])
@pytest.mark.parametrize("kind", GGUFS)
def test_gguf_against_both(
    folder: Path, golden: dict[str, Any], kind: str, activations: Activations, share: float
) -> None:
    """What our arithmetic adds is at most that share of what llama.cpp's does.

    Half of it is asked of fast activations on the real 135M, in tests/parity.
    """
    path = folder / f"tiny-smollm3-{kind}.gguf"
    llama_cpp = np.load(folder / f"golden-llamacpp-{kind}.npz")
    with Model(path, activations=activations) as model:
        ours = logits_of(model, golden)
    with dequantized(path) as model:
        exact = logits_of(model, golden)
    added, allowed = [], []
    for text in TEXTS:
        theirs = llama_cpp[f"{text}_logits"]
        assert nmse(ours[text], theirs) <= 2e-3
        added.append(divergence(exact[text], ours[text]))
        allowed.append(divergence(exact[text], theirs))
        if kind == "bf16":
            assert nmse(ours[text], golden[f"{text}_logits"]) <= BOUNDS["bf16"]
    assert sum(added) <= sum(allowed) * share, (added, allowed)
