"""`AsyncModel`: the same answers, nothing on the event loop, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolrun import (
    AsyncModel,
    ContextLengthError,
    EndEvent,
    Model,
    RequestError,
    Result,
    SmolrunError,
    TextEvent,
)
from tests.engine.fakes import GatedRunner
from tests.waiting import SECONDS, eventually, joined, started

QUESTION = "Why is the sky blue?"
# Greedy, as each token then makes a text: some tokens that could be drawn make none.
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
SEEDED: dict[str, Any] = {"max_tokens": 12, "seed": 7, "temperature": 0.9}


@pytest.fixture
def gated(tiny_folder: Path) -> Iterator[tuple[Model, GatedRunner]]:
    with Model(tiny_folder, threads=1) as model:
        runner = model.loaded.engine.runner = GatedRunner(model.loaded.engine.runner)
        yield model, runner
        runner.go_on()


async def until(condition: Callable[[], Any]) -> None:
    assert await asyncio.to_thread(eventually, condition)


def ended(model: Model, *, cancelled: int) -> None:
    """Nothing is held any more, and so many requests were cancelled."""
    model.generate("x", max_tokens=1)
    statistics = model.statistics()
    assert (statistics["cancelled"], statistics["kv_blocks_held"]) == (cancelled, 0)


def test_the_same_answers(model: Model) -> None:
    async def main() -> None:
        asynchronous = AsyncModel(model)
        assert (await asynchronous.chat(QUESTION, **SEEDED)).text == model.chat(
            QUESTION, **SEEDED
        ).text
        prompts = ["The sky", "A small model", "x" * 300]
        expected = [result.token_ids for result in model.generate(prompts, **SEEDED)]
        found = await asynchronous.generate(prompts, **SEEDED)
        assert [result.token_ids for result in found] == expected
        single = await asynchronous.generate([1, 2, 3], **SEEDED)
        assert single.token_ids == model.generate([1, 2, 3], **SEEDED).token_ids
        text, choices = "The sky is", [" blue", " green"]
        assert await asynchronous.score(text, choices) == model.score(text, choices)
        assert await asynchronous.perplexity(text * 20, context=32) == model.perplexity(
            text * 20, context=32
        )
        assert await asynchronous.tokenize(text) == model.tokenize(text)

    asyncio.run(main())


@pytest.mark.parametrize("method", ["stream", "stream_text"])
def test_the_same_events(model: Model, method: str) -> None:
    async def main() -> list[Any]:
        return [event async for event in getattr(AsyncModel(model), method)(QUESTION, **SEEDED)]

    expected = list(getattr(model, method)(QUESTION, **SEEDED))
    found = asyncio.run(main())
    assert [*map(type, found)] == [*map(type, expected)]
    assert found[:-1] == expected[:-1]
    assert found[-1].result.token_ids == expected[-1].result.token_ids


def test_loading_off_the_loop(tiny_folder: Path) -> None:
    async def main() -> None:
        async with await AsyncModel.load(tiny_folder, threads=1) as model:
            assert (await model.chat(QUESTION, max_tokens=2)).usage.completion_tokens == 2
        with pytest.raises(SmolrunError, match="closed"):
            await model.chat(QUESTION)
        with pytest.raises(SmolrunError, match="closed"):
            async for _ in model.stream(QUESTION):
                pass

    asyncio.run(main())


def test_rendering_and_tokenizing_leave_the_loop_free(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template waits for the loop: on the loop it would wait in vain."""
    template = type(model.template)
    honest, ticked = template.encode, threading.Event()

    def waiting(*arguments: Any, **options: Any) -> Any:
        assert ticked.wait(SECONDS)
        return honest(*arguments, **options)

    async def main() -> None:
        answer = asyncio.create_task(AsyncModel(model).chat(QUESTION, max_tokens=1))
        await asyncio.sleep(0.01)
        ticked.set()
        await answer

    monkeypatch.setattr(template, "encode", waiting)
    asyncio.run(main())


def test_what_is_wrong_is_told_at_the_start(model: Model) -> None:
    async def main() -> None:
        asynchronous = AsyncModel(model)
        with pytest.raises(RequestError, match="^temperature: "):
            await asynchronous.stream(QUESTION, temperature=-1).start()
        with pytest.raises(ContextLengthError):
            async with asynchronous.stream_text("x " * 2000):
                pass
        with pytest.raises(RequestError, match="^prompt: "):
            await asynchronous.generate(["x", []])  # type: ignore[list-item]
        stream = asynchronous.stream(QUESTION, top_p=2)
        with pytest.raises(RequestError, match="^top_p: "):
            await stream.result()
        assert [event async for event in stream] == []
        stream = asynchronous.stream(QUESTION, max_tokens=1)
        await stream.result()
        with pytest.raises(RequestError, match="already been read"):
            await stream.result()

    asyncio.run(main())


async def leave_the_loop(model: AsyncModel) -> None:
    async for _ in model.stream(QUESTION, **ENDLESS):
        break
    gc.collect()


async def leave_the_block(model: AsyncModel) -> None:
    stream = model.stream(QUESTION, **ENDLESS)
    async with stream:
        await anext(stream)


async def cancel_the_task(model: AsyncModel) -> None:
    began = asyncio.Event()

    async def read() -> None:
        async for _ in model.stream(QUESTION, **ENDLESS):
            began.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(began.wait(), SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_a_whole_answer(model: AsyncModel) -> None:
    task = asyncio.create_task(model.chat(QUESTION, **ENDLESS))
    await until(lambda: model.model.statistics()["running"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_a_score(model: AsyncModel) -> None:
    """Of choices that share a block, the others wait for the first, and are never begun."""
    task = asyncio.create_task(model.score([5] * 400, [[6], [7], [8]]))
    while not model.model.statistics()["running"]:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_a_perplexity(model: AsyncModel) -> None:
    """Windows of several steps; as they begin alike, the others wait for the first."""
    task = asyncio.create_task(model.perplexity([5] * 1200, context=400))
    await until(lambda: model.model.statistics()["running"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


READINGS = [cancel_a_score, cancel_a_perplexity]


@pytest.mark.parametrize(
    "leave",
    [leave_the_loop, leave_the_block, cancel_the_task, cancel_a_whole_answer, *READINGS],
)
def test_whoever_leaves_cancels(gated: tuple[Model, GatedRunner], leave: Any) -> None:
    """The answer would take all of the context; it ends within the step that is under way."""
    model, runner = gated
    runner.hold(0 if leave in READINGS else 2)
    asyncio.run(leave(AsyncModel(model)))
    runner.go_on()
    ended(model, cancelled=1)


def test_a_task_cancelled_while_it_prepares(
    gated: tuple[Model, GatedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = gated
    template = type(model.template)
    honest, began, go_on = template.encode, threading.Event(), threading.Event()

    def waiting(*arguments: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(SECONDS)
        return honest(*arguments, **options)

    async def main() -> None:
        task = asyncio.create_task(AsyncModel(model).chat(QUESTION, **ENDLESS))
        await asyncio.to_thread(began.wait, SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    monkeypatch.setattr(template, "encode", waiting)
    asyncio.run(main())
    # Cancelled ones count, too.
    assert eventually(lambda: model.statistics()["requests"])
    ended(model, cancelled=1)


def test_one_bad_prompt_cancels_the_others(gated: tuple[Model, GatedRunner]) -> None:
    model, runner = gated

    async def main() -> None:
        prompts: list[Any] = ["x", [1] * 600]
        with pytest.raises(ContextLengthError):
            await AsyncModel(model).generate(prompts, ignore_eos=True)
        gc.collect()

    runner.hold()
    asyncio.run(main())
    runner.go_on()
    ended(model, cancelled=1)


def test_who_stops_reading_holds_up_nobody(model: Model) -> None:
    """What is left unread is the rest of the answer, and it is still there later."""

    async def main() -> None:
        asynchronous = AsyncModel(model)
        options: dict[str, Any] = {**SEEDED, "max_tokens": 100, "ignore_eos": True}
        slow = asynchronous.stream_text("The sky", **options)
        first = await anext(slow)
        for _ in range(3):
            other = await asynchronous.generate("A small model", **options)
        await until(lambda: not model.statistics()["running"])
        assert slow._stream is not None
        assert slow._stream._request._sequence.events.qsize() <= 102
        assert other.token_ids == model.generate("A small model", **options).token_ids
        rest = [event async for event in slow]
        texts = [event.text for event in (first, *rest) if isinstance(event, TextEvent)]
        assert isinstance(rest[-1], EndEvent)
        assert "".join(texts) == rest[-1].result.text
        assert rest[-1].result.text == model.generate("The sky", **options).text

    asyncio.run(main())


def test_several_event_loops_share_a_model(model: Model) -> None:
    asynchronous = AsyncModel(model)
    prompts = [QUESTION * n for n in range(1, 9)]
    expected = [model.chat(prompt, **SEEDED).text for prompt in prompts]
    found: dict[int, list[str]] = {}

    async def main(number: int) -> None:
        answers: list[Coroutine[Any, Any, Result]] = [
            asynchronous.chat(prompt, **SEEDED) for prompt in prompts
        ]
        found[number] = [result.text for result in await asyncio.gather(*answers)]

    joined([started(asyncio.run, main(n)) for n in range(3)])
    assert [found[number] for number in range(3)] == [expected] * 3


def test_a_loop_that_closes_before_the_answer_ends(gated: tuple[Model, GatedRunner]) -> None:
    """The engine finds nobody to wake, and goes on with the others."""
    model, runner = gated
    kept: list[Any] = []

    async def main() -> None:
        kept.append(AsyncModel(model).stream(QUESTION, **ENDLESS))
        await anext(kept[0])

    runner.hold(2)
    asyncio.run(main())
    runner.go_on()
    assert model.generate("x", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    # Not every token makes a text, and so wakes somebody.
    assert eventually(lambda: model.statistics()["cancelled"])
    ended(model, cancelled=1)


def test_closing_ends_what_is_under_way(gated: tuple[Model, GatedRunner]) -> None:
    model, runner = gated

    async def main() -> None:
        asynchronous = AsyncModel(model)
        answer = asyncio.create_task(asynchronous.chat(QUESTION, **ENDLESS))
        await until(lambda: model.statistics()["running"])
        closing = asyncio.create_task(asynchronous.close())
        await asyncio.sleep(0.01)
        runner.go_on()
        await closing
        with pytest.raises(SmolrunError, match="closed before the answer"):
            await answer

    runner.hold()
    asyncio.run(main())
