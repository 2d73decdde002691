"""Opening models: names, types, templates and settings agree with the files they come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from smolrun.errors import ModelFormatError, ModelNotFoundError
from smolrun.files.checkpoint import Checkpoint, Dtype, open_checkpoint
from smolrun.files.dtypes import converted
from smolrun.quant.blocks import tensor_values
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

from .images import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCABULARY,
    Tensors,
    changed_gguf,
    tiny_config,
    tiny_gguf,
    tiny_safetensors,
)


def write_folder(root: Path, **config: object) -> Path:
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps({**tiny_config(), **config}))
    (root / "model.safetensors").write_bytes(tiny_safetensors().to_bytes())
    return root


def open_gguf(path: Path, content: bytes) -> Checkpoint:
    path.write_bytes(content)
    return open_checkpoint(path)


# -- against golden data ----------------------------------------------------------------------


def test_gguf_and_safetensors_of_one_model_are_equal(shared_data: Path) -> None:
    """The q and k rows that llama.cpp interleaved are told apart, in NoPE layers too."""
    folder = open_checkpoint(shared_data / "tiny-smollm3")
    file = open_checkpoint(shared_data / "tiny-smollm3/tiny-smollm3-bf16.gguf")
    assert folder.config == file.config
    assert folder.tensors.keys() == file.tensors.keys()
    for name, tensor in folder.tensors.items():
        np.testing.assert_array_equal(
            tensor_values(tensor), tensor_values(file.tensors[name]), name
        )
    interleaved = {name for name, t in file.tensors.items() if t.interleaved_head_dim}
    assert len(interleaved) == 2 * 8
    assert {file.tensors[name].interleaved_head_dim for name in interleaved} == {64}
    assert not any(tensor.interleaved_head_dim for tensor in folder.tensors.values())


def test_what_a_folder_says(shared_data: Path) -> None:
    root = shared_data / "tiny-smollm3"
    checkpoint = open_checkpoint(root)
    assert checkpoint.format == "safetensors"
    assert checkpoint.name == "tiny-smollm3"
    assert checkpoint.chat_template == (root / "chat_template.jinja").read_text()
    assert checkpoint.generation["eos_token_id"] == 2051
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.json == (root / "tokenizer.json").read_bytes()
    assert (checkpoint.tokenizer.bos_token_id, checkpoint.tokenizer.eos_token_id) == (None, 2051)
    assert checkpoint.file_bytes == (root / "model.safetensors").stat().st_size


def test_what_a_gguf_says(shared_data: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "tiny-smollm3/tiny-smollm3-Q4_K_M.gguf")
    assert checkpoint.format == "gguf"
    assert checkpoint.name == "Tiny Smollm3"
    assert checkpoint.chat_template is not None
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.pre_tokenizer == "smaug-bpe"
    assert not checkpoint.tokenizer.add_bos_token
    kinds = {tensor.type for tensor in checkpoint.tensors.values()}
    assert kinds == {WeightType.F32, WeightType.Q4_K, WeightType.Q6_K}
    assert checkpoint.tensors["model.embed_tokens.weight"].type is WeightType.Q6_K


# -- GGUF -------------------------------------------------------------------------------------


def test_tied_and_untied(tmp_path: Path) -> None:
    tied = open_gguf(tmp_path / "tied.gguf", tiny_gguf().to_bytes())
    assert tied.config.tie_word_embeddings
    assert "lm_head.weight" not in tied.tensors

    def untie(tensors: Tensors) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    untied = open_gguf(tmp_path / "untied.gguf", changed_gguf(tensors=untie).to_bytes())
    assert not untied.config.tie_word_embeddings
    assert untied.tensors["lm_head.weight"].shape == (len(VOCABULARY), HIDDEN)


def test_biases(tmp_path: Path) -> None:
    """Biases are found by their tensors, and those of q and k put in order like the rows."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    widths = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": HIDDEN}
    ffn_widths = {"ffn_gate": FFN, "ffn_up": FFN, "ffn_down": HIDDEN}

    def add(tensors: Tensors) -> None:
        for name, width in {**widths, **ffn_widths}.items():
            values = np.arange(width, dtype=np.float32)
            tensors[f"blk.0.{name}.bias"] = ("F32", (width,), values.tobytes())

    checkpoint = open_gguf(tmp_path / "biases.gguf", changed_gguf(tensors=add).to_bytes())
    assert checkpoint.config.attention_bias
    assert checkpoint.config.mlp_bias
    # Row 2i+j of a head in the file is row j*D/2+i in order.
    head = np.concatenate([np.arange(0, HEAD_DIM, 2), np.arange(1, HEAD_DIM, 2)])
    expected = np.concatenate([head + HEAD_DIM * number for number in range(HEADS)])
    layer = "model.layers.0.self_attn"
    found = tensor_values(checkpoint.tensors[f"{layer}.q_proj.bias"])
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    found = tensor_values(checkpoint.tensors[f"{layer}.v_proj.bias"])
    np.testing.assert_array_equal(found, np.arange(kv))


def test_sampling_settings(tmp_path: Path) -> None:
    image = changed_gguf(
        {"general.sampling.temp": ("f32", 0.5), "general.sampling.top_k": ("i32", 40)}
    )
    checkpoint = open_gguf(tmp_path / "a.gguf", image.to_bytes())
    assert checkpoint.generation == {"temperature": 0.5, "top_k": 40}


def test_a_name_that_a_terminal_would_obey_is_not_used(tmp_path: Path) -> None:
    image = changed_gguf({"general.name": ("string", "\x1b[2Jgone")})
    assert open_gguf(tmp_path / "plain.gguf", image.to_bytes()).name == "plain"


# -- folders ----------------------------------------------------------------------------------


def test_a_head_that_is_absent_is_tied_whatever_the_config_says(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder(tmp_path / "m", tie_word_embeddings=False))
    assert checkpoint.config.tie_word_embeddings


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_copy_of_a_tied_head(same: bool, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m")
    image = tiny_safetensors()
    head = image.data[: len(VOCABULARY) * HIDDEN * 4]
    end = len(image.data)
    entry = {**image.header["model.embed_tokens.weight"], "data_offsets": [end, end + len(head)]}
    image.header["lm_head.weight"] = entry
    image.data += head if same else head[::-1]
    (root / "model.safetensors").write_bytes(image.to_bytes())
    if same:
        assert "lm_head.weight" not in open_checkpoint(root).tensors
    else:
        with pytest.raises(ModelFormatError, match="tie_word_embeddings"):
            open_checkpoint(root)


def test_where_the_chat_template_comes_from(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m")
    (root / "tokenizer.json").write_text("{}")
    assert open_checkpoint(root).chat_template is None
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    config = root / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "T"}))
    assert open_checkpoint(root).chat_template == "T"
    config.write_text(json.dumps({"chat_template": named}))
    assert open_checkpoint(root).chat_template == "D"
    (root / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert open_checkpoint(root).chat_template == "J"
    (root / "chat_template.jinja").write_text("F")
    assert open_checkpoint(root).chat_template == "F"


def test_special_tokens_of_a_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m")
    added = [{"id": 3, "content": "<end>"}, {"id": 4, "content": "<pad>"}]
    (root / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    config = {
        "bos_token": {"content": "<begin>", "lstrip": False},
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": None,
        "add_bos_token": True,
        "added_tokens_decoder": {"1": {"content": "<begin>"}},
    }
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    data = open_checkpoint(root).tokenizer
    assert data is not None
    ids = (data.bos_token_id, data.eos_token_id, data.pad_token_id, data.unk_token_id)
    assert ids == (1, 3, 4, None)
    assert data.add_bos_token


def test_what_a_path_may_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m")
    assert open_checkpoint(root / "model.safetensors").config == open_checkpoint(root).config
    (root / "model.safetensors").rename(root / "weights.safetensors")
    assert open_checkpoint(str(root)).path.name == "weights.safetensors"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "a.gguf").write_bytes(tiny_gguf().to_bytes())
    assert open_checkpoint(alone).format == "gguf"
    (alone / "b.gguf").write_bytes(tiny_gguf().to_bytes())
    with pytest.raises(ModelNotFoundError, match=r"a\.gguf, b\.gguf"):
        open_checkpoint(alone)
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ModelFormatError, match="suffix"):
        open_checkpoint(tmp_path / "model.txt")
    for missing in ("nothing", "nothing.gguf", "nothing.safetensors"):
        with pytest.raises(ModelNotFoundError, match=missing):
            open_checkpoint(tmp_path / missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match="no model"):
        open_checkpoint(tmp_path / "empty")
    (root / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        open_checkpoint(root)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    root = write_folder(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (root / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    open_checkpoint(root)
    # The bytes of an object that, read as PyTorch reads its files, would create the canary.
    program = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    (root / "pytorch_model.bin").write_bytes(program)
    (root / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"pytorch_model\.bin"):
        open_checkpoint(root)
    assert not canary.exists()


def test_close_lets_go_of_the_files(tmp_path: Path) -> None:
    checkpoint = open_gguf(tmp_path / "a.gguf", tiny_gguf().to_bytes())
    view = checkpoint.tensors["model.norm.weight"].data
    checkpoint.close()
    assert not checkpoint.tensors
    assert view.size == HIDDEN * 4  # a view that lives on stays valid
    assert view.any()


# -- dtype ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dtype_converts_matrices_only(dtype: Dtype, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "m")
    checkpoint = open_checkpoint(root, dtype)
    for tensor in checkpoint.tensors.values():
        matrix = len(tensor.shape) == 2
        assert tensor.type.value == (dtype.upper() if matrix else "F32")
    file = open_gguf(tmp_path / "a.gguf", tiny_gguf().to_bytes())
    path = file.path
    types = {name: tensor.type for name, tensor in open_checkpoint(path, dtype).tensors.items()}
    for name, tensor in file.tensors.items():
        kept = not tensor.type.is_float or len(tensor.shape) == 1
        assert types[name].value == (tensor.type.value if kept else dtype.upper())


def float_tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    data = values.astype(np.float32).view(np.uint8).reshape(-1)
    return Tensor("x", WeightType.F32, values.shape, data, "model: x")


def test_rounding_to_float16_and_back() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=100_000).astype(np.float32) * np.float32(10) ** random.integers(
        -9, 4, 100_000
    ).astype(np.float32)
    tensor = converted(float_tensor(values), WeightType.F16)
    np.testing.assert_array_equal(tensor.data.view(np.float16), values.astype(np.float16))
    back = converted(tensor, WeightType.F32)
    np.testing.assert_array_equal(back.data.view(np.float32), values.astype(np.float16))


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    """Against a definition by search: the nearest of the two neighbours, ties to the even one."""
    random = np.random.default_rng(4)
    bits = random.integers(0, 1 << 32, 100_000, np.uint64).astype(np.uint32)
    ties = (bits[:1000] & 0xFFFF0000) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    found = converted(float_tensor(values), WeightType.BF16).data.view(np.uint16)
    lower = values.view(np.uint32) >> 16
    exact = values.astype(np.float64)
    down = (lower << 16).view(np.float32).astype(np.float64)
    up = ((lower + 1) << 16).view(np.float32).astype(np.float64)
    nearer_up = np.abs(up - exact) < np.abs(exact - down)
    tie = np.abs(up - exact) == np.abs(exact - down)
    expected = lower + (nearer_up | (tie & (lower % 2 == 1)))
    np.testing.assert_array_equal(found, expected.astype(np.uint16))


@pytest.mark.parametrize("target", [WeightType.F16, WeightType.BF16, WeightType.F32])
def test_numbers_that_are_none_stay_so(target: WeightType) -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    values.view(np.uint32)[1] = 0x7F800001  # a NaN whose upper half is an infinity's
    tensor = converted(float_tensor(values), target)
    found = tensor_values(tensor)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(np.signbit(found[2:]), np.signbit(values[2:]))


@pytest.mark.parametrize(
    ("target", "value"), [(WeightType.F16, 70_000.0), (WeightType.BF16, 3.4e38)]
)
def test_overflow_names_the_tensor(target: WeightType, value: float, tmp_path: Path) -> None:
    values = np.zeros(5, np.float32)
    values[3] = value
    with pytest.raises(ModelFormatError, match=r"model: x.*too large for"):
        converted(float_tensor(values), target)


def test_an_unknown_dtype_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype"):
        open_checkpoint(tmp_path, "int8")  # type: ignore[arg-type]
