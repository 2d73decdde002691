"""The knapsack against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from smolrun.quant.knapsack import cheapest

Options = list[list[tuple[int, float]]]


def by_trying(options: Options, capacity: int) -> float | None:
    fitting = [
        sum(cost for _, cost in choice)
        for choice in product(*options)
        if sum(size for size, _ in choice) <= capacity
    ]
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_is_cheaper(seed: int) -> None:
    random = np.random.default_rng(seed)
    scale = int(random.choice([1, 18, 1000]))
    options = [
        [(int(size) * scale, float(cost)) for size, cost in zip(
            random.integers(1, 40, 4), random.random(4), strict=True)]
        for _ in range(6)
    ]  # fmt: skip
    for capacity in random.integers(5, 250, 8) * scale:
        found = cheapest(options, int(capacity))
        expected = by_trying(options, int(capacity))
        if expected is None:
            assert found is None
            continue
        assert found is not None
        chosen = [choices[i] for choices, i in zip(options, found, strict=True)]
        assert sum(size for size, _ in chosen) <= capacity
        assert sum(cost for _, cost in chosen) == pytest.approx(expected)


def test_sizes_without_a_common_divisor_still_fit() -> None:
    random = np.random.default_rng(1)
    options = [
        [(int(s), float(1 / s)) for s in random.integers(10**6, 10**8, 5)] for _ in range(40)
    ]
    sizes = [sum(pick(size for size, _ in choices) for choices in options) for pick in (min, max)]
    for capacity in np.linspace(sizes[0], sizes[1], 7).astype(int):
        found = cheapest(options, int(capacity))
        assert found is not None
        total = sum(choices[i][0] for choices, i in zip(options, found, strict=True))
        assert total <= capacity
        assert total > capacity - 0.02 * (sizes[1] - sizes[0])


def test_one_option_each() -> None:
    assert cheapest([[(3, 1.0)], [(4, 2.0)]], 7) == [0, 0]
    assert cheapest([[(3, 1.0)], [(4, 2.0)]], 6) is None
    assert cheapest([[(3, 1.0)], [(4, 2.0)]], 10**12) == [0, 0]
