"""`smolrun quantize`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolrun.cli.main import main
from smolrun.cli.quantize import described
from smolrun.files.gguf import GgufFile
from smolrun.files.quantize import Quantized, Substitution
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import save_folder, small_config


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder without a tokenizer, which a model can do without."""
    return save_folder(small_config(), random_weights(small_config(), 1), tmp_path / "tiny")


def test_quantize(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.gguf"
    assert main(["quantize", str(tiny), str(target), "Q4_0", "-t", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{target}\n"
    assert "bits per weight" in captured.err
    assert GgufFile.open(target).metadata["general.file_type"] == 2
    assert main(["quantize", str(tiny), str(target), "q4_0"]) == 1
    assert "--force" in capsys.readouterr().err
    options = ["--force", "--tensor-type", "ffn_down=q8_0", "--json", "-q"]
    assert main(["quantize", str(tiny), str(target), "q4_0", *options]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["path"] == str(target)
    assert captured.err == ""
    assert GgufFile.open(target).tensors["blk.0.ffn_down.weight"].type is WeightType.Q8_0


def test_default_target_and_dry_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tiny), "q8_0", "--dry-run"]) == 0
    assert capsys.readouterr().out == "tiny.Q8_0.gguf\n"
    assert not (tmp_path / "tiny.Q8_0.gguf").exists()
    assert main(["quantize", str(tiny), "q8_0"]) == 0
    assert (tmp_path / "tiny.Q8_0.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{tiny}", "q9"], 2, "there is no type 'q9'"),
        (["{tiny}"], 2, "quantize takes SRC [DST] TYPE"),
        (["{tiny}", "--fit", "lots"], 2, "expected a size such as 80MB"),
        (["{tiny}", "a.gguf", "q4_0", "--fit", "1MB"], 2, "quantize takes SRC [DST]"),
        (["{tiny}", "--fit", "1MB", "--strict"], 2, "--fit chooses all types itself"),
        (["{tiny}", "--fit", "1MB"], 2, "has no tokenizer"),
        (["{tiny}", "q4_0", "--tensor-type", "q8_0"], 2, "expected PATTERN=TYPE"),
        (["{tiny}", "q4_0", "--tensor-type", "ffn_dwon=q8_0"], 2, "'ffn_dwon' is found in no name"),
        (["{tiny}", "q4_0", "--text", "notes.txt"], 2, "--text is what --fit measures with"),
        (["{tiny}", "q4_0", "--imatrix", "none.gguf"], 1, "none.gguf"),
        (["{tiny}", "no/such/out.gguf", "q4_0"], 1, "make the folder first"),
        (["none.gguf", "q4_0"], 1, "none.gguf"),
    ],
)
def test_refused(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["quantize", *(a.format(tiny=tiny) for a in arguments)]) == code
    assert words in capsys.readouterr().err


def test_words() -> None:
    def substitution(name: str, wanted: WeightType, found: WeightType) -> Substitution:
        return Substitution(name, 576, wanted, found)

    names = ["token_embd.weight"]
    names += [f"blk.{i}.{kind}.weight" for i in (0, 1, 2, 5) for kind in ("attn_v", "attn_q")]
    made = Quantized(
        Path("x.gguf"), "Q6_K", 1_000_000, 1000, 8.0, {"Q8_0": 900, "F32": 100},
        tuple(substitution(name, WeightType.Q6_K, WeightType.Q8_0) for name in names), 3,
        ("token_embd.weight",),
    )  # fmt: skip
    assert described(made) == [
        "Q6_K: 1.0 MB, 8.00 bits per weight (Q8_0 90.0 %, F32 10.0 %)",
        "3 matrices were quantized already; a file of unquantized weights would lose less",
        "the imatrix says nothing of 1 matrices, token_embd.weight for one",
        "9 matrices can not take their type, as its blocks do not fill their rows:",
        "  Q6_K -> Q8_0 (rows of 576): token_embd; attn_v, attn_q of layers 0-2, 5",
    ]
