"""Models from the Hugging Face Hub: which files of a repository to fetch, and fetching them.

huggingface_hub does the transfer (resume, tokens, mirrors, its cache) and is imported only here,
inside functions, as is whatever else only a network needs. Only weights, configuration and
tokenizer files are ever asked for: never pickles (.bin, .pt) and never code.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.errors import DownloadError, ModelNotFoundError
from smolrun.files.cache import complete_safetensors, hub_folder, quant_of, snapshots

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

Progress = Callable[[str, int, "int | None"], None]

SAFETENSORS = "SAFETENSORS"  # stands where a quantization's name stands: the unquantized files
# Taken in this order where a repository of GGUF files is named without a quantization.
PREFERRED_QUANTS = (
    "Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "F16", "BF16", "F32",
)  # fmt: skip
SHORT_QUANTS = {
    "Q2": "Q2_K", "Q3": "Q3_K_M", "Q4": "Q4_K_M", "Q5": "Q5_K_M", "Q6": "Q6_K", "Q8": "Q8_0",
    "FP16": "F16", "FP32": "F32",
}  # fmt: skip
MAX_DOWNLOAD_BYTES = 32 << 30  # the largest of the family, SmolLM3-3B in F32, has 12.3 GB
CONNECT_SECONDS = 3.0
LISTING_SECONDS = 6.0

_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubName:
    """What a name asks of the Hub: a repository, and perhaps a quantization or one file."""

    repo: str  # "user/name"
    quant: str | None = None  # upper case, or SAFETENSORS
    filename: str | None = None  # a .gguf inside the repository

    def __str__(self) -> str:
        if self.filename:
            return f"{self.repo}/{self.filename}"
        return f"{self.repo}:{self.quant}" if self.quant else self.repo


class HubUnreachableError(DownloadError):
    """The Hub did not answer at all."""


def canonical_quant(quant: str | None) -> str | None:
    """A quantization as people type it ("q4_k_m", "q8", "fp16"), as file names carry it."""
    if not quant:
        return None
    upper = quant.upper()
    return SHORT_QUANTS.get(upper, upper)


def choose_files(name: HubName, files: Sequence[str]) -> list[str]:
    """The files of a repository that make up one model.

    Raises ModelNotFoundError, with the quantizations that are there, where none fits.
    """
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    ggufs = [f for f in ggufs if not _GGUF_PART.search(f) and not _NOT_MODELS.search(f)]
    if name.filename:
        if name.filename in ggufs:
            return [name.filename]
        raise ModelNotFoundError(f"{name.repo} has no file {name.filename}{_offer(ggufs)}")
    unquantized = _safetensors_files(files)
    if name.quant == SAFETENSORS or (name.quant is None and unquantized):
        if unquantized:
            return unquantized
        raise ModelNotFoundError(f"{name.repo} has no complete set of safetensors{_offer(ggufs)}")
    if name.quant is not None:
        for file in sorted(ggufs, key=lambda file: (file.count("/"), len(file))):
            if quant_of(file) == name.quant:
                return [file]
        extra = "; it has safetensors (:safetensors)" if unquantized else ""
        raise ModelNotFoundError(f"{name.repo} has no {name.quant} GGUF{_offer(ggufs)}{extra}")
    if len(ggufs) == 1:
        return ggufs
    for quant in PREFERRED_QUANTS:
        for file in ggufs:
            if quant_of(file) == quant:
                return [file]
    raise ModelNotFoundError(
        f"{name.repo} has neither config.json with safetensors nor a GGUF that can be chosen"
        f"{_offer(ggufs)}"
    )


def _safetensors_files(files: Sequence[str]) -> list[str]:
    """Weights, configuration and tokenizer at the top of a repository; [] if not a model."""
    top = {file for file in files if "/" not in file}
    if not {"config.json", "tokenizer.json"} <= top:
        return []
    side = [file for file in _SIDE_FILES if file in top]
    if "model.safetensors.index.json" in top:
        shards = sorted(file for file in top if _SHARD.fullmatch(file))
        return side + shards if shards else []
    return [*side, "model.safetensors"] if "model.safetensors" in top else []


def _offer(ggufs: Sequence[str]) -> str:
    quants = sorted({quant_of(file) or file for file in ggufs})
    return f"; available: {', '.join(quants)}" if quants else "; it has no GGUF files"


def find_cached(name: HubName) -> Path | None:
    """The model in the Hub's cache, whole, without asking the Hub; None if it is not there."""
    for snapshot in snapshots(name.repo):
        files = [
            path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()
        ]
        try:
            chosen = choose_files(name, files)
        except ModelNotFoundError:
            continue
        if chosen[0].endswith(".gguf"):
            return snapshot / chosen[0]
        if complete_safetensors(snapshot):
            return snapshot
    return None


def download(name: HubName, progress: Progress | None = None) -> Path:
    """Fetch a model into the Hub's cache; a .gguf, or the folder of its safetensors.

    Raises ModelNotFoundError, DownloadError, or HubUnreachableError within a few seconds.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if reason := unreachable(endpoint):
        raise HubUnreachableError(f"{endpoint} can not be reached ({reason})")
    info = _repository(name, endpoint)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = choose_files(name, list(siblings))
    sizes = {file: int(siblings[file].size or 0) for file in chosen}
    _check_room(name, sum(sizes.values()))
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"endpoint": endpoint, "cache_dir": hub_folder()}
    shows_progress = "tqdm_class" in inspect.signature(hf_hub_download).parameters
    folder: Path | None = None
    path = Path()
    for file in chosen:
        if shows_progress:
            options["tqdm_class"] = _bar_class(file, progress)
        present = find_file(name.repo, info.sha, file)
        try:
            path = Path(hf_hub_download(name.repo, file, revision=info.sha, **options))
        except Exception as error:  # the library passes on errors of its HTTP client, any of them
            raise DownloadError(
                f"{name}: {file} could not be fetched: {_first_line(error)}; try again, files that "
                "came whole are kept"
            ) from error
        if present is None:
            _check_digest(path, siblings[file])
        folder = path.parents[file.count("/")]
    assert folder is not None
    _remember_main(folder, info.sha)
    return path if chosen[0].endswith(".gguf") else folder


def find_file(repo: str, commit: str | None, file: str) -> Path | None:
    """A file of one commit in the Hub's cache."""
    for snapshot in snapshots(repo):
        if snapshot.name == commit and (snapshot / file).is_file():
            return snapshot / file
    return None


def unreachable(endpoint: str) -> str | None:
    """Why the Hub, or the proxy that leads to it, accepts no connection; None if it does.

    A name lookup can hang for longer than any socket timeout, so all of it runs aside and is given
    CONNECT_SECONDS.
    """
    import socket
    import urllib.request
    from urllib.parse import urlsplit

    url = urlsplit(endpoint)
    host, port = url.hostname, url.port or (80 if url.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and host and not urllib.request.proxy_bypass(host):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = address.hostname, address.port or 80
    if host is None:
        return "HF_ENDPOINT is not a URL"
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return outcome[0] if outcome else f"no answer in {CONNECT_SECONDS:g} s"


def _repository(name: HubName, endpoint: str) -> ModelInfo:
    import huggingface_hub.utils

    kinds: Any = huggingface_hub.utils  # every version has its errors here
    try:
        return huggingface_hub.HfApi(endpoint=endpoint).model_info(
            name.repo, timeout=LISTING_SECONDS, files_metadata=True
        )
    except kinds.GatedRepoError as error:
        raise DownloadError(
            f"{name.repo} asks for an agreement: accept it on {endpoint}/{name.repo}, then set "
            "HF_TOKEN to a token of that account"
        ) from error
    except kinds.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no public repository {name.repo} on {endpoint}; check the spelling, or set "
            "HF_TOKEN if it is private"
        ) from error
    except kinds.HFValidationError as error:
        raise ModelNotFoundError(f"{name.repo!r} is not a repository name: {error}") from error
    except kinds.HfHubHTTPError as error:
        raise DownloadError(f"{endpoint} refused {name.repo}: {_first_line(error)}") from error
    except Exception as error:  # errors of the HTTP client, whichever the library uses
        raise HubUnreachableError(f"{endpoint} did not answer: {_first_line(error)}") from error


def _check_room(name: HubName, size: int) -> None:
    if size > MAX_DOWNLOAD_BYTES:
        raise DownloadError(
            f"{name} has {size / 1e9:.1f} GB; smolrun fetches at most "
            f"{MAX_DOWNLOAD_BYTES / 1e9:.0f} GB: this is not a model of the SmolLM family"
        )
    folder = hub_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(
            f"{name} needs {size / 1e9:.1f} GB, {hub_folder()} has {free / 1e9:.1f} GB free; make "
            "room (smolrun list, smolrun rm), or set HF_HOME to another disk"
        )


def _check_digest(path: Path, sibling: Any) -> None:
    """Compare a fetched file with the SHA-256 that the Hub lists (large files have one)."""
    digest = getattr(sibling.lfs, "sha256", None) if sibling.lfs else None
    if digest is None:
        return
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise DownloadError(f"{path.name}: the Hub lists {digest!r} where a SHA-256 was expected")
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() != digest:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name}: fetched bytes have SHA-256 {found.hexdigest()}, the Hub lists {digest}; "
            "the file was removed, try again"
        )


def _remember_main(snapshot: Path, commit: str | None) -> None:
    """Note which commit `main` was, as the library does for downloads that name no commit."""
    reference = snapshot.parent.parent / "refs" / "main"
    if commit and snapshot.name == commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        partial = reference.with_name(f"main.{os.getpid()}")
        partial.write_text(commit, encoding="utf-8")
        os.replace(partial, reference)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _bar_class(file: str, progress: Progress | None) -> type:
    """What the library takes for a tqdm class; reports to `progress` and draws nothing."""

    class Bar:
        def __init__(
            self, *_: object, total: int | None = None, initial: int = 0, **__: object
        ) -> None:
            self.total, self.n = total, initial

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            if progress is not None:
                progress(file, self.n, self.total)

        def close(self) -> None: ...

        def refresh(self, *_: object, **__: object) -> None: ...

        def set_description(self, *_: object, **__: object) -> None: ...

        def set_postfix_str(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    return Bar
