"""The arithmetic of benchmarks/serve.py, on given times and against a server that notes its own."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import Any

import pytest

from serve import Answer, ask, bodies_of, load_of, percentile, run, watched


def test_the_figures_of_given_times() -> None:
    """Worked out by hand."""
    answers = [
        Answer(sent=10.0, pieces=(10.5, 10.6, 10.8)),  # TTFT 0.5, TPOT 0.15, gaps 0.1 and 0.2
        Answer(sent=10.2, pieces=(10.3, 10.4)),  # TTFT 0.1, TPOT 0.1
        Answer(sent=11.0, pieces=(12.0,)),  # TTFT 1.0, no TPOT
        Answer(sent=11.0, pieces=(11.5,), error="broke off"),
    ]
    load = load_of(answers, clients=2, ttft_limit=0.6, tpot_limit=0.12)
    assert (load.answers, load.errors) == (3, 1)
    assert load.throughput == pytest.approx(6 / 2.0)  # from 10.0 to 12.0
    assert load.goodput == pytest.approx(1 / 2.0)  # the second only
    assert load.ttft == pytest.approx((0.5, 1.0))
    assert load.tpot == pytest.approx((0.125, 0.15))
    assert load.gap == pytest.approx((0.1, 0.2))
    assert load_of(answers, 2, ttft_limit=2, tpot_limit=1).goodput == pytest.approx(3 / 2.0)
    assert math.isnan(answers[2].tpot)


def test_percentiles_are_nearest_ranks() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([7], 0.99) == 7


def test_prompts_share_no_prefix() -> None:
    prompts = [body["prompt"].split() for body in bodies_of(50, 8, 60, 5, [0, 2])]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 50
    assert prompts == [body["prompt"].split() for body in bodies_of(50, 8, 60, 5, [0, 2])]


class Mock:
    """A server that answers in a known rhythm, and notes when it sent what."""

    def __init__(self, first: float, gap: float, count: int) -> None:
        self.first, self.gap, self.count = first, gap, count
        self.sent: list[list[float]] = []
        self.asked: list[float] = []
        self.under_way = self.most = 0

    async def answer(self, reader: Any, writer: Any) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        self.asked.append(time.perf_counter())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        if body["prompt"] == "refuse":
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\nlater")
        else:
            await self._stream(writer, body["prompt"] == "break off")
        self.under_way -= 1
        writer.close()

    async def _stream(self, writer: Any, broken: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self._event(writer, b": ping")
        self._event(writer, b'data: {"choices": [{"text": ""}]}')  # no text, no token
        times: list[float] = []
        for number in range(self.count):
            await asyncio.sleep(self.gap if number else self.first)
            times.append(time.perf_counter())
            self._event(writer, b'data: {"choices": [{"text": "a"}]}')
            await writer.drain()
        self.sent.append(times)
        if not broken:
            self._event(writer, b"data: [DONE]")
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: Any, line: bytes) -> None:
        writer.write(b"%x\r\n%b\n\n\r\n" % (len(line) + 2, line))


async def measured(mock: Mock, bodies: list[dict[str, Any]], clients: int) -> list[Answer]:
    server = await asyncio.start_server(mock.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        return await run(f"http://127.0.0.1:{port}/v1/completions", bodies, clients)


def test_the_client_sees_what_the_server_did() -> None:
    """Compared with what the server noted, so a machine that is slow is no matter.

    A pause between the server's note and the client's look is one: it may come once, not always.
    """

    def close() -> bool:
        mock = Mock(first=0.05, gap=0.01, count=20)
        answers = asyncio.run(measured(mock, [{"prompt": "x"}] * 6, clients=3))
        assert mock.most == 3
        assert len(answers) == 6
        for asked, sent in zip(sorted(mock.asked), sorted(a.sent for a in answers), strict=True):
            assert sent <= asked
        by_end = sorted(answers, key=lambda answer: answer.pieces[-1])
        same = []
        for answer, times in zip(by_end, sorted(mock.sent, key=max), strict=True):
            assert answer.error is None
            assert len(answer.pieces) == 20
            assert answer.tpot >= 0.0099
            assert answer.ttft >= 0.0499
            expected = (times[-1] - times[0]) / 19
            same.append(answer.tpot == pytest.approx(expected, rel=0.05, abs=0.002))
        load = load_of(answers, 3, 10, 10)
        total = max(map(max, mock.sent)) - min(answer.sent for answer in answers)
        same.append(load.throughput == pytest.approx(120 / total, rel=0.05))
        return all(same)

    assert any(close() for _ in range(10))


def test_errors_are_counted() -> None:
    mock = Mock(first=0.0, gap=0.0, count=3)
    bodies = [{"prompt": prompt} for prompt in ("x", "refuse", "break off")]
    answers = asyncio.run(measured(mock, bodies, clients=1))
    assert [answer.error is None for answer in answers] == [True, False, False]
    assert "429" in str(answers[1].error)
    load = load_of(answers, 1, 10, 10)
    assert (load.answers, load.errors) == (1, 2)
    nobody = asyncio.run(ask("http://127.0.0.1:9/v1/completions", {}))
    assert nobody.error


@pytest.mark.parametrize("status", [b"200 OK", b"503 Service Unavailable"])
def test_health_is_timed_meanwhile(status: bytes) -> None:
    async def answer(reader: Any, writer: Any) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /health ")
        try:
            await asyncio.sleep(0.03)
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
        finally:
            writer.close()

    async def main() -> tuple[str, list[float]]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            return await watched(f"http://127.0.0.1:{port}/v1", asyncio.sleep(0.5, "done"))

    done, times = asyncio.run(main())
    assert done == "done"
    assert times
    assert all(0.0299 <= seconds < math.inf for seconds in times) == status.startswith(b"200")
    assert all(seconds == math.inf for seconds in times) == status.startswith(b"503")
