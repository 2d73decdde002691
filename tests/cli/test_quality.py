"""`smolrun perplexity` and `smolrun compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolrun.cli.main import main
from tests.api.tiny import TEXT


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["perplexity", "{tiny}", "{tiny}"], "perplexity takes one model"),
        (["perplexity", "{tiny}", "--text", "{text}"], "take a longer text or a smaller window"),
        (["perplexity", "{tiny}", "--text", "none.txt"], "none.txt: No such file"),
        (["perplexity", "{tiny}", "--window", "8", "--stride", "8"], "stride: expected 1 to 7"),
        (["compare", "{tiny}"], "OTHER"),
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
