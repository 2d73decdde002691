"""Names: paths, aliases, repositories, and what their errors say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.errors import DownloadError, ModelNotFoundError
from smolrun.files import hub as hub_module
from smolrun.files import index, names
from smolrun.files.cache import cache_folder, hub_folder, quant_of
from smolrun.files.hub import SAFETENSORS, HubName, choose_files
from smolrun.files.names import cached_models, looks_like_model, remove, resolve
from tests.files.hub_server import COMMIT, FakeHub, serve
from tests.waiting import SECONDS

CONFIG = json.dumps({"model_type": "llama"}).encode()
UNQUANTIZED = {
    "README.md": b"#",
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"\x80pickle",
    "modeling_custom.py": b"raise SystemExit",
    "onnx/model.safetensors": b"other",
    "model.safetensors": b"weights",
}


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("SMOLRUN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        yield fake
        import huggingface_hub.utils

        getattr(huggingface_hub.utils, "close_session", lambda: None)()


def test_an_existing_path_comes_first(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "a.gguf").touch()
    assert resolve("smollm2-135m") == Path("smollm2-135m")
    assert resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    ("text", "alias", "quant"),
    [
        ("smollm2-135m", "smollm2-135m", None),
        ("SmolLM2-360M-Instruct", "smollm2-360m", None),
        ("smollm2:1.7b", "smollm2-1.7b", None),
        ("smollm3", "smollm3-3b", None),
        ("smollm3-3b:q4_k_m", "smollm3-3b", "Q4_K_M"),
        ("smollm3:q8", "smollm3-3b", "Q8_0"),
        ("smollm3-3b-base", "smollm3-3b-base", None),
        ("smollm-1.7b-base:Q5_K_M", "smollm-1.7b-base", "Q5_K_M"),
        ("smollm2-135m-base:safetensors", "smollm2-135m-base", SAFETENSORS),
    ],
)
def test_aliases(text: str, alias: str, quant: str | None) -> None:
    assert names._as_alias(text) == (alias, quant)


@pytest.mark.parametrize("text", ["smollm2", "smollm2-3b", "smollm4-3b", "smollm3-3b:", "x"])
def test_not_aliases(text: str) -> None:
    assert names._as_alias(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", HubName("a/b")),
        ("a/b:q4_k_m", HubName("a/b", "Q4_K_M")),
        ("hf.co/a/b:Q8_0", HubName("a/b", "Q8_0")),
        ("https://huggingface.co/a/b", HubName("a/b")),
        ("a/b/c.gguf", HubName("a/b", None, "c.gguf")),
        (
            "https://huggingface.co/a/b/resolve/main/sub/c.gguf",
            HubName("a/b", None, "sub/c.gguf"),
        ),
        ("../b", None),
        ("a/../b.gguf", None),
        ("a/b/c", None),
        ("a b/c", None),
    ],
)
def test_repositories(text: str, name: HubName | None) -> None:
    assert names._as_repo(text) == name


@pytest.mark.parametrize(
    ("filename", "quant"),
    [
        ("SmolLM2-135M-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("smollm2-360m-instruct-q8_0.gguf", "Q8_0"),
        ("SmolLM-135M.IQ4_XS.gguf", "IQ4_XS"),
        ("m-fp16.gguf", "F16"),
        ("m-bf16.gguf", "BF16"),
        ("SmolLM3-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("SmolLM2-135M.gguf", None),
    ],
)
def test_quant_of(filename: str, quant: str | None) -> None:
    assert quant_of(filename) == quant


def test_choosing_files() -> None:
    ggufs = ["m-Q8_0.gguf", "m-Q4_K_M.gguf", "mmproj-Q4_0.gguf", "m-F32-00001-of-00002.gguf"]
    assert choose_files(HubName("a/b"), ggufs) == ["m-Q4_K_M.gguf"]
    assert choose_files(HubName("a/b", "Q8_0"), ggufs) == ["m-Q8_0.gguf"]
    with pytest.raises(ModelNotFoundError, match=r"no Q4_0 GGUF; available: Q4_K_M, Q8_0$"):
        choose_files(HubName("a/b", "Q4_0"), ggufs)
    with pytest.raises(ModelNotFoundError, match="no F32"):
        choose_files(HubName("a/b", "F32"), ggufs)
    assert choose_files(HubName("a/b"), list(UNQUANTIZED)) == [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    ]
    sharded = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert choose_files(HubName("a/b"), sharded + shards)[-2:] == shards
    with pytest.raises(ModelNotFoundError, match="it has no GGUF files"):
        choose_files(HubName("a/b"), ["pytorch_model.bin", "config.json"])


def test_a_gguf_from_the_hub(hub: FakeHub) -> None:
    data = bytes(range(256)) * 9000
    hub.repositories["a/b"] = {"m-Q8_0.gguf": b"other", "m-Q4_K_M.gguf": data}
    seen: list[tuple[str, int, int | None]] = []
    path = resolve("a/b:q4_k_m", progress=lambda *values: seen.append(values))
    assert path.read_bytes() == data
    assert seen[-1] == ("m-Q4_K_M.gguf", len(data), len(data))
    asked = len(hub.requests)
    assert resolve("a/b:q4_k_m", offline=True) == path
    assert len(hub.requests) == asked, "a cached model asks no network"
    with pytest.raises(DownloadError, match="offline"):
        resolve("a/b:q8_0", offline=True)
    assert [model.name for model in cached_models()] == ["a/b:Q4_K_M"]
    assert resolve("a/b:q4_k_m", refresh=True) == path
    assert len(hub.requests) > asked


def test_safetensors_from_the_hub_without_pickles_or_code(hub: FakeHub) -> None:
    hub.repositories["a/b"] = UNQUANTIZED
    folder = resolve("a/b")
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    assert found == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not any(".bin" in request or ".py" in request for request in hub.requests)
    assert [model.name for model in cached_models()] == ["a/b"]


def test_a_half_fetched_set_is_not_taken_for_the_model(hub: FakeHub) -> None:
    hub.repositories["a/b"] = UNQUANTIZED
    folder = resolve("a/b")
    (folder / "model.safetensors").unlink()
    assert hub_module.find_cached(HubName("a/b")) is None
    assert (resolve("a/b") / "model.safetensors").is_file()


def test_a_broken_download_goes_on_where_it_stopped(hub: FakeHub) -> None:
    data = bytes(range(256)) * (12 << 12)
    hub.repositories["a/b"] = {"m-Q8_0.gguf": data}
    hub.cuts["m-Q8_0.gguf"] = 11 << 20  # the library counts in pieces of 10 MiB
    seen: list[int] = []
    path = resolve("a/b", progress=lambda what, done, total: seen.append(done))
    assert path.read_bytes() == data
    assert any(request.endswith(f"bytes={10 << 20}-") for request in hub.requests), hub.requests
    assert seen[-1] == len(data)


def test_a_file_with_another_hash_is_removed(hub: FakeHub) -> None:
    hub.repositories["a/b"] = {"m-Q8_0.gguf": b"what the hub lists"}
    hub.lies["m-Q8_0.gguf"] = b"what someone sends"
    with pytest.raises(DownloadError, match="SHA-256"):
        resolve("a/b")
    assert hub_module.find_cached(HubName("a/b")) is None
    assert not any(p.is_file() for p in (hub_folder() / "models--a--b" / "blobs").iterdir())


def test_a_download_too_large_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["a/b"] = {"m-Q8_0.gguf": b"12345"}
    monkeypatch.setattr(hub_module, "MAX_DOWNLOAD_BYTES", 4)
    with pytest.raises(DownloadError, match="at most"):
        resolve("a/b")


def test_the_token_is_sent(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repositories["a/b"] = {"m-Q8_0.gguf": b"12345"}
    resolve("a/b")
    assert hub.tokens == {"Bearer hf_secret"}


def test_errors_of_the_hub(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="no public repository x/y"):
        resolve("x/y")
    hub.gated.add("g/g")
    with pytest.raises(DownloadError, match="accept it on"):
        resolve("g/g")


def test_an_alias_asks_its_repositories_in_turn(hub: FakeHub) -> None:
    official, other = names.ALIASES["smollm2-360m"].ggufs
    hub.repositories[official] = {"smollm2-360m-instruct-q8_0.gguf": b"8 bits"}
    hub.repositories[other] = {"SmolLM2-360M-Instruct-Q4_K_M.gguf": b"4 bits"}
    assert resolve("smollm2-360m").read_bytes() == b"8 bits"
    assert resolve("smollm2-360m:q4_k_m").read_bytes() == b"4 bits"
    with pytest.raises(ModelNotFoundError, match=r"available: Q8_0; .*available: Q4_K_M"):
        resolve("smollm2-360m:q5_0")


def test_the_hub_comes_before_the_package_index(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "fetch_default", None)
    hub.repositories[names.ALIASES["smollm2-135m"].ggufs[0]] = {"m-q8_0.gguf": b"8 bits"}
    assert resolve("smollm2-135m").read_bytes() == b"8 bits"


def test_unreachable_is_said() -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9 can not be reached \(.*refused"):
        resolve("a/b")


@pytest.mark.parametrize("text", ["天" * 400, "~no-such-user", "/" + "x" * 5000, "/a\0b/c.gguf"])
def test_what_no_file_can_be_called(text: str) -> None:
    assert not looks_like_model(text) or text.endswith(".gguf")
    with pytest.raises(ModelNotFoundError):
        resolve(text)


def test_near_names(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2-135m"):
        resolve("smollm2-135")
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"did you mean model-q4\.gguf"):
        resolve("model_q4.gguf")
    with pytest.raises(ModelNotFoundError, match="known: a path"):
        resolve("zzz")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Why is the sky blue?", False),
        ("hello", False),
        ("", False),
        ("smollm2-135m", True),
        ("smollm9", True),
        ("user/repo:q4", True),
        ("missing.gguf", True),
        ("translate a/b", False),
    ],
)
def test_looks_like_model(text: str, expected: bool) -> None:
    assert looks_like_model(text) is expected


def test_removing_one_quantization_keeps_the_other(hub: FakeHub) -> None:
    hub.repositories["a/b"] = {"m-Q8_0.gguf": b"12345678", "m-Q4_0.gguf": b"1234"}
    resolve("a/b:q8_0")
    kept = resolve("a/b:q4_0")
    model, freed = remove("a/b:q8_0")
    assert (model.name, freed) == ("a/b:Q8_0", 8)
    assert kept.read_bytes() == b"1234"
    assert remove("a/b:Q4_0")[1] >= 4
    assert not (hub_folder() / "models--a--b").exists()
    with pytest.raises(ModelNotFoundError, match="nothing is downloaded"):
        remove("a/b:Q4_0")


def test_removing_an_alias_and_a_folder(hub: FakeHub) -> None:
    hub.repositories["HuggingFaceTB/SmolLM-135M-Instruct"] = UNQUANTIZED
    resolve("smollm-135m")
    assert remove("smollm-135m")[0].name == "HuggingFaceTB/SmolLM-135M-Instruct"
    assert cached_models() == []


def test_a_broken_folder_in_the_cache_is_no_model() -> None:
    snapshot = hub_folder() / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "model.safetensors"):
        (snapshot / name).touch()
    for text in ("[" * 100_000, "[]", "\xff", '{"model_type": 5}'):
        (snapshot / "config.json").write_text(text, "latin-1")
        assert cached_models() == []
    (snapshot / "config.json").write_bytes(CONFIG)
    assert len(cached_models()) == 1
    (snapshot / "model.safetensors.index.json").write_text("[" * 100_000)
    assert cached_models() == []


def test_a_link_out_of_the_cache_is_not_followed_when_removing(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_bytes(b"keep me")
    snapshot = hub_folder() / "models--a--b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q8_0.gguf").symlink_to(outside)
    remove("a/b:Q8_0")
    assert outside.read_bytes() == b"keep me"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SMOLRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "smolrun"
    assert hub_folder() == tmp_path / "hf" / "hub"
    monkeypatch.delenv("HF_HOME")
    assert hub_folder() == tmp_path / "xdg" / "huggingface" / "hub"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from smolrun.files import names", ["huggingface_hub", "httpx", "requests", "numpy"]),
        # What a start from a file has no use for.
        (
            "from smolrun import Model; from smolrun.text import chat, sandbox, tokenizer",
            ["subprocess", "socket", "zipfile", "urllib.request", "tokenizers", "asyncio"],
        ),
    ],
)
def test_imports_bring_no_more_than_they_need(statement: str, absent: list[str]) -> None:
    script = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    source = Path(names.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        timeout=SECONDS,
    )
    assert done.stdout.strip() == "[]", done.stderr
