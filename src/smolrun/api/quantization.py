"""Quantizing a model from Python."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from smolrun.engine.machine import choose_threads
from smolrun.errors import RequestError
from smolrun.files.convert import Progress
from smolrun.files.imatrix import read_imatrix
from smolrun.files.names import resolve
from smolrun.files.quantize import Quantized, Substitution, quantize_files
from smolrun.quant.mixes import find_mix
from smolrun.quant.types import WeightType

__all__ = ["Quantized", "Substitution", "quantize"]


def quantize(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    type: str,
    *,
    tensor_types: Mapping[str, str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Write a model as a GGUF file of smaller weights, as `smolrun quantize` does.

    Args:
        model: a path, an alias or `user/repo[:quant]`; better one that is not quantized yet.
        target: the .gguf file to write; None: NAME.TYPE.gguf in the working folder.
        type: a mix such as "q4_k_m", or a weight type; any case.
        tensor_types: types of single weights, by regular expressions of their GGUF names; the
            first that is found in a name decides, and each must be found in some matrix's.
        imatrix: a file made by `smolrun imatrix` or llama.cpp's `llama-imatrix`.
        strict: raise where a weight can not take its type, instead of giving it another.
        overwrite: replace what is at `target`.
        dry_run: only tell what would be written.
        threads: default: as many as the CPUs, their cores and the cgroup allow.
        progress: called with the bytes of weights written and the bytes in all.

    Raises:
        ModelNotFoundError, DownloadError: there is no such model, or it can not be fetched.
        ModelFormatError, UnsupportedError: it, or the imatrix, is damaged; or `strict` refuses.
        OutputError: `target` is there already, or can not be written.
        RequestError: an argument of the wrong kind.
    """
    try:
        mix = find_mix(type)
        overrides = [
            (pattern, _weight_type(name)) for pattern, name in (tensor_types or {}).items()
        ]
    except (ValueError, AttributeError) as error:
        raise RequestError(f"type: {error}") from error
    for pattern, _ in overrides:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"tensor_types: {pattern!r}: {error}") from error
    return quantize_files(
        resolve(model),
        None if target is None else os.path.expanduser(target),
        mix,
        overrides=overrides,
        importance=None if imatrix is None else read_imatrix(Path(imatrix).expanduser()),
        importance_name="" if imatrix is None else Path(imatrix).name,
        strict=strict,
        overwrite=overwrite,
        dry_run=dry_run,
        threads=choose_threads(threads=threads).value,
        progress=progress,
    )


def _weight_type(name: str) -> WeightType:
    try:
        return WeightType(name.upper())
    except ValueError:
        known = ", ".join(weight_type.value for weight_type in WeightType)
        raise ValueError(f"there is no weight type {name!r}; there are {known}") from None
