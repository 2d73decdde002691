"""smolrun convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.cli.main import main
from smolrun.files.checkpoint import open_checkpoint
from smolrun.model.random import random_weights
from smolrun.quant.types import WeightType
from tests.models import save_folder, small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = small_config(no_rope_layers=(1, 0, 1, 1))
    return save_folder(config, random_weights(config, 1), tmp_path / "folder")


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "m.gguf")
    assert main(["convert", str(folder), path, "--type", "BF16"]) == 0
    captured = capsys.readouterr()
    assert captured.out == path + "\n"
    assert "BF16, " in captured.err
    assert "smolrun.no_rope_layers, which other programs ignore" in captured.err
    assert main(["convert", path, str(tmp_path / "back"), "-q"]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'back'}\n", "")
    back = open_checkpoint(tmp_path / "back")
    assert back.tensors["model.embed_tokens.weight"].type is WeightType.BF16
    assert back.config.no_rope_layers == (1, 0, 1, 1)


def test_refusals(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    for arguments, code, message in [
        ([str(folder), str(path)], 1, "is there already; --force replaces it"),
        ([str(tmp_path / "none.gguf"), str(path)], 1, "there is no file or folder"),
        ([str(folder), str(path), "--type", "q8_0"], 2, "invalid choice: 'q8_0'"),
        ([str(folder)], 2, "DST"),
    ]:
        assert main(["convert", *arguments]) == code
        assert message in capsys.readouterr().err
        assert path.read_text() == "old"
    assert main(["convert", str(folder), str(path), "--force"]) == 0
    open_checkpoint(path)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert "examples:\n  smolrun convert ./my-finetune my-finetune.gguf" in capsys.readouterr().out
