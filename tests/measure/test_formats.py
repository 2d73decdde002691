"""The table of formats, of a small model whose files are made on the spot."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from smolrun.errors import RequestError, ResourceError
from smolrun.files.checkpoint import open_checkpoint
from smolrun.measure.formats import PLAN, FormatTable, efficient, measure_formats, model_stem
from smolrun.measure.plot import check_plot, save_plot
from smolrun.measure.tables import Table, markdown
from tests.api.tiny import TEXT, make_folder
from tests.measure.support import FixedMeter

QUICK = dataclasses.replace(
    PLAN, prompt_tokens=(8,), decode_tokens=(2,), repetitions=1, start=False
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("source") / "tiny")


def measured(source: Path, folder: Path, names: list[str]) -> FormatTable:
    return measure_formats(source, folder, names, TEXT, FixedMeter(), window=16, plan=QUICK)


@pytest.fixture(scope="module")
def table(source: Path, tmp_path_factory: pytest.TempPathFactory) -> FormatTable:
    return measured(source, tmp_path_factory.mktemp("formats") / "new", ["f32", "Q8_0", "q4_0"])


def test_each_format_is_made_and_measured(table: FormatTable) -> None:
    assert [result.file.name for result in table.results] == ["F32", "Q8_0", "Q4_0"]
    f32, q8, q4 = table.results
    assert f32.quality.kl.value == 0, "the source's own weights"
    assert 0 < q8.quality.kl.value < q4.quality.kl.value
    assert f32.file.nbytes > q8.file.nbytes > q4.file.nbytes
    assert all(result.efficient for result in table.results)
    for result in table.results:
        checkpoint = open_checkpoint(result.file.path)
        types = {t.type.value for t in checkpoint.tensors.values() if len(t.shape) == 2}
        checkpoint.close()
        assert result.file.name in types
        assert [row.name for row in result.speed.rows] == ["prefill 8", "decode 2"]


def test_the_table_says_what_it_stands_on(table: FormatTable) -> None:
    text = markdown(table.parts())
    first = next(iter(table.parts()))
    assert isinstance(first, Table)
    assert [row[0] for row in first.rows] == ["F32", "Q8_0", "Q4_0"]
    assert "ceilings in GB/s and GOP/s" in text
    found = table.as_dict()
    assert isinstance(found["formats"], list)
    assert len(found["formats"]) == 3


def test_files_that_are_there_are_found(source: Path, tmp_path: Path) -> None:
    first = measured(source, tmp_path, ["q8_0", "q8_0"])
    assert [result.file.made for result in first.results] == [True]
    before = first.results[0].file.path.stat().st_mtime_ns
    again = measured(source, tmp_path, ["q8_0"])
    assert not again.results[0].file.made
    assert again.results[0].file.path.stat().st_mtime_ns == before


def test_files_older_than_the_weights_are_made_again(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "tiny")
    made = measured(source, tmp_path / "made", ["q8_0"]).results[0].file.path
    weights = next(source.glob("*.safetensors"))

    def changed(path: Path, nanoseconds: int) -> None:
        os.utime(path, ns=(nanoseconds, nanoseconds))

    then = made.stat().st_mtime_ns
    changed(weights, then - 1)
    changed(source, then + 10**9)  # a file of another kind came into the folder
    assert not measured(source, tmp_path / "made", ["q8_0"]).results[0].file.made
    changed(weights, then + 10**9)
    assert measured(source, tmp_path / "made", ["q8_0"]).results[0].file.made


def test_a_format_that_does_not_exist(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no type 'q9'"):
        measured(source, tmp_path, ["q9"])
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_is_told_before_files_are_made(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="take a longer text"):
        measure_formats(source, tmp_path / "made", ["q8_0"], "short", FixedMeter(), window=16)
    assert not (tmp_path / "made").exists()


def test_efficient_is_neither_larger_nor_worse_than_another() -> None:
    assert efficient([(4, 0.0), (2, 0.1), (1, 0.3)]) == [True, True, True]
    assert efficient([(4, 0.1), (2, 0.1), (1, 0.3)]) == [False, True, True]
    assert efficient([(2, 0.2), (2, 0.1), (3, 0.15)]) == [False, True, False]
    assert efficient([(2, 0.1), (2, 0.1)]) == [True, True]


def test_a_plot(table: FormatTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    save_plot(table, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    save_plot(table, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match=r"pip install 'smolrun\[plot\]'"):
        check_plot(tmp_path / "plot.svg")


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("models/smollm2-135m-f16.gguf", "smollm2-135m-f16"),
        ("model.safetensors", "model"),
        ("models/SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("SmolLM3-3B/.", "SmolLM3-3B"),
    ],
)
def test_a_folder_keeps_its_whole_name(path: str, stem: str) -> None:
    assert model_stem(Path(path)) == stem
