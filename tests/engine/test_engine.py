"""The loop on a runner that checks what it is given; the real one is in test_contract.py."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from smolrun.engine.engine import Engine
from smolrun.engine.sampling import SampledToken
from smolrun.engine.sequence import Ending, Terms
from smolrun.errors import (
    ContextLengthError,
    NonFiniteError,
    RequestError,
    ResourceError,
    SmolrunError,
)
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
from tests.waiting import eventually, joined, started

SEEDED = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "logprobs": True, "top_logprobs": 2}


@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
@pytest.mark.parametrize("arguments", [{"max_tokens": 20}, {"max_tokens": 20, **SEEDED}], ids=str)
def test_among_others_as_alone(chunk: int, arguments: dict[str, Any]) -> None:
    some = prompts(16)
    expected = [solo(prompt, arguments) for prompt in some]
    engine = fake_engine(kv_blocks=128, max_step_tokens=chunk, shared_chunk=chunk)
    fake_of(engine).hold()
    requests = [engine.submit(p, parameters(**arguments), TokenOutput()) for p in some]
    fake_of(engine).go_on()
    assert [collect(request)[0] for request in requests] == expected
    if chunk == 256:
        assert max(sequences for _, sequences in fake_of(engine).steps) == 16
    assert max(tokens for tokens, _ in fake_of(engine).steps) <= chunk
    healthy(engine)
    engine.close()


def test_this_check_can_fail() -> None:
    """A runner whose logits depend on the size of the batch is found out."""
    engine = fake_engine()
    runner = fake_of(engine)
    honest = runner.logits_of
    size = 0

    def before(tokens: Any, positions: Any) -> None:
        nonlocal size
        size = len(tokens)

    runner.before = before
    runner.logits_of = lambda tokens: honest(tokens) + np.float32(1e-3) * size  # type: ignore[method-assign]
    some = prompts(4)
    arguments = {"max_tokens": 8, "logprobs": True, "temperature": 1.0, "seed": 1}
    requests = [engine.submit(p, parameters(**arguments), TokenOutput()) for p in some]
    assert [collect(r)[0] for r in requests] != [solo(p, arguments) for p in some]
    engine.close()


def test_a_prefix_hit_gives_the_same(engine: Engine) -> None:
    arguments = {"max_tokens": 40, **SEEDED}
    prompt = prompts(1, longest=400)[0][:100] * 2
    expected = solo(prompt, arguments)
    for cached in (0, (len(prompt) - 1) // 32 * 32):
        tokens, ending = collect(engine.submit(prompt, parameters(**arguments), TokenOutput()))
        assert tokens == expected
        assert ending.cached_tokens == cached
    longer = [*prompt, *[token.id for token in expected[:30]], 5]
    tokens, ending = collect(engine.submit(longer, parameters(max_tokens=5), TokenOutput()))
    assert ending.cached_tokens >= len(prompt) // 32 * 32
    assert tokens == solo(longer, {"max_tokens": 5})
    other = engine.submit(prompt, parameters(max_tokens=1), TokenOutput(), terms=Terms(salt=b"x"))
    assert collect(other)[1].cached_tokens == 0


def test_decode_rows_come_first_and_prompts_share_the_rest() -> None:
    engine = fake_engine(max_step_tokens=16)
    runner = fake_of(engine)
    runner.hold(1)
    first = engine.submit([1], parameters(max_tokens=6), TokenOutput())
    assert isinstance(next(first), SampledToken)
    second = engine.submit([2] * 40, parameters(max_tokens=2), TokenOutput())
    runner.go_on()
    collect(first)
    tokens, ending = collect(second)
    assert runner.steps[0] == (1, 1)
    assert (16, 2) in runner.steps  # one token of the first, fifteen of the second's prompt
    assert ending.prompt_tokens == 40
    engine.close()


def test_progress_is_told_for_prompts_of_several_steps() -> None:
    engine = fake_engine(max_step_tokens=16)
    events = list(engine.submit([3] * 40, parameters(max_tokens=1), TokenOutput()))
    assert events[:3] == [("progress", 16, 40), ("progress", 32, 40), ("progress", 40, 40)]
    events = list(engine.submit([4] * 16, parameters(max_tokens=1), TokenOutput()))
    assert isinstance(events[0], SampledToken)
    engine.close()


def test_endings(engine: Engine) -> None:
    tokens, ending = collect(engine.submit([1], parameters(max_tokens=5), TokenOutput()))
    assert (ending.finish_reason, ending.completion_tokens, len(tokens)) == ("length", 5, 5)
    stop = tokens[2].id
    assert stop not in [token.id for token in tokens[:2]]
    request = engine.submit([1], parameters(max_tokens=5), TokenOutput(), stop_ids={stop})
    shorter, ending = collect(request)
    assert shorter == tokens[:2]
    assert (ending.finish_reason, ending.completion_tokens) == ("stop", 3)
    output = TokenOutput()
    output.stop_at = stop
    shorter, ending = collect(engine.submit([1], parameters(max_tokens=5), output))
    assert shorter == tokens[:3]
    assert (ending.finish_reason, ending.completion_tokens) == ("stop", 3)
    request = engine.submit(
        [1], parameters(max_tokens=5, ignore_eos=True), TokenOutput(), stop_ids={stop}
    )
    assert collect(request)[0] == tokens
    healthy(engine)


def test_the_context_is_a_limit(engine: Engine) -> None:
    size = engine.context_size
    for length in (size, size + 1):
        with pytest.raises(ContextLengthError, match=f"{length} tokens.* holds {size}"):
            engine.submit([1] * length, parameters(), TokenOutput())
    tokens, ending = collect(
        engine.submit([1] * (size - 1), parameters(max_tokens=10), TokenOutput())
    )
    assert (len(tokens), ending.finish_reason) == (1, "length")
    tokens, ending = collect(engine.submit([1] * 200, parameters(), TokenOutput()))
    assert len(tokens) == size - 200
    healthy(engine)


@pytest.mark.parametrize("prompt", [[], [-1], [VOCABULARY], [2**31], [1, 2**63]])
def test_wrong_prompts(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(RequestError, match="^prompt: "):
        engine.submit(prompt, parameters(), TokenOutput())
    healthy(engine)


STAGES = ["admit", "prefill", "decode", "sample", "detokenise", "finish"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_stays_with_its_request(
    stage: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = prompts(8, seed=3)
    arguments = {"max_tokens": 12, **SEEDED}
    expected = [solo(prompt, arguments) for prompt in some]
    victim = some[4]
    runner = fake_of(engine)

    def explode(*_: Any) -> Any:
        raise ZeroDivisionError("injected")

    def explode_on_victim(tokens: Any, positions: Any) -> None:
        text = tokens.tolist()
        if stage == "prefill" and any(
            position == 0 and token == victim[0]
            for position, token in zip(positions, text, strict=True)
        ):
            explode()
        if stage == "decode" and len(victim) + 3 in positions and expected[4][3].id in text:
            explode()

    runner.before = explode_on_victim
    if stage == "admit":
        admit = engine.pool.admit
        monkeypatch.setattr(
            engine.pool,
            "admit",
            lambda tokens, *rest: explode() if tokens == victim else admit(tokens, *rest),
        )
    requests = []
    runner.hold()  # so that all of them go into the same steps
    for prompt in some:
        output = TokenOutput()
        if prompt is victim and stage == "detokenise":
            output.on_push = explode
        if prompt is victim and stage == "finish":
            output.finish = explode  # type: ignore[method-assign,assignment]
        requests.append(engine.submit(prompt, parameters(**arguments), output))
    if stage == "sample":
        from smolrun.engine.sampling import Sampler

        sample = Sampler.sample

        def faulty(self: Sampler, logits: Any, position: int) -> SampledToken:
            token = sample(self, logits, position)
            return explode() if token == expected[4][5] else token

        monkeypatch.setattr(Sampler, "sample", faulty)
    runner.go_on()
    for number, request in enumerate(requests):
        if number == 4:
            with pytest.raises(SmolrunError, match="ZeroDivisionError: injected"):
                list(request)
        else:
            assert collect(request)[0] == expected[number]
    assert engine.statistics()["failed"] == 1
    monkeypatch.undo()
    runner.before = lambda tokens, positions: None
    healthy(engine)


def test_a_step_that_always_fails_ends_its_requests_and_the_engine_goes_on(engine: Engine) -> None:
    def explode(*_: Any) -> None:
        raise MemoryError("no more")

    fake_of(engine).before = explode
    requests = [engine.submit(p, parameters(max_tokens=3), TokenOutput()) for p in prompts(4)]
    for request in requests:
        with pytest.raises(SmolrunError, match="MemoryError: no more"):
            list(request)
    fake_of(engine).before = lambda tokens, positions: None
    healthy(engine)


def test_non_finite_logits_end_their_request_and_leave_no_trace(engine: Engine) -> None:
    runner = fake_of(engine)
    runner.poison = {500}
    good = [[token % 500 for token in prompt] for prompt in prompts(3)]
    arguments = {"max_tokens": 12}
    poisoned = [7] * 70 + [500] + [8] * 30
    requests = [engine.submit(p, parameters(**arguments), TokenOutput()) for p in good]
    bad = engine.submit(poisoned, parameters(**arguments), TokenOutput())
    with pytest.raises(NonFiniteError, match="position 100"):
        list(bad)
    for prompt, request in zip(good, requests, strict=True):
        assert collect(request)[0] == solo(prompt, arguments)
    assert len(runner.zeroed) == 4
    assert engine.statistics()["corrupted"] == 1
    runner.poison = set()
    tokens, ending = collect(engine.submit(poisoned, parameters(**arguments), TokenOutput()))
    assert ending.cached_tokens == 0
    assert tokens == solo(poisoned, arguments)
    healthy(engine)


def test_cancel_takes_effect_within_a_step(engine: Engine) -> None:
    runner = fake_of(engine)
    runner.hold(3)
    request = engine.submit([1], parameters(), TokenOutput())
    others = [engine.submit(p, parameters(max_tokens=9), TokenOutput()) for p in prompts(3)]
    for _ in range(3):
        assert isinstance(next(request), SampledToken)
    request.cancel()
    runner.go_on()
    tokens, ending = collect(request)
    assert ending.finish_reason == "cancelled"
    assert len(tokens) <= 1  # of the step that was under way
    for prompt, other in zip(prompts(3), others, strict=True):
        assert collect(other)[0] == solo(prompt, {"max_tokens": 9})
    assert engine.statistics()["cancelled"] == 1
    healthy(engine)


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = fake_engine(kv_blocks=8, context_size=256)
    runner = fake_of(engine)
    runner.hold()
    first = engine.submit([1], parameters(max_tokens=200), TokenOutput())
    second = engine.submit([2], parameters(max_tokens=200), TokenOutput())  # does not fit beside
    second.cancel()
    runner.go_on()
    assert collect(second)[1].completion_tokens == 0
    assert collect(first)[0] == solo([1], {"max_tokens": 200})
    assert all(sequences == 1 for _, sequences in runner.steps)
    healthy(engine)
    engine.close()


def test_a_dropped_request_is_cancelled(engine: Engine) -> None:
    fake_of(engine).hold(1)
    request = engine.submit([1], parameters(), TokenOutput())
    next(request)
    del request
    gc.collect()
    fake_of(engine).go_on()
    healthy_after(engine, "cancelled")


def healthy_after(engine: Engine, count: str) -> None:
    assert eventually(lambda: not engine.statistics()["running"])
    assert engine.statistics()[count] == 1
    healthy(engine)


def test_ctrl_c_cancels_the_request_it_interrupts(engine: Engine) -> None:
    fake_of(engine).hold()
    request = engine.submit([1], parameters(), TokenOutput())

    class Interrupting:
        def get(self, timeout: float) -> Any:
            raise KeyboardInterrupt

    events, request._sequence.events = request._sequence.events, Interrupting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        next(request)
    request._sequence.events = events
    fake_of(engine).go_on()
    assert collect(request)[1].finish_reason == "cancelled"
    healthy(engine)


def test_requests_wait_for_blocks_and_all_finish() -> None:
    engine = fake_engine(kv_blocks=9, context_size=256)
    some = prompts(12, seed=8)
    requests = [engine.submit(p, parameters(max_tokens=100), TokenOutput()) for p in some]
    for prompt, request in zip(some, requests, strict=True):
        assert collect(request)[0] == solo(prompt, {"max_tokens": 100})
    healthy(engine)
    engine.close()


def test_reused_blocks_leave_no_trace() -> None:
    """Every block has held somebody else's tokens before."""
    engine = fake_engine(kv_blocks=8, context_size=256)
    for seed in range(3):
        for prompt in prompts(6, seed):
            request = engine.submit(prompt, parameters(max_tokens=30), TokenOutput())
            assert collect(request)[0] == solo(prompt, {"max_tokens": 30})
    healthy(engine)
    engine.close()


def test_many_threads() -> None:
    engine = fake_engine(kv_blocks=100)
    arguments = {"max_tokens": 10, **SEEDED}
    some = prompts(24, seed=2)
    expected = [solo(prompt, arguments) for prompt in some]
    found: dict[int, list[SampledToken]] = {}

    def work(number: int) -> None:
        request = engine.submit(some[number], parameters(**arguments), TokenOutput())
        found[number] = collect(request)[0]

    joined([started(work, number) for number in range(24)])
    assert [found[number] for number in range(24)] == expected
    engine.close()


def test_an_idle_engine_sleeps(engine: Engine) -> None:
    healthy(engine)

    def idle() -> bool:
        before = time.process_time()
        time.sleep(0.2)
        return time.process_time() - before < 0.02

    # What other tests left behind may do something once; a loop that spins is never idle.
    assert eventually(idle, seconds=5)


def test_close_ends_what_is_under_way() -> None:
    others = set(threading.enumerate())
    engine = fake_engine()
    fake_of(engine).hold(1)
    request = engine.submit([1], parameters(), TokenOutput())
    next(request)
    closing = started(engine.close)
    assert eventually(lambda: engine.closed)
    fake_of(engine).go_on()
    joined([closing])
    with pytest.raises(SmolrunError, match="closed"):
        list(request)
    with pytest.raises(SmolrunError, match="closed"):
        engine.submit([1], parameters(), TokenOutput())
    with pytest.raises(SmolrunError, match="closed"):
        engine.call(lambda: None)
    engine.close()
    left = set(threading.enumerate()) - others
    assert not any(thread.name == "smolrun" for thread in left)


def test_a_forked_child_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(SmolrunError, match="fork"):
        engine.submit([1], parameters(), TokenOutput())
    engine.close()
    monkeypatch.undo()
    healthy(engine)


def test_a_system_that_refuses_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = fake_engine()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="thread"):
            engine.submit([1], parameters(), TokenOutput())
        engine.close()
    engine = fake_engine()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="thread"):
            engine.call(lambda: None)
    healthy(engine)
    engine.close()


def test_a_pool_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(ResourceError, match="8 KV blocks, there are 4"):
        fake_engine(kv_blocks=4, context_size=256)


def test_timings_and_counts(engine: Engine) -> None:
    _, ending = collect(engine.submit([1] * 70, parameters(max_tokens=5), TokenOutput()))
    timings = ending.timings
    assert (timings.prompt_n, timings.predicted_n) == (70, 5)
    assert timings.prompt_ms > 0
    assert timings.predicted_ms > 0
    assert timings.predicted_per_second == pytest.approx(4000 / timings.predicted_ms)
    _, ending = collect(engine.submit([1] * 70, parameters(max_tokens=1), TokenOutput()))
    assert (ending.timings.prompt_n, ending.cached_tokens) == (6, 64)
    assert isinstance(ending, Ending)
    statistics = engine.statistics()
    assert statistics["requests"] == 2
    assert statistics["prompt_tokens"] == 140
    assert statistics["cached_tokens"] == 64
    assert statistics["completion_tokens"] == 6


@pytest.mark.parametrize("handover", [False, True])
def test_readers_get_a_moment_between_steps(
    monkeypatch: pytest.MonkeyPatch, handover: bool
) -> None:
    """Where they could not run beside a step, and only where there are any."""
    moments: list[float] = []
    monkeypatch.setattr(time, "sleep", moments.append)
    engine = fake_engine(handover=handover)
    tokens, _ = collect(engine.submit([1, 2, 3], parameters(max_tokens=9), TokenOutput()))
    assert tokens == solo([1, 2, 3], {"max_tokens": 9})
    assert len(moments) == (8 if handover else 0)
    fake_of(engine).hold()
    request = engine.submit([1, 2, 3], parameters(max_tokens=9), TokenOutput())
    request.skip_to_end()
    fake_of(engine).go_on()
    assert collect(request)[0] == []
    assert len(moments) == (8 if handover else 0)
    engine.close()
