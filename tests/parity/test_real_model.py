"""The real SmolLM2-135M in every format that people hold, against transformers and llama.cpp.

The reference is transformers in float32 on the very weights of the file, dequantized: so a figure
here is what our arithmetic adds, not what the format loses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun import Model
from tests.models import Values, nmse, transformers_logits, transformers_model

pytestmark = pytest.mark.parity

Array = npt.NDArray[np.float32]
PASSAGE = Path(__file__).with_name("passage.txt")

# llama.cpp's file types (smollm: llama_ftype), in the order in which they are made.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q4_0": 2,
    "Q4_1": None,  # as packaged
    "Q5_0": 8,
    "Q4_K_M": 15,
}
NMSE_BOUND = {"F32": 1e-6, "F16": 2e-6, "BF16": 5e-5}  # docs/architecture.md, numeric contract


def make_format(name: str, packaged: Path, folder: Path) -> Path:
    """The packaged model in another format, written by llama.cpp's own quantizer."""
    file_type = FILE_TYPES[name]
    if file_type is None:
        return packaged
    import llama_cpp

    target = folder / f"{name}.gguf"
    source = packaged if name == "F32" else make_format("F32", packaged, folder)
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = file_type
        parameters.allow_requantize = True
        parameters.nthread = 2
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(parameters)
        )
        assert status == 0
    return target


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def mean_divergence(reference: Array, other: Array) -> float:
    """Mean KL divergence over positions, in nats."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def reference_weights(path: Path, heads: dict[str, int]) -> Values:
    """The file's weights in float32, read and dequantized by the `gguf` package."""
    import gguf

    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        *block, kind, _ = tensor.name.split(".")
        if kind in heads:  # stored row 2i+j of a head is row j*head_dim/2+i
            pairs = values.reshape(heads[kind], -1, 2, values.shape[-1])
            values = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{names[kind]}.weight"] = values
    return weights


def llama_cpp_logits(path: Path, ids: list[int]) -> Array:
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=1024, n_threads=2, logits_all=True, verbose=False
    )
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)], np.float32)
    finally:
        model.close()


@dataclass
class Case:
    name: str
    path: Path
    model: Model
    reference: Any
    ids: list[int]


@pytest.fixture(scope="module")
def formats_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module", params=list(FILE_TYPES))
def case(request: pytest.FixtureRequest, real_model: Path, formats_folder: Path) -> Iterator[Case]:
    path = make_format(request.param, real_model, formats_folder)
    with Model(path, context_size=2048, activations="exact") as model:
        ids = model.tokenize(PASSAGE.read_text())[:640]
        assert len(ids) >= 400
        config = model.config
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        reference = transformers_model(config, reference_weights(path, heads))
        yield Case(request.param, path, model, reference, ids)


def test_logits(case: Case, record_property: Any) -> None:
    ours = case.model.forward(np.array([case.ids]), all_positions=True)[0]
    reference = transformers_logits(case.reference, case.ids)[0]
    error, divergence = nmse(ours, reference), mean_divergence(reference, ours)
    theirs = llama_cpp_logits(case.path, case.ids)
    their_divergence = mean_divergence(reference, theirs)
    figures = (
        f"{case.name}: NMSE {error:.2e}, KL {divergence:.2e}; "
        f"llama.cpp NMSE {nmse(theirs, reference):.2e}, KL {their_divergence:.2e}"
    )
    record_property("figures", figures)
    print(figures)
    assert error <= NMSE_BOUND.get(case.name, 5e-4)
    # Both are near the noise of float32 itself where the weights are floats.
    assert divergence <= max(their_divergence, 2e-6)

    with Model(case.path, context_size=1024) as model:
        fast = model.forward(np.array([case.ids]), all_positions=True)[0]
    if case.name == "F32":
        assert np.array_equal(fast.view(np.uint32), ours.view(np.uint32))
        return
    error, divergence = nmse(fast, reference), mean_divergence(reference, fast)
    figures = f"{case.name} fast: NMSE {error:.2e}, KL {divergence:.2e}"
    record_property("figures_fast", figures)
    print(figures)
    assert error <= NMSE_BOUND.get(case.name, 5e-4)
    assert divergence <= their_divergence / 2


def test_greedy_continuation(case: Case) -> None:
    """Each of 64 greedy tokens is the reference's own choice, or one it cannot tell from it."""
    prompt = case.ids[:40]
    result = case.model.generate(
        case.model.detokenize(prompt), max_tokens=64, temperature=0.0, logprobs=True
    )
    assert result.logprobs is not None
    tokens = [entry.id for entry in result.logprobs]
    assert len(tokens) == 64 or result.finish_reason == "stop"
    logits = transformers_logits(case.reference, prompt + tokens)[0, len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(tokens)), tokens]
    # BF16 rounds what others keep; 0.05 is a tenth of the usual gap between the first two.
    assert (logits.max(axis=-1) - chosen <= (0.05 if case.name == "BF16" else 0.01)).all()
