"""Logits of given tokens through the engine, beside requests that generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smolrun.engine.engine import Engine
from smolrun.engine.forward import Forward
from smolrun.errors import ContextLengthError, RequestError, ResourceError
from tests.engine.fakes import (
    VOCABULARY,
    TokenOutput,
    collect,
    fake_engine,
    fake_of,
    healthy,
    parameters,
    prompts,
    solo,
)


def expected_logits(engine: Engine, rows: list[list[int]]) -> Any:
    logits_of = fake_of(engine).logits_of
    return np.array(
        [[logits_of(np.array(row[: n + 1], np.int64)) for n in range(len(row))] for row in rows]
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_forward(chunk: int) -> None:
    engine = fake_engine(max_step_tokens=chunk)
    forward = Forward(engine)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (3, 90))
    expected = expected_logits(engine, rows.tolist())
    assert np.array_equal(forward.forward(rows, all_positions=True), expected)
    assert np.array_equal(forward.forward(rows[1]), expected[1:2, -1:])
    got = [forward.forward(rows[:, :50])]
    got += [forward.forward(rows[:, n : n + 1], start_pos=n) for n in range(50, 60)]
    got += [forward.forward(rows[:, 60:], start_pos=60)]
    for logits, position in zip(got, [*range(49, 60), 89], strict=True):
        assert np.array_equal(logits, expected[:, position : position + 1])
    again = forward.forward(rows[:, 40:45], start_pos=40, all_positions=True)  # step back
    assert np.array_equal(again, expected[:, 40:45])
    assert engine.statistics()["kv_blocks_held"] == 6
    forward.clear()
    healthy(engine)
    engine.close()


def test_forward_beside_requests(engine: Engine) -> None:
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 60))
    expected = expected_logits(engine, rows.tolist())
    forward = Forward(engine)
    some = prompts(6)
    requests = [engine.submit(p, parameters(max_tokens=40), TokenOutput()) for p in some]
    for n in range(60):
        logits = forward.forward(rows[:, n : n + 1], start_pos=n)
        assert np.array_equal(logits, expected[:, n : n + 1])
    for prompt, request in zip(some, requests, strict=True):
        assert collect(request)[0] == solo(prompt, {"max_tokens": 40})
    forward.clear()
    healthy(engine)


def test_forward_refuses(engine: Engine) -> None:
    forward = Forward(engine)
    cases: list[Any] = [[], [[]], [[[1]]], [1.5], [-1], [VOCABULARY], "abc"]
    for wrong in cases:
        with pytest.raises(RequestError, match="^input_ids: "):
            forward.forward(wrong)
    with pytest.raises(RequestError, match="^start_pos: expected 0 to 0"):
        forward.forward([1], start_pos=1)
    forward.forward([[1], [2]])
    with pytest.raises(RequestError, match="holds 2 sequences, got 1"):
        forward.forward([1], start_pos=1)
    with pytest.raises(ContextLengthError):
        forward.forward([1] * 257)
    with pytest.raises(ResourceError, match="9 sequences"):
        forward.forward(np.ones((9, 256), np.int64))
    healthy(engine)


def test_a_request_that_only_forward_keeps_out_is_told() -> None:
    engine = fake_engine(kv_blocks=8)
    forward = Forward(engine)
    forward.forward([1] * 100)
    with pytest.raises(ResourceError, match="clear_kv_cache"):
        list(engine.submit([1], parameters(), TokenOutput()))
    tokens, _ = collect(engine.submit([1], parameters(max_tokens=20), TokenOutput()))
    assert len(tokens) == 20
    forward.clear()
    healthy(engine)
    engine.close()
