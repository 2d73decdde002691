"""One request can not hurt another: many at once, failures of one among them, and turns."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolrun import Model
from smolrun.engine.answer import Answer
from smolrun.engine.sampling import Sampler
from smolrun.server import chat
from smolrun.server.service import Settings
from smolrun.text.chat import ChatTemplate
from tests.waiting import SECONDS, eventually

from .running import CHAT, GREEDY, Running, chunks_of, slowed

CLIENTS = 64
KEYS = ("key-a", "key-b")


@pytest.fixture(scope="module")
def wide(folder: Path) -> Iterator[Running]:
    """Sixteen answers side by side."""
    with (
        Model(folder, threads=1, max_sequences=16) as model,
        Running(model, Settings(parallel=16)) as running,
    ):
        yield running


def texts(reply: httpx.Response) -> str:
    """Reasoning and answer, of a stream or of a whole reply."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("application/json"):
        parts = [reply.json()["choices"][0]["message"]]
    else:
        parts = [c["delta"] for chunk in chunks_of(reply) for c in chunk["choices"]]
    reasoning = "".join(part.get("reasoning_content") or "" for part in parts)
    return reasoning + "|" + "".join(part.get("content") or "" for part in parts)


def test_many_clients_at_once(wide: Running) -> None:  # ISO-01, shortened
    words = ["the", "sky", "is", "blue", "because", "air", "scatters", "short", "waves"]

    def made(number: int) -> dict[str, Any]:
        choose = random.Random(number)
        content = " ".join(choose.choices(words, k=choose.randint(1, 60)))
        return {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": choose.randint(1, 40),
            "temperature": choose.choice([0, 0.7, 1.5]),
            "seed": number,
            "stream": choose.random() < 0.5,
            "ignore_eos": True,
        }

    bodies = [made(number) for number in range(CLIENTS)]
    alone = [texts(wide.post(CHAT, body)) for body in bodies]

    def ask(number: int) -> bool:
        with httpx.Client(base_url=wide.url, timeout=SECONDS) as client:
            if number % 4 == 3:  # this one leaves
                body = {**bodies[number], "max_tokens": 1000, "stream": True}
                with client.stream("POST", CHAT, json=body) as reply:
                    next(reply.iter_raw())
                return True
            return texts(client.post(CHAT, json=bodies[number])) == alone[number]

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert all(pool.map(ask, range(CLIENTS)))
    wide.check_health()


def test_nothing_around_a_request_changes_a_bit(wide: Running, folder: Path) -> None:
    """NUM-01/02/03 with logprobs: threads, neighbours, and prompts that the cache knows."""
    bodies = [
        {
            "messages": [{"role": "user", "content": f"{number} " + "and so on " * (10 * number)}],
            "max_tokens": 12,
            "temperature": number % 2,
            "seed": number,
            "logprobs": True,
            "top_logprobs": 3,
            "ignore_eos": True,
        }
        for number in range(8)
    ]

    def choices(running: Running, body: dict[str, Any]) -> Any:
        reply = running.post(CHAT, body)
        assert reply.status_code == 200, reply.text
        cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        return reply.json()["choices"]

    cached: list[int] = []
    expected = [choices(wide, body) for body in bodies]
    assert len({json.dumps(choice["logprobs"]) for (choice,) in expected}) == len(bodies)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda body: choices(wide, body), bodies)) == expected
    assert max(cached[:8]) < max(cached[8:])
    for threads in (2, 3):
        with (
            Model(folder, threads=threads, context_size=1024) as model,
            Running(model, Settings()) as other,
        ):
            assert [choices(other, body) for body in bodies] == expected


def breaks(owner: Any, name: str, marked: Callable[..., bool]) -> Callable[..., Any]:
    """A method that fails for the marked request only."""
    method = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if marked(*arguments, **options):
            raise RuntimeError("broken on purpose")
        return method(*arguments, **options)

    return failing


BAD_SEED = 666
STAGES: list[tuple[Any, str, Callable[..., bool]]] = [
    (ChatTemplate, "encode", lambda _, messages, **__: "BAD" in str(messages)),
    (Sampler, "sample", lambda self, *_: self.parameters.seed == BAD_SEED),
    (Answer, "finish", lambda _, ending: ending.seed == BAD_SEED),
    (chat._Reply, "whole", lambda _, finished: finished[0].result.seed == BAD_SEED),
    (chat._Reply, "_end", lambda _, __, result: result.seed == BAD_SEED),
]


@pytest.mark.parametrize(("owner", "name", "marked"), STAGES, ids=[s[1] for s in STAGES])
def test_what_breaks_one_breaks_no_other(
    wide: Running,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    marked: Callable[..., bool],
) -> None:  # ENG-01
    stream = name == "_end"
    bodies = [
        {**GREEDY, "messages": [{"role": "user", "content": f"Number {n}"}], "seed": n,
         "stream": stream, "max_tokens": 20, "ignore_eos": True}
        for n in range(8)
    ]  # fmt: skip
    alone = [texts(wide.post(CHAT, body)) for body in bodies]
    bad = {**bodies[0], "seed": BAD_SEED, "messages": [{"role": "user", "content": "BAD"}]}
    monkeypatch.setattr(owner, name, breaks(owner, name, marked))
    with ThreadPoolExecutor(9) as pool:
        failing = pool.submit(wide.post, CHAT, bad)
        good = list(pool.map(lambda body: texts(wide.post(CHAT, body)), bodies))
    assert good == alone
    reply = failing.result()
    error = chunks_of(reply)[-1]["error"] if stream else reply.json()["error"]
    assert reply.status_code == (200 if stream else 500)
    assert error["type"] == "server_error"
    assert "Traceback" not in json.dumps(error)
    tracebacks = [record for record in wide.log.records if record.exc_info]
    assert len(tracebacks) <= 1
    wide.log.records.clear()
    wide.check_health()


def test_a_short_request_is_not_held_up(wide: Running) -> None:  # SRV-06
    long = {**GREEDY, "max_tokens": 300, "ignore_eos": True}
    body = {**GREEDY, "stream": True, "messages": [{"role": "user", "content": "Short?"}]}
    with ThreadPoolExecutor(8) as pool:
        with slowed(wide.model, 0.2):
            jobs = [pool.submit(wide.post, CHAT, long) for _ in range(8)]
            assert eventually(lambda: wide.statistics()["running"] == 8)
            before = wide.statistics()["steps"]
            with wide.client.stream("POST", CHAT, json=body) as reply:
                lines = (line for line in reply.iter_lines() if line and '"role"' not in line)
                next(lines)
            assert wide.statistics()["steps"] - before <= 10
        assert all(job.result().status_code == 200 for job in jobs)


def test_keys_take_turns(folder: Path) -> None:  # SRV-06
    with (
        Model(folder, threads=1, max_sequences=2) as model,
        Running(model, Settings(parallel=2, api_keys=KEYS)) as running,
        slowed(model, 0.05) as slow,
        ThreadPoolExecutor(11) as pool,
    ):
        ended: list[str] = []

        def ask(key: str) -> None:
            body = {**GREEDY, "max_tokens": 15, "ignore_eos": True}
            headers = {"authorization": f"Bearer {key}"}
            assert running.client.post(CHAT, json=body, headers=headers).status_code == 200
            ended.append(key)

        crowd = [pool.submit(ask, KEYS[0]) for _ in range(10)]
        assert eventually(lambda: running.statistics()["waiting"] == 8)
        pool.submit(ask, KEYS[1]).result()
        slow.seconds = 0
        assert ended.index(KEYS[1]) <= 5
        for one in crowd:
            one.result()


@pytest.mark.parametrize("how", ["replaced", "cut short"])
def test_the_file_of_a_model_that_serves_changes(
    folder: Path, tmp_path: Path, how: str
) -> None:  # MEM-03
    """Weights are packed when they are loaded, so not even a file that is cut short matters."""
    own = shutil.copytree(folder, tmp_path / "model")
    weights = own / "model.safetensors"
    with Model(own, threads=1) as model, Running(model, Settings()) as running:
        if how == "replaced":
            (tmp_path / "other").write_bytes(b"nothing of a model")
            os.replace(tmp_path / "other", weights)
        else:
            with weights.open("r+b") as file:
                file.truncate(1000)
        running.check_health()
        vector = running.post("/v1/embeddings", {"input": "The sky"})
        assert vector.status_code == 200
        running.check_health()
