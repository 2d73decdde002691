"""Where downloaded models lie: smolrun's own cache, and the Hub's cache read without its library.

The layout of the Hub's cache is public: models--USER--NAME with refs/main, blobs, snapshots/COMMIT,
where a file of a snapshot is a link to a blob (or the blob itself where links are not supported).
Reading it here keeps the Hub's library, and any network, out of the start of a cached model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QUANT_PATTERN = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|FP?16|FP?32))$", re.IGNORECASE
)
RUNNABLE_MODEL_TYPES = ("llama", "smollm3")


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine: the name that runs it, where it lies, and its size."""

    name: str  # e.g. "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:Q8_0"; `resolve` accepts it
    path: Path  # a .gguf, or a folder with config.json and .safetensors
    size_bytes: int
    modified: float  # seconds since the epoch
    origin: str  # "hub" or "index"


def cache_folder() -> Path:
    """Folder of what smolrun downloads itself: SMOLRUN_CACHE, else the system's cache folder."""
    if chosen := os.environ.get("SMOLRUN_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "smolrun"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "smolrun"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "smolrun" / "Cache"
    return Path.home() / ".cache" / "smolrun"


def hub_folder() -> Path:
    """Folder of the Hub's cache: HF_HUB_CACHE, else HF_HOME/hub, else the Hub's own default."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if chosen := os.environ.get(variable):
            return Path(os.path.expandvars(chosen)).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def quant_of(filename: str) -> str | None:
    """The quantization a GGUF file's name ends in, upper case ("Q4_K_M"), or None."""
    match = QUANT_PATTERN.search(filename.removesuffix(".gguf"))
    if match is None:
        return None
    return match[1].upper().replace("FP16", "F16").replace("FP32", "F32")


def snapshots(repo: str) -> list[Path]:
    """The snapshot folders of a Hub repository in the cache, the one `main` points at first."""
    return _snapshots(hub_folder() / ("models--" + repo.replace("/", "--")))


def _snapshots(folder: Path) -> list[Path]:
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        main = ""
    return sorted(found, key=lambda path: path.name != main)


def complete_safetensors(folder: Path) -> bool:
    """Whether a folder holds config, tokenizer and every shard that its index names."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = {str(shard) for shard in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    # A shard is a name in this folder; anything else is not looked for, and so never "complete".
    return all("/" not in s and "\\" not in s and (folder / s).is_file() for s in shards)


def cached_models() -> list[CachedModel]:
    """Every runnable model in both caches, by name.

    Hub repositories count where they hold a .gguf, or .safetensors of a model type that smolrun
    runs.
    """
    found = list(_own_models())
    try:
        repositories = sorted(hub_folder().glob("models--*--*"))
    except OSError:
        repositories = []
    for folder in repositories:
        repo = folder.name.removeprefix("models--").replace("--", "/")
        seen: set[str] = set()
        for snapshot in _snapshots(folder):
            for model in _snapshot_models(repo, snapshot):
                if model.name not in seen:
                    seen.add(model.name)
                    found.append(model)
    return sorted(found, key=lambda model: model.name.lower())


def _own_models() -> Iterator[CachedModel]:
    folder = cache_folder() / "models"
    if folder.is_dir():
        for path in folder.glob("*.gguf"):
            status = path.stat()
            yield CachedModel(path.stem, path, status.st_size, status.st_mtime, "index")


def _snapshot_models(repo: str, snapshot: Path) -> Iterator[CachedModel]:
    ggufs = sorted(path for path in snapshot.rglob("*.gguf") if path.is_file())
    quants = [quant_of(path.name) for path in ggufs]
    for path, quant in zip(ggufs, quants, strict=True):
        unique = quant is not None and quants.count(quant) == 1
        name = f"{repo}:{quant}" if unique else f"{repo}/{path.relative_to(snapshot).as_posix()}"
        status = path.stat()
        yield CachedModel(name, path, status.st_size, status.st_mtime, "hub")
    if complete_safetensors(snapshot) and _model_type(snapshot) in RUNNABLE_MODEL_TYPES:
        files = [path.stat() for path in snapshot.iterdir() if path.is_file()]
        size = sum(status.st_size for status in files)
        modified = max(status.st_mtime for status in files)
        yield CachedModel(repo, snapshot, size, modified, "hub")


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    value = config.get("model_type") if isinstance(config, dict) else None
    return value if isinstance(value, str) else None


def remove_cached(model: CachedModel) -> int:
    """Delete a model of `cached_models` from its cache; the bytes that came free.

    A file of the Hub's cache goes from every snapshot, its blob with it, and a repository with no
    file left goes whole.
    """
    if model.origin == "index":
        freed = model.path.stat().st_size
        model.path.unlink()
        return freed
    snapshot = next(p for p in (model.path, *model.path.parents) if p.parent.name == "snapshots")
    repository = snapshot.parent.parent
    before = _folder_bytes(repository)
    if model.path.is_dir():
        pointers = [path for path in model.path.iterdir() if path.is_file()]
        pointers = [path for path in pointers if path.suffix != ".gguf"]
    else:
        inside = model.path.relative_to(snapshot)
        pointers = [p / inside for p in snapshot.parent.iterdir() if (p / inside).is_file()]
    blobs = {pointer.resolve() for pointer in pointers}
    for pointer in pointers:
        pointer.unlink()
    left = [p for p in snapshot.parent.rglob("*") if p.is_file() or p.is_symlink()]
    if not left:
        shutil.rmtree(repository)
        return before
    for blob in blobs - {path.resolve() for path in left}:
        if blob.parent == (repository / "blobs").resolve():
            blob.unlink(missing_ok=True)
    return before - _folder_bytes(repository)


def _folder_bytes(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_size for path in files)
