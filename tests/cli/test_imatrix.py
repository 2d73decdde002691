"""`smolrun imatrix`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolrun.cli.main import main
from smolrun.files.imatrix import read_imatrix
from tests.api.tiny import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_imatrix(tiny: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.gguf"
    arguments = ["imatrix", str(tiny), str(target), "--text", text, "--window", "16"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{target}\n"
    found = read_imatrix(target)
    assert found.datasets == ("text.txt",)
    assert found.chunk_size == 16
    assert set(found.counts.values()) == {16 * found.chunk_count}
    assert "output.weight" in found.sums
    assert "blk.0.ffn_down.weight" in found.sums
    for name in ("attn_k", "attn_v"):
        np.testing.assert_array_equal(
            found.sums["blk.0.attn_q.weight"], found.sums[f"blk.0.{name}.weight"]
        )
    assert main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force", "-t", "2", "--activations", "exact"]) == 0


def test_refused(tiny: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imatrix", str(tiny), "out.gguf", "--text", text]) == 2
    assert "take a longer text or smaller pieces" in capsys.readouterr().err
    assert main(["imatrix", str(tiny)]) == 2
    # Before the model is read, which may take long.
    assert main(["imatrix", "none.gguf", "no/such/out.gguf", "--text", text]) == 1
    assert "make the folder first" in capsys.readouterr().err
    assert not Path("out.gguf").exists()
