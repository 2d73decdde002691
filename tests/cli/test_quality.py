"""`smolrun perplexity` and `smolrun compare`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from smolrun.cli.main import main
from smolrun.cli.options import UsageError, text_of
from smolrun.measure.formats import PLAN
from smolrun.measure.text import sample_text
from tests.api.tiny import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_text_comes_from_a_file_or_from_the_package(tmp_path: Path) -> None:
    def read(path: Path | None) -> str:
        return text_of(argparse.Namespace(text=path))

    assert len(sample_text().split()) > 3000
    assert read(None) == sample_text()
    path = tmp_path / "text.txt"
    path.write_bytes(b"more\r\nwords\n\n")
    assert read(path) == "more\nwords\n", "the newline at the end is the editor's"
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none.txt")
    path.write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match="not UTF-8 text \\(byte 2\\)"):
        read(path)


def test_perplexity(tiny: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["perplexity", str(tiny), "--text", text, "--window", "16"]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main(["perplexity", "-m", str(tiny), "--text", text, "--window", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["value"] > 1
    assert found["tokens"] == 7 * found["windows"]


def test_perplexity_of_the_text_of_the_package(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["perplexity", str(tiny), "--window", "500", "--stride", "400"]) == 0
    assert "±" in capsys.readouterr().out


def test_compare(tiny: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", text, "--window", "16", "-t", "1"]
    assert main(["compare", str(tiny), str(tiny), *options]) == 0
    assert "0.00e+00 ± 0.00e+00" in capsys.readouterr().out
    assert main(["compare", str(tiny), str(tiny), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["others"][0]["whole"]["top1"] == {"value": 1.0, "error": 0.0}


def test_formats(
    tiny: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = dataclasses.replace(PLAN, prompt_tokens=(8,), decode_tokens=(2,), start=False)
    monkeypatch.setattr("smolrun.measure.formats.PLAN", plan)
    options = ["--text", text, "--window", "16", "-t", "1", "-r", "1", "-o", str(tmp_path)]
    assert main(["formats", str(tiny), "--formats", "f16,q8_0", *options]) == 0
    out = capsys.readouterr().out
    assert "| F16 |" in out
    assert "| Q8_0 |" in out
    assert main(["formats", str(tiny), "--formats", "q8_0", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in found["formats"]] == ["Q8_0"]
    assert not found["formats"][0]["file"]["made"]


def test_a_plot_that_can_not_be_made_is_told_before_anything_is_measured(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["formats", str(tiny), "--plot", "no/such/plot.svg"]) == 1
    assert "make the folder first" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["formats", str(tiny), "--plot", "plot.svg"]) == 1
    assert "pip install 'smolrun[plot]'" in capsys.readouterr().err
    assert not list(Path().glob("*-formats"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["perplexity", "{tiny}", "{tiny}"], "perplexity takes one model"),
        (["perplexity", "{tiny}", "--text", "{text}"], "take a longer text or a smaller window"),
        (["perplexity", "{tiny}", "--text", "none.txt"], "none.txt: No such file"),
        (["perplexity", "{tiny}", "--window", "8", "--stride", "8"], "stride: expected 1 to 7"),
        (["compare", "{tiny}"], "OTHER"),
        (["formats", "{tiny}", "--plot", "x.jpg"], "ends in .svg or .png"),
        (["formats", "{tiny}", "--formats", "q9"], "there is no type"),
    ],
)
def test_wrong_usage(
    tiny: Path,
    text: str,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(tiny=tiny, text=text) for argument in arguments]
    assert main(filled) == 2
    assert words in capsys.readouterr().err
