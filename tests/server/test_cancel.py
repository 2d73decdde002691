"""A client that goes takes its answers with it, and nobody else's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from smolrun import Model
from smolrun.server.limits import Limits
from smolrun.server.service import Settings
from tests.waiting import eventually

from .running import CHAT, GREEDY, Running, slowed

LONG: dict[str, Any] = {**GREEDY, "max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(autouse=True)
def slow(model: Model) -> Iterator[None]:
    """1500 tokens take 15 s at least: a client goes long before they are there."""
    with slowed(model, 0.01):
        yield


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def connect(server: Running, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    connection = socket.create_connection((server.host, server.port), 30)
    connection.sendall(post(path, body))
    return connection


def running(server: Running) -> bool:
    return server.statistics()["running"] > 0


def messages(server: Running) -> list[str]:
    return [record.getMessage() for record in server.log.records]


def check_ends_early(server: Running, cancelled: int) -> None:
    """One that ran to its end does not count as cancelled."""
    assert server.settled()
    assert server.statistics()["cancelled"] == cancelled + 1
    assert eventually(lambda: server.statistics()["kv_blocks_held"] == server.blocks_held)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "half", "reset"])
def test_a_client_goes(healthy: Running, stream: bool, how: str) -> None:  # CAN-01, CAN-02
    cancelled = healthy.statistics()["cancelled"]
    connection = connect(healthy, {**LONG, "stream": stream})
    assert eventually(lambda: running(healthy))
    if stream:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
    elif how == "reset":
        linger = b"\x01\0\0\0\0\0\0\0"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    else:
        connection.close()
    check_ends_early(healthy, cancelled)
    connection.close()
    assert not [r for r in healthy.log.records if r.exc_info]


def test_a_client_is_killed(healthy: Running) -> None:  # CAN-02
    cancelled = healthy.statistics()["cancelled"]
    script = (
        "import socket, sys, time; "
        f"s = socket.create_connection(({healthy.host!r}, {healthy.port})); "
        f"s.sendall({post(CHAT, LONG)!r}); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", script]) as client:
        try:
            assert eventually(lambda: running(healthy))
        finally:
            client.kill()
    check_ends_early(healthy, cancelled)


def test_while_its_prompt_is_read(healthy: Running) -> None:  # CAN-02
    """1900 tokens are eight chunks; it ends at the next one."""
    cancelled, steps = (healthy.statistics()[name] for name in ("cancelled", "steps"))
    body = {"prompt": [5 + i % 350 for i in range(1900)], "max_tokens": 100, "ignore_eos": True}
    with slowed(healthy.model, 1):
        connection = connect(healthy, body, "/v1/completions")
        assert eventually(lambda: running(healthy))
        connection.close()
        check_ends_early(healthy, cancelled)
    assert healthy.statistics()["steps"] - steps < 7


def test_while_it_waits(healthy: Running) -> None:  # CAN-03
    cancelled = healthy.statistics()["cancelled"]
    body = {**GREEDY, "max_tokens": 100, "ignore_eos": True}
    expected = healthy.answer(max_tokens=100, ignore_eos=True)
    with slowed(healthy.model, 0.3) as slow, ThreadPoolExecutor(4) as pool:
        four = [pool.submit(healthy.post, CHAT, body) for _ in range(4)]
        assert eventually(lambda: healthy.statistics()["running"] == 4)
        before = healthy.statistics()["completion_tokens"]
        fifth = connect(healthy, LONG)
        assert eventually(lambda: healthy.statistics()["waiting"] == 1)
        fifth.close()
        assert eventually(lambda: healthy.statistics()["waiting"] == 0)
        assert healthy.statistics()["running"] == 4
        slow.seconds = 0
        for one in four:
            message = one.result().json()["choices"][0]["message"]
            assert str(message.get("reasoning_content", "")) + message["content"] == expected
    assert healthy.settled()
    assert healthy.statistics()["cancelled"] == cancelled + 1
    assert healthy.statistics()["completion_tokens"] - before == 400  # it never began


def test_a_client_that_stops_reading(model: Model) -> None:  # CAN-04
    limits = replace(Limits(), write_seconds=0.5)
    with Running(model, Settings(limits=limits)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        body = {**GREEDY, "n": 8, "stream": True, "logprobs": True, "top_logprobs": 20}
        body |= {"max_tokens": 1500, "ignore_eos": True, "temperature": 1, "think": False}
        with slowed(model, 0):
            cancelled = server.statistics()["cancelled"]
            connection.sendall(post(CHAT, body))
            assert eventually(lambda: running(server))
            assert server.answer() == server.expected  # it blocks nobody
            assert eventually(lambda: "dropped a slow client" in messages(server))
            assert server.settled()
            assert server.statistics()["cancelled"] > cancelled
        connection.close()
        server.check_health()
