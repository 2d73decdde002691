"""A model's files, opened and checked: configuration, tensors, tokenizer, template, settings."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from smolrun.errors import ModelFormatError, ModelNotFoundError
from smolrun.files.dtypes import converted
from smolrun.files.gguf import GgufFile
from smolrun.files.gguf_names import canonical_name, is_interleaved
from smolrun.files.mapping import MappedFile, read_json_file, shown
from smolrun.files.safetensors import SafetensorsFile, open_shards
from smolrun.files.tokenizer_data import (
    TokenizerData,
    folder_chat_template,
    folder_tokenizer,
    gguf_chat_template,
    gguf_tokenizer,
)
from smolrun.model.config import ModelConfig
from smolrun.model.llama import build
from smolrun.quant.tensor import Tensor
from smolrun.quant.types import WeightType

__all__ = ["Checkpoint", "Dtype", "TokenizerData", "open_checkpoint"]

Dtype = Literal["auto", "f32", "f16", "bf16"]
_DTYPES = {"f32": WeightType.F32, "f16": WeightType.F16, "bf16": WeightType.BF16}

_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_COMPARED_BYTES = 8 << 20
_FORMATS = "smolrun reads .gguf files, and .safetensors files beside a config.json"

# GGUF key: (name in generation_config.json)
_GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# Sampling setting: (lowest, highest, whole number)
_SAMPLING_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 1e3, False),
    "top_k": (0, 1 << 31, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (1e-3, 1e3, False),
}


@dataclass
class Checkpoint:
    """A model's files. The tensors are views of mapped files and agree with the configuration."""

    path: Path
    format: Literal["gguf", "safetensors"]
    config: ModelConfig
    tensors: dict[str, Tensor]  # by canonical name
    tokenizer: TokenizerData | None
    chat_template: str | None
    generation: dict[str, object]  # generation_config.json, or the same names from GGUF; else {}
    metadata: Mapping[str, object]  # of the GGUF file, or config.json
    file_bytes: int  # of all tensor files
    name: str
    files: list[MappedFile] = field(default_factory=list)
    # How a GGUF file stores its metadata, as in GgufFile.types; else {}.
    metadata_types: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that the files lie in."""
        return self.path if self.path.is_dir() else self.path.parent

    def file_of(self, tensor: Tensor) -> MappedFile | None:
        """The mapped file that a tensor's bytes lie in; None for bytes in memory."""
        address = tensor.data.ctypes.data
        for file in self.files:
            start = file.bytes.ctypes.data
            if start <= address < start + file.size:
                return file
        return None

    def drop_vocabulary(self) -> None:
        """Forget the tokenizer's lists, 45 MB for SmolLM3, once a tokenizer was built from them."""
        self.tokenizer = None
        self.metadata = {
            key: value for key, value in self.metadata.items() if not isinstance(value, list)
        }

    def close(self) -> None:
        """Forget the tensors; the files stay mapped while a view of them lives elsewhere."""
        self.tensors = {}
        for file in self.files:
            file.close()
        self.files = []


def open_checkpoint(path: str | Path, dtype: Dtype = "auto") -> Checkpoint:
    """Open a model: a .gguf file, a .safetensors file beside its config.json, or a folder.

    Args:
        path: what to open. Of a folder with safetensors, model.safetensors comes before the index
            of a sharded model; a folder may hold a single GGUF file instead.
        dtype: the type that float matrices are held in: as stored ("auto"), or rounded to the
            nearest. Vectors and quantized weights stay as they are.

    Raises:
        ModelNotFoundError: there is nothing at `path`, or no model in it.
        ModelFormatError: the files break their format, or contradict each other.
        UnsupportedError: sound files of a kind that smolrun does not run.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype: expected one of {', '.join(get_args(Dtype))}, found {dtype!r}")
    path = Path(path)
    with contextlib.ExitStack() as on_error:
        checkpoint = _open(path, on_error.callback)
        build(checkpoint.config).check(checkpoint.tensors)
        if dtype != "auto":
            _convert(checkpoint, _DTYPES[dtype])
        on_error.pop_all()
    return checkpoint


def _open(path: Path, on_error: Callable[[Callable[[], None]], object]) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, on_error)
    if path.suffix == ".gguf":
        return _open_gguf(path, on_error)
    if path.suffix == ".safetensors":
        shard = _SHARD_NAME.fullmatch(path.name)
        if shard:
            return _open_shards(path.with_name(f"{shard[1]}.safetensors.index.json"), on_error)
        return _open_single(path, on_error)
    if not os.path.lexists(path):
        raise ModelNotFoundError(f"{path}: no such file or folder")
    raise ModelFormatError(f"{path}: expected a model, found suffix {path.suffix!r}; {_FORMATS}")


def _open_folder(folder: Path, on_error: Callable[[Callable[[], None]], object]) -> Checkpoint:
    names = sorted(entry.name for entry in folder.iterdir())
    if "model.safetensors" in names:
        return _open_single(folder / "model.safetensors", on_error)
    if _INDEX in names:
        return _open_shards(folder / _INDEX, on_error)
    for suffix, open_one in ((".safetensors", _open_single), (".gguf", _open_gguf)):
        found = [
            name for name in names if name.endswith(suffix) and not name.startswith("adapter_")
        ]
        if len(found) > 1:
            raise ModelNotFoundError(
                f"{folder}: {len(found)} {suffix} files; name one of {shown(', '.join(found))}"
            )
        if found:
            return open_one(folder / found[0], on_error)
    if any(name.startswith("adapter_") for name in names):
        raise ModelFormatError(f"{folder}: only an adapter; merge it into its base model first")
    unsafe = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if unsafe:
        raise ModelFormatError(
            f"{folder}: {shown(unsafe[0])} is a PyTorch file, which could run any code when "
            f"it is read; {_FORMATS}: fetch the model in one of them"
        )
    raise ModelNotFoundError(f"{folder}: no model in this folder; {_FORMATS}")


# -- GGUF -------------------------------------------------------------------------------------


def _open_gguf(path: Path, on_error: Callable[[Callable[[], None]], object]) -> Checkpoint:
    file = GgufFile.open(path)
    on_error(file.close)
    origin = str(path)
    config = ModelConfig.from_gguf(file.metadata, origin)
    tensors: dict[str, Tensor] = {}
    for tensor in file.tensors.values():
        tensor = _canonical(tensor, config)
        if tensor.name in tensors:
            raise ModelFormatError(f"{tensor.origin}: tensor {tensor.name} stands twice")
        tensors[tensor.name] = tensor
    config = config.with_biases(
        attention=any("self_attn" in name and name.endswith(".bias") for name in tensors),
        mlp=any("mlp" in name and name.endswith(".bias") for name in tensors),
    ).with_tied("lm_head.weight" not in tensors)

    tokenizer = gguf_tokenizer(file)
    if tokenizer is not None and len(tokenizer.tokens) != config.vocab_size:
        raise ModelFormatError(
            f"{path}: tokenizer.ggml.tokens: {len(tokenizer.tokens)} tokens for a vocabulary of "
            f"{config.vocab_size}"
        )
    generation = {
        name: file.metadata[key] for key, name in _GGUF_SAMPLING.items() if key in file.metadata
    }
    name = file.metadata.get("general.name")
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        chat_template=gguf_chat_template(file),
        generation=_checked_sampling(generation, f"{path}: general.sampling"),
        metadata=file.metadata,
        file_bytes=file.file.size,
        name=name if isinstance(name, str) and name and name.isprintable() else path.stem,
        files=[file.file],
        metadata_types=file.types,
    )


def _canonical(tensor: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of a GGUF file under its Hugging Face name, told how its rows stand."""
    name = canonical_name(tensor.name)  # one that the family has not is for Program.check to refuse
    if not is_interleaved(name):
        return tensor.renamed(name)
    if len(tensor.shape) > 1:
        return replace(tensor, name=name, interleaved_head_dim=config.head_dim)
    return replace(tensor, name=name, data=_bias_in_order(tensor, config.head_dim))


def _bias_in_order(tensor: Tensor, head_dim: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a q or k bias, as small as they are, put in the order of Hugging Face files."""
    (width,) = tensor.shape
    if width % head_dim or not tensor.type.is_float:
        return tensor.data  # for Program.check to refuse
    heads = tensor.data.reshape(width // head_dim, head_dim // 2, 2, tensor.type.block_bytes)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(-1)


# -- safetensors ------------------------------------------------------------------------------


def _open_single(path: Path, on_error: Callable[[Callable[[], None]], object]) -> Checkpoint:
    file = SafetensorsFile.open(path)
    on_error(file.close)
    return _from_safetensors(path, [file])


def _open_shards(index: Path, on_error: Callable[[Callable[[], None]], object]) -> Checkpoint:
    shards = open_shards(index)
    for shard in shards:
        on_error(shard.close)
    return _from_safetensors(index, shards)


def _from_safetensors(path: Path, files: list[SafetensorsFile]) -> Checkpoint:
    folder = path.parent
    config_path = folder / "config.json"
    values = read_json_file(config_path)
    if values is None:
        raise ModelNotFoundError(
            f"{config_path}: no such file; safetensors need the model's config.json beside them"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise ModelFormatError(f"{tensor.origin}: the tensor stands in two files")
            tensors[name] = tensor
    config = ModelConfig.from_hugging_face(values, str(config_path))
    # The file decides: without an output head of its own, the embedding serves as one.
    if "lm_head.weight" not in tensors:
        config = config.with_tied(True)
    elif config.tie_word_embeddings:
        _drop_tied_copy(tensors)
    generation_path = folder / "generation_config.json"
    generation = read_json_file(generation_path) or {}
    return Checkpoint(
        path=path if len(files) == 1 else folder,
        format="safetensors",
        config=config,
        tensors=tensors,
        tokenizer=folder_tokenizer(folder),
        chat_template=folder_chat_template(folder),
        generation=_checked_sampling(generation, str(generation_path)),
        metadata=values,
        file_bytes=sum(file.file.size for file in files),
        name=folder.resolve().name,
        files=[file.file for file in files],
    )


def _drop_tied_copy(tensors: dict[str, Tensor]) -> None:
    """Leave out a stored output head that the configuration calls tied to the embedding.

    Some tools write it all the same. ModelFormatError if it is not the same, bit for bit.
    """
    head, embedding = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if embedding is None:
        return
    same = head.type is embedding.type and head.shape == embedding.shape
    for begin in range(0, head.data.size if same else 0, _COMPARED_BYTES):
        piece = slice(begin, begin + _COMPARED_BYTES)
        same = same and np.array_equal(head.data[piece], embedding.data[piece])
    if not same:
        raise ModelFormatError(
            f"{head.origin}: differs from model.embed_tokens.weight although "
            "tie_word_embeddings says that they are one; correct config.json"
        )
    del tensors["lm_head.weight"]


# -- both -------------------------------------------------------------------------------------


def _checked_sampling(values: dict[str, Any], origin: str) -> dict[str, object]:
    """The settings, those that smolrun uses checked for kind and range; null ones left out."""
    settings = {key: value for key, value in values.items() if value is not None}
    for key, (low, high, whole) in _SAMPLING_RANGES.items():
        value = settings.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not number
            or not math.isfinite(value)
            or not low <= value <= high
            or (whole and value != int(value))
        ):
            raise ModelFormatError(
                f"{origin}: {key}: expected a {'whole ' if whole else ''}number from {low:g} to "
                f"{high:g}, found {shown(value)}"
            )
    return settings


def _convert(checkpoint: Checkpoint, target: WeightType) -> None:
    """Round the float matrices to another type, one by one, giving the file's pages back."""
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) < 2 or not tensor.type.is_float or tensor.type is target:
            continue
        checkpoint.tensors[name] = converted(tensor, target)
        file = checkpoint.file_of(tensor)
        if file is not None:
            file.drop(tensor.data)
