"""64 at a time, some of whom leave early: everyone else gets the bits that it gets alone."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from smolrun import AsyncModel, Model, Terms, TextEvent


def arguments_of(number: int) -> dict[str, Any]:
    """A request like no other, with a seed of its own."""
    generator = random.Random(number)
    return {
        "max_tokens": generator.randint(4, 24),
        "temperature": generator.choice([0, 0.7, 1.2]),
        "top_p": generator.choice([0.8, 1.0]),
        "seed": number,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
    }


def prompt_of(number: int) -> list[int]:
    """Some begin alike, so that blocks of the prefix cache are shared."""
    generator = random.Random(1000 + number)
    shared = [random.Random(number % 3).randrange(3, 300) for _ in range(40)]
    return (shared if number % 2 else []) + generator.choices(range(3, 300), k=number % 50 + 1)


def test_sixty_four_neighbours_of_whom_some_leave(tiny_folder: Path) -> None:
    count = 64
    with Model(tiny_folder, threads=1, max_sequences=1) as alone:
        expected = [alone.generate(prompt_of(n), **arguments_of(n)) for n in range(count)]

    async def ask(model: AsyncModel, number: int) -> None:
        terms = Terms(key=str(number % 5), salt=bytes([number % 2]))
        stream = model.stream_text(prompt_of(number), terms=terms, **arguments_of(number))
        if number % 4 == 3:  # leaves
            async with stream:
                for _ in range(number % 3):
                    await anext(stream)
            return
        texts: list[str] = []
        async for event in stream:
            if isinstance(event, TextEvent):
                texts.append(event.text)
            else:
                result = getattr(event, "result", None)
        assert result is not None
        assert result.token_ids == expected[number].token_ids
        assert result.logprobs == expected[number].logprobs  # to the last bit
        assert "".join(texts) == result.text == expected[number].text

    async def main(model: Model) -> None:
        for _ in range(2):  # the second time most prompts come from the prefix cache
            asynchronous = AsyncModel(model)
            await asyncio.gather(*(ask(asynchronous, number) for number in range(count)))

    with Model(tiny_folder, threads=2, max_sequences=64) as model:
        asyncio.run(main(model))
        assert model.drain(60)
        statistics = model.statistics()
    assert statistics["kv_blocks_held"] == statistics["places_taken"] == statistics["failed"] == 0
    assert statistics["cached_tokens"] > 0
    assert statistics["cancelled"] > 0
