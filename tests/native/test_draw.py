"""Drawing of a token, against sorting and running sums in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from smolrun import _core
from tests.kernels.helpers import each_isa, kernels

Floats = npt.NDArray[np.float32]
RANDOM = [0.0, *((np.arange(40) + 0.37) / 40).tolist(), 1 - 2**-53]


def weights_of(isa: str, logits: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Relative to the likeliest token, as the kernel rounds them."""
    weights = np.empty_like(logits)
    kernels.weigh(isa, logits, float(logits.max()), float(np.float32(1 / temperature)), weights)
    return weights.astype(np.float64)


def kept_tokens(
    logits: Floats, weights: npt.NDArray[np.float64], top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.int64]:
    """The definition; of equal ones the first stay."""
    kept = np.arange(len(logits))
    if top_k:
        kept = np.sort(np.argsort(-logits, kind="stable")[:top_k])
    if top_p < 1:
        kept = kept[np.argsort(-weights[kept], kind="stable")]
        cumulative = np.cumsum(weights[kept])
        kept = kept[: int((cumulative < top_p * cumulative[-1]).sum()) + 1]
    kept = np.sort(kept)
    return kept[weights[kept] >= min_p]


def check(isa: str, logits: Floats, **how: Any) -> None:
    given: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **how}
    temperature = given.pop("temperature")
    weights = weights_of(isa, logits, temperature)
    kept = kept_tokens(logits, weights, **given)
    cumulative = np.cumsum(weights[kept])
    total = cumulative[-1]
    before = None
    for random in RANDOM:
        token = _core.draw(isa, logits, temperature, random=random, **given)
        place = int(np.searchsorted(kept, token))
        assert place < len(kept), (given, random)
        assert kept[place] == token, (given, random)
        assert weights[token] > 0
        target = random * total  # within what sums in another order differ by
        assert cumulative[place] - weights[token] <= target + 1e-9 * total
        assert target <= cumulative[place] + 1e-9 * total
        assert before is None or token >= before
        before = token


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.2, "top_p": 0.9371},
    {"temperature": 2.5, "top_p": 0.9773},
    {"top_p": 0.0},
    {"top_p": 1e-9},
    {"top_p": 0.99999},
    {"top_k": 1},
    {"top_k": 5, "min_p": 0.2},
    {"top_k": 300, "top_p": 0.8137},
    {"min_p": 0.0123},
    {"min_p": 1.0},
    {"top_k": 10**6, "top_p": 0.5321, "min_p": 0.1},
    {"temperature": 100.0, "top_p": 0.7717},
    {"temperature": 1e-5},
]


@each_isa
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_draws(isa: str, spread: float, rounded: bool) -> None:
    """Ties included, of which `rounded` makes many."""
    generator = np.random.default_rng(3)
    for size in (1, 2, 7, 16, 31, 1000, 49152):
        logits = (spread * generator.standard_normal(size)).astype(np.float32)
        logits = np.round(logits) if rounded else logits
        for how in SETTINGS if size < 49152 else SETTINGS[:9:2]:
            check(isa, logits, **{**how, "top_k": min(how.get("top_k", 0), size)})


@each_isa
def test_equal_tokens_far_apart_in_one_nucleus(isa: str) -> None:
    """More than are sorted at a time, with the edge inside of a long run of equal ones."""
    logits = np.zeros(20_000, np.float32)
    logits[::3] = 1
    logits[5_000] = 2
    for top_p in (0.0001, 0.3337, 0.5771, 0.60003, 0.9137):
        check(isa, logits, top_p=top_p)
        check(isa, logits, top_p=top_p, top_k=15_000)


@each_isa
def test_forbidden_tokens_are_never_drawn(isa: str) -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[17, 40, 4999]] = [0.5, 0.2, 0.1]
    for how in SETTINGS:
        check(isa, logits, **how)


@each_isa
def test_weights(isa: str) -> None:
    for size in (1, 15, 16, 17, 100):
        x = np.linspace(-120, 3, size, dtype=np.float32)
        x[0] = -np.inf
        for factor in (0.01, 1.0, 7.5):
            out = np.full_like(x, 77)
            total = kernels.weigh(isa, x, 3.0, factor, out)
            wide = np.exp((x.astype(np.float64) - 3) * np.float64(np.float32(factor)))
            assert out[0] == 0
            assert total == pytest.approx(out.astype(np.float64).sum(), rel=1e-14, abs=0)
            # The exponent is rounded to float first.
            limit = 2.5e-7 * (1 + np.abs(np.where(np.isinf(x), 0, (x - 3) * factor))) * wide + 1e-37
            assert (np.abs(out - wide) <= limit).all()


def test_finite() -> None:
    for size in (1, 3, 16, 33, 1000):
        x = np.full(size, 3e38, np.float32)
        assert _core.all_finite(x)
        for value in (np.nan, np.inf, -np.inf):
            for place in {0, size // 2, size - 1}:
                bad = x.copy()
                bad[place] = value
                assert not _core.all_finite(bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"isa": "mmx"}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": np.nan},
        {"temperature": 1e-60}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": np.nan},
        {"min_p": -0.1}, {"min_p": 2.0}, {"random": 1.0}, {"random": -0.1}, {"random": np.nan},
        {"logits": np.empty(0, np.float32)}, {"logits": np.full(20, -np.inf, np.float32)},
        {"logits": np.array([1, np.nan], np.float32)},
        {"logits": np.array([np.inf, 1], np.float32)},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "isa": "scalar", "logits": np.zeros(20, np.float32), "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "min_p": 0.0, "random": 0.5,
    }  # fmt: skip
    assert 0 <= _core.draw(**given) < 20
    with pytest.raises(ValueError, match=" "):
        _core.draw(**{**given, **changes})
