"""show, tokenize, render, doctor, pull, list and rm, on real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from smolrun.cli.main import main
from smolrun.files.names import cached_models
from tests.cli.fakes import stdin_of


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_show(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(run(capsys, "show", str(tiny), "--json"))
    header = tiny / "model.safetensors"
    with header.open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    weights = sum(int(np.prod(entry["shape"])) for entry in entries.values())
    assert sum(entry["weights"] for entry in values["weights"]) == weights
    assert values["bits_per_weight"] == 32
    assert values["num_parameters"] == weights
    config = json.loads((tiny / "config.json").read_text())
    per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
    per_token *= 2 * values["config"]["head_dim"] + 4
    memory = {entry["context_size"]: entry for entry in values["memory"]}
    assert memory[8192]["kv_bytes"] == 8192 * per_token
    assert memory[8192]["total_bytes"] == 8192 * per_token + 4 * weights
    text = run(capsys, "show", str(tiny))
    assert "without RoPE" in text
    assert "can think" in text
    assert f"{weights:,}" in text
    assert run(capsys, "show", str(tiny), "--program").count("norm_qkv") == len(
        values["config"]["no_rope_layers"]
    )
    assert "im_start" in run(capsys, "show", "-m", str(tiny), "--template")


def test_show_of_a_mixed_gguf(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared_data / "tiny-smollm3" / "tiny-smollm3-Q4_K_M.gguf"
    values = json.loads(run(capsys, "show", str(path), "--json"))
    assert {"Q4_K", "Q6_K", "F32"} <= {entry["type"] for entry in values["weights"]}
    size = sum(entry["bytes"] for entry in values["weights"])
    assert values["bits_per_weight"] == pytest.approx(8 * size / values["num_parameters"])
    assert 4.5 < values["bits_per_weight"] < 7
    types = {entry["name"]: entry["type"] for entry in values["tensors"]}
    fields = gguf.GGUFReader(path).tensors
    assert len(types) == len(fields)
    assert types["model.embed_tokens.weight"] == next(
        field.tensor_type.name for field in fields if field.name == "token_embd.weight"
    )
    listed = [line.split()[:2] for line in run(capsys, "show", str(path), "--tensors").splitlines()]
    assert listed[1:] == [[name, kind] for name, kind in types.items()]


def test_tokenize(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer

    oracle = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "The sky is ünïcödé <|im_end|>"
    ids = oracle.encode(text, add_special_tokens=False).ids
    shown = run(capsys, "tokenize", str(tiny), text)
    assert shown == " ".join(map(str, ids)) + "\n"
    assert run(capsys, "tokenize", str(tiny), "--decode", *shown.split()) == text + "\n"
    assert run(capsys, "tokenize", str(tiny), "--count", text) == f"{len(ids)}\n"
    tokens = json.loads(run(capsys, "tokenize", str(tiny), "--json", "The sky"))
    assert "".join(token["text"] for token in tokens) == "The sky"
    assert "'The'" in run(capsys, "tokenize", str(tiny), "--pieces", "The sky")
    plain = run(capsys, "tokenize", str(tiny), "--no-special", text).split()
    assert len(plain) > len(ids)
    monkeypatch.setattr("sys.stdin", stdin_of(b"two\nlines\n"))
    shown = run(capsys, "tokenize", str(tiny))
    assert run(capsys, "tokenize", str(tiny), "--decode", *shown.split()) == "two\nlines\n\n"
    assert main(["tokenize", str(tiny), "--decode", "x"]) == 2


def test_render(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "render", str(tiny), "-s", "S", "hello")
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert run(capsys, "render", str(tiny), "--no-think", "hi").endswith("<think>\n\n</think>\n")
    assert "assistant" not in run(capsys, "render", str(tiny), "--no-generation-prompt", "hi")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("m.json").write_text(json.dumps(messages))
    text = run(capsys, "render", str(tiny), "--messages", "m.json", "c")
    assert [part.split("\n")[1] for part in text.split("<|im_start|>")[1:4]] == [
        f"{word}<|im_end|>" for word in "abc"
    ]
    ids = run(capsys, "render", str(tiny), "--ids", "hi").split()
    assert run(capsys, "tokenize", str(tiny), "--decode", *ids) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\n"
    )
    Path("m.json").write_text("[" * 100_000)
    assert main(["render", str(tiny), "--messages", "m.json"]) == 2
    Path("m.json").write_text("3")
    assert main(["render", str(tiny), "--messages", "m.json"]) == 2


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = run(capsys, "doctor")
    for word in ("processor", "instruction set", "threads", "memory left", "not here yet"):
        assert word in text
    monkeypatch.setenv("SMOLRUN_ISA", "scalar")
    values = json.loads(run(capsys, "doctor", "--json"))
    assert values["machine"]["isa"] == "scalar"
    assert values["environment"]["SMOLRUN_ISA"] == "scalar"
    monkeypatch.setenv("SMOLRUN_ISA", "quantum")
    assert main(["doctor"]) == 1
    assert "quantum" in capsys.readouterr().err


def test_list_and_rm(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "smolrun pull" in capsys.readouterr().err
    snapshot = tmp_path / "hf" / "hub" / "models--a--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny, snapshot)
    assert "a/tiny" in run(capsys, "ls")
    entry = json.loads(run(capsys, "list", "--json"))[0]
    assert entry["name"] == "a/tiny"
    assert entry["size_bytes"] == sum(p.stat().st_size for p in snapshot.iterdir())
    assert "has a template" in run(capsys, "show", "a/tiny")
    assert main(["rm", "a/other"]) == 1
    assert "downloaded: a/tiny" in capsys.readouterr().err
    assert main(["rm", "a/tiny"]) == 0
    assert "deleted a/tiny" in capsys.readouterr().err
    assert cached_models() == []
    assert tiny.is_dir()


def test_pull_says_why_it_can_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert main(["pull", "a/b:q4_0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "127.0.0.1:9 can not be reached" in captured.err
