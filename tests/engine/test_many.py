"""Many callers: turns, places, deadlines, and the end of it all."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from smolrun.engine.engine import Engine
from smolrun.engine.places import Places
from smolrun.engine.sequence import Request, Terms
from smolrun.errors import ClosedError, DeadlineError, QueueFullError, ResourceError
from tests.engine.fakes import TokenOutput, collect, fake_engine, fake_of, parameters, solo
from tests.waiting import SECONDS, eventually, joined, started


def submit(engine: Engine, prompt: list[int], max_tokens: int, terms: Terms) -> Request:
    return engine.submit(prompt, parameters(max_tokens=max_tokens), TokenOutput(), terms=terms)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = fake_engine(kv_blocks=128, max_sequences=4)
    yield engine
    fake_of(engine).go_on()
    engine.close()


@contextmanager
def at_once(engine: Engine) -> Iterator[None]:
    """What is submitted inside reaches the loop at the same time."""
    began, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        assert go_on.wait(SECONDS)

    thread = started(engine.call, wait)
    try:
        assert began.wait(SECONDS)
        yield
    finally:
        go_on.set()
        joined([thread])


# --- turns ---


def test_keys_take_turns_to_be_let_in() -> None:
    """Ten requests of one key came first; each other key waits for one of them at most."""
    engine = fake_engine(kv_blocks=128, max_sequences=1)
    admitted: list[str] = []
    admit = engine.pool.admit

    def noting(tokens: list[int], *rest: object) -> object:
        admitted.append("abc"[tokens[0]])
        return admit(tokens, *rest)  # type: ignore[arg-type]

    engine.pool.admit = noting  # type: ignore[method-assign,assignment]
    with at_once(engine):
        requests = [submit(engine, [0] * 50, 5, Terms(key="a")) for _ in range(10)]
        requests += [submit(engine, [1] * 50, 5, Terms(key="b")) for _ in range(3)]
        requests += [submit(engine, [2] * 50, 5, Terms(key="c"))]
    for request in requests:
        collect(request)
    assert "".join(admitted) == "abcababaaaaaaa"
    engine.close()


def test_a_short_prompt_overtakes_the_long_ones_of_another_key() -> None:
    """It waits for two chunks at most, not for three prompts of 200 tokens."""
    engine = fake_engine(kv_blocks=128, max_step_tokens=32, max_sequences=8)
    runner = fake_of(engine)
    runner.hold(1)
    long = [submit(engine, [n] * 200, 2, Terms(key="a")) for n in range(3)]
    assert eventually(lambda: runner.waits)
    short = submit(engine, [9] * 10, 2, Terms(key="b"))
    runner.go_on()
    assert collect(short)[0] == solo([9] * 10, {"max_tokens": 2})
    for n, request in enumerate(long):
        assert collect(request)[0] == solo([n] * 200, {"max_tokens": 2})
    # One chunk was computed and one under way when it came; on a tie, who was there first goes on.
    assert [sequences for _, sequences in runner.steps[:5]] == [1, 1, 1, 2, 2]
    engine.close()


def test_a_prompt_delays_answers_by_small_chunks_only() -> None:
    """While two generate, no step has more than their two tokens and a chunk."""
    engine = fake_engine(kv_blocks=64, context_size=512, max_step_tokens=256, shared_chunk=16)
    runner = fake_of(engine)
    with at_once(engine):
        answers = [submit(engine, [n], 40, Terms()) for n in (1, 2)]
        prompt = submit(engine, [3] * 450, 2, Terms())
    for n, request in zip((1, 2), answers, strict=True):
        assert collect(request)[0] == solo([n], {"max_tokens": 40})
    assert collect(prompt)[1].prompt_tokens == 450
    first, *shared = runner.steps
    assert first[0] == 256  # nobody generated yet
    assert max(tokens for tokens, _ in shared) == 2 + 16 + 2 * 2
    engine.close()


def test_who_comes_back_is_owed_nothing_for_the_pause(engine: Engine) -> None:
    """b paused while a was served; it then has its turns, not all the time that it missed."""
    scheduler = engine._scheduler
    runner = fake_of(engine)
    runner.hold(30)
    requests = [submit(engine, [1] * 60, 100, Terms(key="a"))]
    assert eventually(lambda: runner.waits)
    requests.append(submit(engine, [2] * 60, 100, Terms(key="b")))
    assert runner._passes is not None
    runner._passes.release(30)
    assert eventually(lambda: len(runner.steps) >= 60)
    assert abs(scheduler._served["a"] - scheduler._served["b"]) <= 62
    runner.go_on()
    for request in requests:
        request.cancel()
        collect(request)


# --- places ---


def test_places_and_the_queue_are_bounded(engine: Engine) -> None:
    """Four run and eight wait; the other 88 are told so, and the twelve lose nothing."""
    runner = fake_of(engine)
    engine.places.limit = engine.max_sequences + 8
    runner.hold()
    accepted = [submit(engine, [number], 10, Terms()) for number in range(12)]
    for number in range(88):
        with pytest.raises(QueueFullError, match="all of 12 places") as caught:
            submit(engine, [number], 10, Terms())
        assert f"come back in {caught.value.retry_after} seconds" in str(caught.value)
        assert 1 <= caught.value.retry_after <= 30
    statistics = engine.statistics()
    assert (statistics["rejected"], statistics["places_taken"]) == (88, 12)
    runner.go_on()
    for number, request in enumerate(accepted):
        assert collect(request)[0] == solo([number], {"max_tokens": 10})
    assert engine.places.wait_until_free(SECONDS)
    collect(submit(engine, [1], 3, Terms()))


def test_a_place_is_taken_before_the_request_is_prepared(engine: Engine) -> None:
    engine.places.limit = 2
    first, second = engine.places.take(2)
    with pytest.raises(QueueFullError):
        engine.places.take()
    with pytest.raises(QueueFullError):
        submit(engine, [1], 3, Terms())
    collect(submit(engine, [1], 3, Terms(place=first)))
    collect(submit(engine, [1], 3, Terms()))  # the place of the first is free again
    second.leave()
    second.leave()
    assert engine.places.wait_until_free(SECONDS)
    with engine.places.take()[0]:
        assert engine.places.taken == 1
    assert engine.places.taken == 0
    engine.places.take()  # and dropped
    assert engine.places.taken == 0


def test_prompt_tokens_that_wait_are_bounded(engine: Engine) -> None:
    runner = fake_of(engine)
    engine.places.token_limit = 100
    runner.hold()
    with at_once(engine):  # one by one, the first could start a step and the others wait for it
        running = [submit(engine, [1], 10, Terms()) for _ in range(4)]
    assert eventually(lambda: not engine.statistics()["waiting_tokens"])
    waiting = [submit(engine, [2] * 200, 2, Terms())]  # one may always wait
    with pytest.raises(QueueFullError, match="prompts of 200 tokens wait, and at most 100 may"):
        submit(engine, [3], 2, Terms())
    runner.go_on()
    for request in running + waiting:
        collect(request)
    assert engine.places.wait_until_free(SECONDS)
    assert engine.places.waiting_tokens == 0
    collect(submit(engine, [3], 2, Terms()))


@pytest.mark.parametrize("how", ["cancel", "drop", "fail", "close"])
def test_places_come_back_however_a_request_ends(engine: Engine, how: str) -> None:
    runner = fake_of(engine)
    runner.hold()
    requests = [submit(engine, [1], 50, Terms()) for _ in range(6)]
    if how == "cancel":
        for request in requests:
            request.cancel()
    elif how == "drop":
        requests.clear()
    elif how == "fail":
        runner.before = lambda tokens, positions: 1 // 0  # type: ignore[assignment]
    else:
        started(engine.close)
        assert eventually(lambda: engine.closed)
    runner.go_on()
    assert engine.places.wait_until_free(SECONDS)
    assert engine.places.waiting_tokens == 0


def test_the_wait_is_the_time_until_a_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end every two seconds: who is turned away third may come in six."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    places = Places()
    places.limit = 4

    def told() -> int:
        with pytest.raises(QueueFullError) as caught:
            places.take()
        return caught.value.retry_after

    held = places.take(4)
    assert told() == 1  # nothing is known yet
    for _ in range(5):
        now += 2
        held.pop(0).leave()
        held += places.take()
    assert [told(), told(), told()] == [2, 4, 6]
    assert max(told() for _ in range(50)) == 30


# --- deadlines ---


def test_a_request_that_waits_too_long_never_runs(engine: Engine) -> None:
    runner = fake_of(engine)
    runner.hold(1)
    running = [submit(engine, [n], 20, Terms()) for n in range(4)]
    late = submit(engine, [9], 5, Terms(queue_seconds=0.0))
    patient = submit(engine, [8], 5, Terms(queue_seconds=1000, total_seconds=1000))
    runner.go_on()
    with pytest.raises(DeadlineError, match="waited longer than 0 s") as caught:
        collect(late)
    assert not caught.value.started
    for n, request in enumerate(running):
        assert collect(request)[0] == solo([n], {"max_tokens": 20})
    assert collect(patient)[0] == solo([8], {"max_tokens": 5})
    assert engine.statistics()["expired"] == 1


def test_a_request_that_takes_too_long_ends(engine: Engine) -> None:
    runner = fake_of(engine)
    runner.hold(1)
    late = submit(engine, [9], 200, Terms(total_seconds=1000))
    other = submit(engine, [1], 20, Terms())
    next(late)
    late._sequence.submitted -= 2000
    runner.go_on()
    with pytest.raises(DeadlineError, match="took longer than 1000 s") as caught:
        collect(late)
    assert caught.value.started
    assert collect(other)[0] == solo([1], {"max_tokens": 20})
    assert engine.statistics()["kv_blocks_held"] == 0


# --- the end ---


def test_draining(engine: Engine) -> None:
    """What is under way, waiting or has a place ends as usual; nothing else is let in."""
    runner = fake_of(engine)
    runner.hold()
    requests = [submit(engine, [n], 10, Terms()) for n in range(6)]
    (place,) = engine.places.take()
    assert not engine.drain(timeout=0)
    with pytest.raises(ClosedError, match="no more requests"):
        submit(engine, [1], 10, Terms())
    with pytest.raises(ClosedError, match="no more requests"):
        engine.places.take()
    requests.append(submit(engine, [6], 10, Terms(place=place)))
    runner.go_on()
    for n, request in enumerate(requests):
        assert collect(request)[0] == solo([n], {"max_tokens": 10})
    assert engine.drain(timeout=SECONDS)


def test_a_request_that_can_never_run_does_not_hold_up_other_keys() -> None:
    engine = fake_engine(kv_blocks=8, context_size=256)
    from smolrun.engine.forward import Forward

    forward = Forward(engine)
    forward.forward([1] * 200)
    large = submit(engine, [1], 200, Terms(key="a"))
    small = submit(engine, [2], 5, Terms(key="b"))
    with pytest.raises(ResourceError, match="7 KV blocks of 8"):
        collect(large)
    assert collect(small)[0] == solo([2], {"max_tokens": 5})
    engine.close()


def test_steps_are_told() -> None:
    engine = fake_engine()
    steps: list[int] = []
    engine.on_step = steps.append
    collect(submit(engine, [1] * 200, 3, Terms()))
    statistics = engine.statistics()
    assert steps == [200, 1, 1]
    assert (statistics["steps"], statistics["step_tokens"]) == (3, 202)
    engine.close()
