"""Times of the operations of a step."""

from __future__ import annotations

import numpy as np
import pytest

from smolrun import _core
from smolrun.quant.types import WeightType
from tests.native.models import Model, blocks_for, small_config, step

TOKENS = 40


@pytest.mark.parametrize("threads", [1, 3])
def test_ends_of_operations_follow_each_other(threads: int) -> None:
    model = Model.random(small_config(), [WeightType.F32])
    runner = model.runner(threads=threads, isa="scalar")
    assert runner.profile() == {"nanoseconds": 0, "ends": []}
    logits = one_step(runner, model)
    assert runner.profile() == {"nanoseconds": 0, "ends": []}, "off until asked for"

    runner.set_profiling(True)
    np.testing.assert_array_equal(one_step(runner, model), logits)
    profile = runner.profile()
    ends = np.array(profile["ends"])
    assert ends.shape == (threads, len(model.program.operations))
    assert ((ends == -1) | (ends > 0)).all()
    for row in ends:
        taken = row[row >= 0]
        assert (np.diff(taken) >= 0).all()
    operation_ends = ends.max(axis=0)
    assert (operation_ends > 0).all(), "somebody did each operation"
    assert operation_ends[-1] <= profile["nanoseconds"]

    runner.set_profiling(False)
    one_step(runner, model)
    assert runner.profile() == profile, "the last step that was profiled"


def test_an_operation_without_work_takes_no_part() -> None:
    model = Model.random(small_config(), [WeightType.F32])
    runner = model.runner(isa="scalar")
    runner.set_profiling(True)
    step(runner, model.config, [1, 2], [0, 1], [0, 0], [[0]], rows=np.zeros(0))
    assert runner.profile()["ends"][0][-1] == -1, "no logits were asked for"


def test_threads_may_change_between_profiled_steps() -> None:
    model = Model.random(small_config(), [WeightType.F32])
    runner = model.runner(threads=1, isa="scalar")
    runner.set_profiling(True)
    for threads in (3, 2):
        runner.set_threads(threads)
        one_step(runner, model)
        assert len(runner.profile()["ends"]) == threads


def one_step(runner: _core.Runner, model: Model) -> np.ndarray:
    tokens = np.arange(TOKENS) % model.config.vocab_size
    positions = np.arange(TOKENS)
    return step(runner, model.config, tokens, positions, 0 * positions, blocks_for(TOKENS)[None, :])
