"""Sums of the squares of the inputs of products, against the reference reading."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smolrun import _core
from smolrun.measure.importance import multiplied
from smolrun.model.reference import ReferenceRunner
from smolrun.quant.types import WeightType
from tests.native.models import Model, blocks_for, small_config, step

TOKENS = 37


class SummingReference(ReferenceRunner):
    """Adds up what it multiplies, by weight."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sums: dict[str, Any] = {}

    def _linear(self, x: Any, weight: str, bias: str | None = None) -> Any:
        self.sums[weight] = self.sums.get(weight, 0) + (x.astype(np.float64) ** 2).sum(axis=0)
        return super()._linear(x, weight, bias)


def run(runner: _core.Runner, model: Model, chunk: int) -> np.ndarray:
    """Logits of all tokens, `chunk` of them in a step."""
    tokens = np.arange(TOKENS) * 7 % model.config.vocab_size
    tables = blocks_for(TOKENS)[None, :]
    logits = []
    for begin in range(0, TOKENS, chunk):
        places = np.arange(begin, min(begin + chunk, TOKENS))
        logits.append(
            step(runner, model.config, tokens[places], places, 0 * places, tables,
                 rows=np.arange(len(places)))
        )  # fmt: skip
    return np.concatenate(logits)


@pytest.mark.parametrize("weight_type", [WeightType.F32, WeightType.Q8_0])
def test_sums_are_those_of_the_reference(weight_type: WeightType) -> None:
    model = Model.random(small_config(), [weight_type])
    runner = model.runner(threads=2, isa="scalar")
    plain = run(runner, model, 16)
    runner.collect_squares(True)
    np.testing.assert_array_equal(run(runner, model, 16), plain)
    found = runner.squares()

    values = model.reference().weights
    reference = SummingReference(model.program, values)
    reference.forward((np.arange(TOKENS) * 7 % model.config.vocab_size)[None])
    names = dict(multiplied(model.program))
    assert len(names) == 1 + 4 * model.config.num_hidden_layers
    assert {index for index, sums in enumerate(found) if sums} == set(names)
    for index, name in multiplied(model.program):
        np.testing.assert_allclose(found[index], reference.sums[name], rtol=1e-2)


def test_sums_do_not_depend_on_threads_or_steps() -> None:
    model = Model.random(small_config(), [WeightType.Q4_K])
    found = []
    for threads, chunk in [(1, TOKENS), (3, 16), (2, 1)]:
        runner = model.runner(threads=threads, isa="scalar")
        runner.collect_squares(True)
        run(runner, model, chunk)
        found.append(runner.squares())
    assert found[0] == found[1] == found[2]


def test_sums_start_and_end_when_asked() -> None:
    model = Model.random(small_config(), [WeightType.F32])
    runner = model.runner(threads=1, isa="scalar")
    assert runner.squares() == []
    runner.collect_squares(True)
    run(runner, model, 16)
    once = runner.squares()
    run(runner, model, 16)
    np.testing.assert_allclose(runner.squares()[1], 2 * np.array(once[1]))
    runner.collect_squares(True)
    assert not any(runner.squares()[1])
    runner.collect_squares(False)
    run(runner, model, 16)
    assert runner.squares() == []
