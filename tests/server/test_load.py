"""Full queues, slow clients, fairness to the others, and metrics meanwhile."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from smolrun import Model
from smolrun.server.limits import Limits
from smolrun.server.service import Settings
from tests.waiting import SECONDS, eventually

from .running import CHAT, GREEDY, Running, limited, slowed

QUEUE = 8


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Running]:
    """Four answers at a time, eight more may wait, and these have 1000 tokens at most."""
    limits = replace(Limits(), queued_requests=QUEUE, queued_tokens=1000)
    with (
        Model(folder, threads=1, max_sequences=4) as model,
        Running(model, Settings(limits=limits)) as running,
    ):
        yield running


def percentile(times: list[float], share: float = 0.99) -> float:
    return sorted(times)[min(int(len(times) * share), len(times) - 1)]


def test_a_full_queue(small: Running) -> None:  # SRV-01, SRV-08
    body = {**GREEDY, "max_tokens": 30, "ignore_eos": True}
    expected = small.answer(max_tokens=30, ignore_eos=True)
    places = 4 + QUEUE
    stop = threading.Event()
    times: dict[str, list[float]] = {"/health": [], "/metrics": []}

    def ask(path: str) -> None:
        with httpx.Client(base_url=small.url, timeout=SECONDS) as client:
            while not stop.is_set():
                started = time.perf_counter()
                assert client.get(path).status_code == 200
                times[path].append(time.perf_counter() - started)
                time.sleep(0.01)

    with slowed(small.model, 1) as slow, ThreadPoolExecutor(102) as pool:
        watching = [pool.submit(ask, path) for path in times]
        limits = httpx.Limits(max_connections=None)
        try:
            with httpx.Client(base_url=small.url, timeout=SECONDS, limits=limits) as client:
                asked = [pool.submit(client.post, CHAT, json=body) for _ in range(100)]
                assert eventually(lambda: sum(one.done() for one in asked) == 100 - places)
                slow.seconds = 0
                replies = [one.result() for one in asked]
        finally:
            stop.set()
        for watch in watching:
            watch.result()
    accepted = [reply for reply in replies if reply.status_code == 200]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert (len(accepted), len(refused)) == (places, 100 - places)
    for reply in accepted:
        message = reply.json()["choices"][0]["message"]
        assert str(message.get("reasoning_content", "")) + message["content"] == expected
    for reply in refused:
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert reply.json()["error"]["code"] == "queue_full"
    assert times["/health"]
    assert times["/metrics"]
    small.check_health()


def test_places_are_exact(small: Running) -> None:
    """At and above the limit, for requests of several answers too."""
    body = {"prompt": ["a"] * 6, "n": 2, "max_tokens": 60, "ignore_eos": True}
    with slowed(small.model, 0.3) as slow, ThreadPoolExecutor(1) as pool:
        full = pool.submit(small.post, "/v1/completions", body)
        assert eventually(lambda: small.service.places_taken == 12)
        assert small.post(CHAT, GREEDY).status_code == 429
        slow.seconds = 0
        assert full.result().status_code == 200
    reply = small.post("/v1/completions", {"prompt": ["a"] * 7, "n": 2})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"
    small.check_health()


def test_prompt_tokens_that_wait(small: Running) -> None:
    """At and above the limit; one prompt may always wait."""

    def waiting() -> int:
        return small.statistics()["waiting_tokens"]

    def ask(tokens: int) -> httpx.Response:
        return small.post("/v1/completions", {"prompt": [5] * tokens, "max_tokens": 1})

    body = {"prompt": ["a"] * 4, "max_tokens": 200, "ignore_eos": True}
    with slowed(small.model, 0.1) as slow, ThreadPoolExecutor(3) as pool:
        four = pool.submit(small.post, "/v1/completions", body)
        assert eventually(lambda: small.statistics()["running"] == 4)
        first = pool.submit(ask, 600)
        assert eventually(lambda: waiting() == 600)
        second = pool.submit(ask, 400)
        assert eventually(lambda: waiting() == 1000)
        refused = ask(1)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        slow.seconds = 0
        assert [one.result().status_code for one in (four, first, second)] == [200] * 3
    small.check_health()


def test_side_requests_have_a_limit_of_their_own(model: Model) -> None:
    limits = replace(Limits(), side_requests=1)
    with Running(model, Settings(limits=limits)) as running:
        (place,) = running.service.side_places.take()
        assert running.post("/tokenize", {"content": "a"}).status_code == 429
        assert running.post("/v1/score", {"prompt": "a", "choices": ["b"]}).status_code == 429
        assert running.post(CHAT, GREEDY).status_code == 200
        place.leave()
        assert running.post("/tokenize", {"content": "a"}).status_code == 200


def test_a_total_time(model: Model) -> None:  # SRV-05
    body = {**GREEDY, "max_tokens": 1000, "ignore_eos": True}
    with Running(model, Settings()) as running:
        with slowed(model, 0.01), limited(running, total_seconds=1.0):
            reply = running.post(CHAT, body)
            assert reply.status_code == 504
            assert reply.json()["error"]["code"] == "timeout"
            assert running.settled()
            reply = running.post(CHAT, {**body, "stream": True})
            assert reply.status_code == 200
            assert '"code":"timeout"' in reply.text
            assert reply.text.endswith("data: [DONE]\n\n")
            assert running.settled()
        running.check_health()


def test_a_time_in_the_queue(folder: Path) -> None:  # SRV-05
    with (
        Model(folder, threads=1, max_sequences=1) as model,
        Running(model, Settings(parallel=1)) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        with slowed(model, 0.1) as slow:
            body = {**GREEDY, "max_tokens": 300, "ignore_eos": True}
            first = pool.submit(running.post, CHAT, body)
            assert eventually(lambda: running.statistics()["running"] == 1)
            with limited(running, queue_seconds=0.3):
                reply = running.post(CHAT, GREEDY)
                streamed = running.post(CHAT, {**GREEDY, "stream": True})
            slow.seconds = 0
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "queue_timeout"
            assert reply.headers["retry-after"]
            assert '"code":"queue_timeout"' in streamed.text
            assert first.result().status_code == 200
        running.check_health()


def test_long_texts(healthy: Running) -> None:  # TOK-01
    texts = ["A" * 1_000_000, " " * 1_000_000, "한" * 26_000, "👍" * 400_000]
    times: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=healthy.url, timeout=SECONDS) as client:
            while not stop.is_set():
                started = time.perf_counter()
                assert client.get("/health").status_code == 200
                times.append(time.perf_counter() - started)

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(ask)
        try:
            for text in texts:
                reply = healthy.post("/tokenize", {"content": text})
                assert reply.status_code == 200
                assert reply.json()["count"] > 10_000
        finally:
            stop.set()
        watching.result()
    assert len(times) > 10  # it answered all the while


def test_slow_headers(model: Model) -> None:  # SRV-09
    limits = replace(Limits(), header_seconds=2)
    with Running(model, Settings(limits=limits)) as running:
        address = (running.host, running.port)
        slow = [socket.create_connection(address, SECONDS) for _ in range(200)]
        for number, connection in enumerate(slow):
            connection.sendall(b"G" if number % 2 else b"GET /health HTTP/1.1\r\nHost: loc")
        assert running.answer() == running.expected
        for connection in slow:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
            connection.close()
        assert eventually(lambda: len(running.server.server_state.connections) <= 1)
        # A second request of a connection has its own time.
        with socket.create_connection(address, SECONDS) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                piece = connection.recv(65536)
                assert piece, reply
                reply += piece
            assert reply.startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /hea")
            assert connection.recv(65536) == b""
        running.check_health()


def test_slow_bodies(model: Model) -> None:
    with Running(model, Settings()) as running:
        address = (running.host, running.port)
        with (
            limited(running, body_seconds=0.3),
            socket.create_connection(address, SECONDS) as connection,
        ):
            connection.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        running.check_health()


def test_connections_have_a_limit(model: Model) -> None:
    limits = replace(Limits(), connections=5)
    with Running(model, Settings(limits=limits)) as running:
        many = [socket.create_connection((running.host, running.port), SECONDS) for _ in range(8)]

        def closed() -> int:
            return len(select.select(many, [], [], 0.2)[0])

        assert eventually(lambda: closed() >= 4)
        assert closed() == 4  # the client of the test holds one
        for connection in many:
            connection.close()
        running.check_health()


@pytest.mark.parametrize("chunked", [False, True])
def test_the_size_of_a_body(healthy: Running, chunked: bool) -> None:  # API-07
    limit = healthy.service.limits.body_bytes

    def send(size: int) -> httpx.Response:
        body = b'{"unknown": "' + b"a" * (size - 15) + b'"}'
        assert len(body) == size
        headers = {"content-type": "application/json"}
        content = iter([body[:1000], body[1000:]]) if chunked else body
        return healthy.client.post("/tokenize", content=content, headers=headers)

    assert send(limit - 1).json()["error"]["code"] == "unknown_parameter"
    assert send(limit).json()["error"]["code"] == "unknown_parameter"
    try:
        reply = send(limit + 1)
    except httpx.WriteError:  # it did not wait for the rest
        return
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"


def test_metrics(model: Model) -> None:  # OBS-01
    with Running(model, Settings()) as running:

        def read() -> dict[str, float]:
            text = running.client.get("/metrics").text
            assert "_created" not in text  # times that no dashboard asks for
            families = list(text_string_to_metric_families(text))
            assert all(family.documentation for family in families)
            return {
                sample.name + str(sorted(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            }

        before = read()
        usages = [
            running.post("/v1/completions", body).json()["usage"]
            for body in (
                {"prompt": "The sky", "max_tokens": 5},
                {"prompt": ["a b c", "d"], "max_tokens": 3, "n": 2, "temperature": 1},
            )
        ]
        assert running.post(CHAT, {"messages": []}).status_code == 400
        after = read()
        for key, value in before.items():
            if key.partition("[")[0].endswith(("_total", "_count", "_sum", "_bucket")):
                assert after[key] >= value, key

        def grown(name: str, labels: str = "[]") -> float:
            key = f"smolrun:{name}{labels}"
            return after.get(key, 0) - before.get(key, 0)

        prompt = sum(usage["prompt_tokens"] for usage in usages)
        completion = sum(usage["completion_tokens"] for usage in usages)
        assert grown("prompt_tokens_total") == prompt
        assert grown("generation_tokens_total") == completion
        assert grown("e2e_request_latency_seconds_count") == 5
        assert grown("time_to_first_token_seconds_count") == 5
        assert grown("http_requests_total", "[('status', '400')]") == 1
        assert after["smolrun:num_requests_running[]"] == 0
        assert after["process_resident_memory_bytes[]"] > 1e6
        for name in ("num_requests_waiting", "kv_cache_usage_perc", "corrupted_requests_total",
                     "prefix_cache_hits_total", "requests_cancelled_total"):  # fmt: skip
            assert f"smolrun:{name}[]" in after
