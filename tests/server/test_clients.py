"""Clients that people use, at their defaults."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from smolrun import Model, NonFiniteError
from smolrun.server.limits import Limits
from smolrun.server.service import Settings
from tests.waiting import SECONDS

from .running import GREEDY, Running, slowed

KEY = "sk-test"
MESSAGES: Any = GREEDY["messages"]


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[Running]:
    with Running(model, Settings(api_keys=(KEY,), names=("tiny",))) as running:
        yield running


@pytest.fixture(scope="module")
def client(guarded: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key=KEY, timeout=SECONDS) as client:
        yield client


def test_openai(client: openai.OpenAI, guarded: Running) -> None:  # CLI-01, STR-04
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, temperature=0
    )
    message = answer.choices[0].message
    assert (getattr(message, "reasoning_content", "") or "") + (message.content or "") == (
        guarded.expected
    )
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        extra_body={"think": False, "top_k": 50},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    vectors = client.embeddings.create(model="tiny", input=["The sky", "a"])
    assert vectors.data[1].embedding == pytest.approx(guarded.model.embed("a"), abs=1e-6)
    completion = client.completions.create(
        model="tiny", prompt="The sky", max_tokens=3, echo=True, logprobs=2
    )
    assert completion.choices[0].text.startswith("The sky")
    assert completion.choices[0].logprobs is not None


def test_openai_errors(client: openai.OpenAI, guarded: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=[])
    assert bad.value.param == "messages"
    stranger = openai.OpenAI(base_url=guarded.url + "/v1", api_key="wrong", timeout=SECONDS)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 3000)
    assert long.value.code == "context_length_exceeded"


def test_openai_sees_an_error_in_a_stream(
    client: openai.OpenAI, guarded: Running, monkeypatch: pytest.MonkeyPatch
) -> None:  # STR-04
    steps = 0
    with slowed(guarded.model, 0):
        slow = guarded.model.loaded.engine.runner
        step = slow.step

        def failing(*arguments: Any) -> None:
            nonlocal steps
            steps += 1
            if steps > 4:
                raise NonFiniteError("non-finite logits at position 9")
            step(*arguments)

        monkeypatch.setattr(slow, "step", failing)
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.APIError, match="non-finite"):
            list(stream)
    guarded.check_health()


def test_openai_async(guarded: Running) -> None:  # CLI-01
    async def ask(client: openai.AsyncOpenAI, count: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=count, temperature=0, stream=True
        )
        text = ""
        async for chunk in stream:
            delta = chunk.choices[0].delta
            text += getattr(delta, "reasoning_content", "") or delta.content or ""
        return text

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=guarded.url + "/v1", api_key=KEY, timeout=SECONDS
        ) as client:
            return await asyncio.gather(*[ask(client, 8) for _ in range(6)])

    assert asyncio.run(run()) == [guarded.expected] * 6


def test_openai_comes_back_when_the_queue_is_full(model: Model) -> None:  # SRV-02
    limits = replace(Limits(), queued_requests=4)
    with (
        Running(model, Settings(limits=limits, names=("tiny",))) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", timeout=SECONDS) as client,
        slowed(model, 0.005),
        ThreadPoolExecutor(16) as pool,
    ):

        def ask(_: int) -> str | None:
            answer = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=8, temperature=0
            )
            message = answer.choices[0].message
            return (getattr(message, "reasoning_content", "") or "") + (message.content or "")

        assert list(pool.map(ask, range(16))) == [running.expected] * 16
        asked = [r for r in running.log.records if vars(r).get("path") == "/v1/chat/completions"]
        assert len(asked) - 1 <= 3 * 16


def test_llm(guarded: Running, tmp_path: Path) -> None:  # CLI-01
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: tiny\n  model_name: tiny\n  api_base: {guarded.url}/v1\n"
        "  api_key_name: tiny\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": KEY}
    environment.pop("PYTHONPATH", None)
    for flags in ([], ["--no-stream"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "tiny", "--key", KEY, "-o", "temperature", "0",
             "-o", "max_tokens", "30", "-n", *flags, "Why is the sky blue?"],
            capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
            timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    guarded.check_health()
