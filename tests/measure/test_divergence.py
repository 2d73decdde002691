"""Models side by side, against the definition of each figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smolrun import Model, RequestError
from smolrun.engine.likelihood import text_windows
from smolrun.measure.comparison import compare
from smolrun.measure.divergence import kl_divergence, side_by_side
from smolrun.measure.tables import Table, markdown
from tests.api.tiny import TEXT, make_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same tokenizer over different weights."""
    root = tmp_path_factory.mktemp("two")
    return make_folder(root / "one"), make_folder(root / "wide", intermediate_size=160)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def test_kl_divergence_by_its_definition() -> None:
    random = np.random.default_rng(1)
    base = random.standard_normal((5, 33)).astype(np.float32) * 4
    other = base + random.standard_normal((5, 33)).astype(np.float32)
    p, q = softmax(base), softmax(other)
    assert kl_divergence(base, other) == pytest.approx((p * np.log(p / q)).sum(axis=1))
    assert np.abs(kl_divergence(base, base + np.float32(3))).max() < 1e-6


def test_a_divergence_as_small_as_rounding_is_seen() -> None:
    random = np.random.default_rng(2)
    base = random.standard_normal((4, 5000)).astype(np.float32) * 3
    other = base + (random.standard_normal((4, 5000)) * 1e-3).astype(np.float32)
    p, q = softmax(base), softmax(other)
    expected = (p * np.log(p / q)).sum(axis=1)
    assert expected.max() < 2e-6
    assert kl_divergence(base, other) == pytest.approx(expected, rel=1e-6)


def test_two_models_side_by_side(folders: tuple[Path, Path]) -> None:
    with Model(folders[0], activations="exact") as one, Model(folders[1]) as two:
        ids = one.tokenize(TEXT)
        windows = text_windows(len(ids), 20)
        found = side_by_side([one, two], ids, windows, [(0, 0), (0, 1)])
        base, other = [], []
        scored = []
        for window in windows:
            piece = np.array([ids[window.start : window.end]])
            rows = slice(window.first - window.start - 1, -1)
            base.append(softmax(one.forward(piece, all_positions=True)[0][rows]))
            other.append(softmax(two.forward(piece, all_positions=True)[0][rows]))
            scored += ids[window.first : window.end]
        p, q = np.concatenate(base), np.concatenate(other)
        kl = (p * np.log(p / q)).sum(axis=1)
        assert found[1].kl.value == pytest.approx(kl.mean(), rel=1e-5)
        assert found[1].kl.error == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=1e-5)
        assert found[1].kl_median == pytest.approx(np.median(kl), rel=1e-5)
        assert found[1].kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
        assert found[1].kl_greatest == pytest.approx(kl.max(), rel=1e-5)
        agreement = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
        assert found[1].top1.value == pytest.approx(agreement)
        logprobs = np.log(p[range(len(scored)), scored]), np.log(q[range(len(scored)), scored])
        ratio = np.exp((logprobs[0] - logprobs[1]).mean())
        assert found[1].perplexity_ratio.value == pytest.approx(ratio, rel=1e-6)
        assert found[1].perplexity.value == pytest.approx(np.exp(-logprobs[1].mean()), rel=1e-6)
        assert found[0].perplexity == one.perplexity(ids, context=20)
        assert found[0].kl.value == found[0].kl.error == 0
        assert found[0].top1.value == found[0].perplexity_ratio.value == 1


def test_vocabularies_must_be_equal(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", vocab_size=416)
    with pytest.raises(RequestError, match="vocabulary of 416 tokens"):
        compare(folders[0], [other], TEXT, window=16)


def test_a_comparison_of_files(folders: tuple[Path, Path]) -> None:
    found = compare(folders[0], [folders[0], folders[1]], TEXT, window=16, threads=1)
    same, other = found.others
    assert same.whole.kl.value == 0
    assert other.whole.kl.value > 0
    assert same.format is same.arithmetic is None, "float32 weights have one reading only"
    table, note = found.parts()
    assert isinstance(table, Table)
    assert len(table.rows) == 3
    assert "| wide |" in markdown([table, note])
    assert found.as_dict()["base"] == "one"
