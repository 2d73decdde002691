"""Converting a model from Python."""

from __future__ import annotations

import os
from typing import get_args

from smolrun.errors import RequestError
from smolrun.files.checkpoint import Checkpoint, Dtype
from smolrun.files.convert import Converted, Progress, convert_files
from smolrun.files.names import resolve
from smolrun.quant.types import WeightType
from smolrun.text.tokenizer import Tokenizer

__all__ = ["Converted", "convert"]


def convert(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: Dtype = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a model as a GGUF file or as a safetensors folder, as `smolrun convert` does.

    Args:
        model: a path, an alias or `user/repo[:quant]`.
        target: a name that ends in .gguf, or a folder.
        dtype: of the matrices; "auto" keeps float ones as they are, and makes quantized ones f32,
            which holds them exactly.
        overwrite: replace what is at `target`.
        progress: called with the bytes of weights written and the bytes in all.

    Raises:
        ModelNotFoundError, DownloadError: there is no such model, or it can not be fetched.
        ModelFormatError, UnsupportedError: it is damaged, or can not be said in the other format.
        OutputError: `target` is there already, or can not be written.
        RequestError: an argument of the wrong kind.
    """
    if dtype not in get_args(Dtype):
        raise RequestError(f"dtype: expected one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if not isinstance(target, (str, os.PathLike)) or not isinstance(os.fspath(target), str):
        raise RequestError(f"target: expected a path, got {target!r:.80}")
    weight_type = None if dtype == "auto" else WeightType(dtype.upper())
    return convert_files(
        resolve(model),
        os.path.expanduser(target),
        weight_type,
        overwrite=overwrite,
        progress=progress,
        check=_check_tokenizer,
    )


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuses a tokenizer that contradicts itself, which is not to be written again."""
    if checkpoint.tokenizer is not None:
        Tokenizer(checkpoint.tokenizer, checkpoint.config.vocab_size)
