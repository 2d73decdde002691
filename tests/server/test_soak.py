"""SRV-10: mixed traffic with errors and disconnects leaves memory, files and threads alone."""

from __future__ import annotations

import contextlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import eventually

from .running import CHAT, GREEDY
from .test_process import command, large, serving

__all__ = ["large"]  # a fixture

SECONDS = float(os.environ.get("SMOLRUN_SOAK_SECONDS", "60"))
CLIENTS = 6
# RSS may grow by 1 MiB in ten minutes, and is known to a few pages of each thread.
GROWTH = (1 << 20) * max(SECONDS / 600, 1) + (2 << 20)


class State:
    """What a process holds."""

    def __init__(self, pid: int) -> None:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status if ":" in line)
        self.rss = int(fields["VmRSS"].split()[0]) << 10
        self.threads = int(fields["Threads"])
        self.files = len(os.listdir(f"/proc/{pid}/fd"))


def ask(client: httpx.Client, choose: random.Random) -> int:
    """One request of some kind; its status."""
    content = " ".join(str(choose.random()) for _ in range(choose.randint(1, 40)))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": choose.randint(1, 60),
        "seed": choose.randint(0, 2**63),
        "temperature": choose.choice([0, 1]),
    }
    kind = choose.randrange(9)
    if kind == 0:
        with client.stream(
            "POST", CHAT, json={**body, "max_tokens": 2000, "stream": True}
        ) as reply:
            for number, _ in enumerate(reply.iter_raw()):
                if number > 3:
                    break
        return reply.status_code
    if kind == 1:
        return client.post(CHAT, json={**body, "messages": [], "n": 99}).status_code
    if kind == 2:
        return client.post("/tokenize", json={"content": content * 20}).status_code
    if kind == 3:
        return client.post("/v1/score", json={"prompt": content, "choices": ["a", "b"]}).status_code
    if kind == 4:
        form = {"regex": f"[a-{choose.choice('bcdefg')}]{{{choose.randint(1, 30)}}}"}
        return client.post(CHAT, json={**body, **form}).status_code
    if kind == 5:
        prompt = {"prompt": [5] * choose.randint(1, 600), "max_tokens": 3, "echo": True}
        return client.post("/v1/completions", json={**prompt, "logprobs": 2}).status_code
    if kind == 6:
        with contextlib.suppress(httpx.ReadTimeout):
            return client.post(CHAT, json={**body, "max_tokens": 3000}, timeout=0.1).status_code
        return 499
    if kind == 7:
        return client.post("/v1/embeddings", json={"input": [content, "b"]}).status_code
    with client.stream("POST", CHAT, json={**body, "stream": True, "logprobs": True}) as reply:
        reply.read()
    return reply.status_code


@pytest.mark.long
@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows(large: Path) -> None:
    # A small pool, all of whose blocks are written before memory is looked at: later they would be
    # whenever more long requests than before happen to run side by side.
    with serving(*command(large, "-c", "4096", "--parallel", "4")) as server:
        url = server.event("listening")["url"]
        server.event("ready")
        pid = server.process.pid
        statuses: set[int] = set()

        def work(number: int) -> None:
            choose = random.Random(number)
            with httpx.Client(base_url=url, timeout=120) as client:
                while time.monotonic() < deadline:
                    statuses.add(ask(client, choose))

        with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(CLIENTS) as pool:
            expected = client.post(CHAT, json=GREEDY).json()["choices"]
            long = [
                {"prompt": [number] * 3000, "max_tokens": 1000, "ignore_eos": True}
                for number in range(5, 9)
            ]
            for reply in pool.map(lambda body: client.post("/v1/completions", json=body), long):
                assert reply.json()["usage"]["completion_tokens"] == 1000
            deadline = time.monotonic() + SECONDS
            jobs = [pool.submit(work, number) for number in range(CLIENTS)]
            time.sleep(SECONDS / 3)  # caches fill up, threads start
            early = State(pid)
            for job in jobs:
                job.result()
            idle = "smolrun:num_requests_running 0.0"
            assert eventually(lambda: idle in client.get("/metrics").text)
            late = State(pid)
            assert client.post(CHAT, json=GREEDY).json()["choices"] == expected
        assert statuses <= {200, 400, 429, 499}
        assert late.rss - early.rss < GROWTH, (early.rss, late.rss)
        assert late.threads <= early.threads
        assert late.files <= early.files
        assert not [line for line in server.lines if "traceback" in line]
