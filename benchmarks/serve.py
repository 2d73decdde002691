"""Servers under load: how soon answers begin, how fast they go on, how many get through.

    python benchmarks/serve.py MODEL.gguf [--clients 1,2,4,8,16,32] [--rounds 3]

starts `smolrun serve` and llama-cpp-python's server on the same file and asks both, in turns, for
the same texts of `--tokens` tokens; no answer ends earlier, end-of-text tokens are biased away. A
client sends its next request when its last has ended. For llama-cpp-python's server `--peer-path`
is where what it needs beside `llama_cpp` is installed (fastapi, sse-starlette, starlette-context,
pydantic-settings, uvicorn).

Terms, per answer of n tokens, of which each arrives in a piece of its own:
  TTFT   from sending the request to the first piece
  TPOT   (last piece - first piece) / (n - 1), as vLLM defines it: the first token is left out
  gap    between two pieces that follow each other
And over all answers: throughput, tokens per second from the first request to the last piece;
goodput, answers per second that keep within --ttft and --tpot.

With --health the time that our /health takes is measured while the clients ask; fewer --parallel
than clients make them queue, and be turned away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

WORDS = (
    *("water", "stone", "light", "river", "glass", "paper", "cloud", "engine", "garden", "winter"),
    *("market", "letter", "bridge", "window", "silver", "island", "forest", "candle", "planet"),
)


@dataclass(frozen=True)
class Answer:
    """What one client saw; times in seconds of one clock."""

    sent: float
    pieces: tuple[float, ...]  # when they arrived
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.sent

    @property
    def tpot(self) -> float:
        """NaN for an answer of one token."""
        count = len(self.pieces) - 1
        return (self.pieces[-1] - self.pieces[0]) / count if count else math.nan

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """The figures of one run."""

    clients: int
    answers: int
    errors: int
    throughput: float  # tokens per second
    goodput: float  # answers per second within both limits
    ttft: tuple[float, float]  # seconds, median and 99th percentile
    tpot: tuple[float, float]
    gap: tuple[float, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else math.nan


def load_of(answers: Iterable[Answer], clients: int, ttft_limit: float, tpot_limit: float) -> Load:
    """The figures of a run."""
    answers = list(answers)
    good = [answer for answer in answers if answer.error is None and answer.pieces]
    begun = min(answer.sent for answer in answers)
    seconds = max((answer.pieces[-1] for answer in good), default=math.inf) - begun
    kept = [
        answer
        for answer in good
        if answer.ttft <= ttft_limit and not answer.tpot > tpot_limit  # one token has no TPOT
    ]

    def both(values: list[float]) -> tuple[float, float]:
        return (statistics.median(values) if values else math.nan, percentile(values, 0.99))

    return Load(
        clients=clients,
        answers=len(good),
        errors=len(answers) - len(good),
        throughput=sum(len(answer.pieces) for answer in good) / seconds,
        goodput=len(kept) / seconds,
        ttft=both([answer.ttft for answer in good]),
        tpot=both([answer.tpot for answer in good if len(answer.pieces) > 1]),
        gap=both([gap for answer in good for gap in answer.gaps]),
    )


# --- a client


async def ask(url: str, body: dict[str, Any]) -> Answer:
    """One streamed answer. What goes wrong is the answer's error."""
    sent = time.perf_counter()
    pieces: list[float] = []
    try:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            data = json.dumps(body).encode()
            writer.write(
                f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            status = await reader.readline()
            if status.split()[1:2] != [b"200"]:
                return Answer(sent, (), (status + await reader.read()).decode(errors="replace"))
            # Events are lines of their own; the sizes of HTTP chunks stand on other lines.
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    if line.startswith(b"data: [DONE]"):
                        return Answer(sent, tuple(pieces), None if pieces else "no text")
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Answer(sent, tuple(pieces), str(event["error"]))
                if any(_text(choice) for choice in event.get("choices", ())):
                    pieces.append(time.perf_counter())
        finally:
            writer.close()
    except OSError as error:
        return Answer(sent, tuple(pieces), str(error))
    return Answer(sent, tuple(pieces), "the stream broke off")


def _text(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "")


async def run(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> list[Answer]:
    """Ask for all of `bodies`, `clients` at a time."""
    waiting = iter(bodies)

    async def client() -> list[Answer]:
        return [await ask(url, body) for body in waiting]

    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [answer for answers in found for answer in answers]


async def watched(url: str, answers: Awaitable[T]) -> tuple[T, list[float]]:
    """What `answers` comes to, and how many seconds /health of the server took meanwhile."""
    parts = urlsplit(url)
    request = f"GET /health HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
    times: list[float] = []
    over = False

    async def watch() -> None:
        while not over:
            begun = time.perf_counter()
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(request.encode())
            healthy = (await reader.read()).split()[1:2] == [b"200"]
            writer.close()
            times.append(time.perf_counter() - begun if healthy else math.inf)
            await asyncio.sleep(0.02)

    watching = asyncio.ensure_future(watch())
    try:
        return await answers, times
    finally:
        over = True
        await watching


def bodies_of(
    count: int, tokens: int, words: int, seed: int, bias: Sequence[int]
) -> list[dict[str, Any]]:
    """Requests for texts that share no prefix."""
    generator = random.Random(seed)
    return [
        {
            "model": "bench",
            "prompt": " ".join(generator.choices(WORDS, k=words)),
            "max_tokens": tokens,
            "temperature": 0.8,
            "seed": number,
            "stream": True,
            "logit_bias": {str(token): -100 for token in bias},
        }
        for number in range(count)
    ]


# --- servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started(command: list[str], port: int, environment: dict[str, str]) -> Iterator[str]:
    """A server's address, once it knows its models."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    drained = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
    try:
        while not _answers(port):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.wait()
        drained.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(
                b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            return connection.recv(64).split()[1:2] == [b"200"]
    except OSError:
        return False


def servers(options: argparse.Namespace) -> dict[str, tuple[list[str], int, dict[str, str]]]:
    """Name: command, port, environment."""
    ours, theirs = free_port(), free_port()
    most = options.parallel or max(options.clients)
    source = str(Path(__file__).resolve().parent.parent / "src")
    paths = [source, os.environ.get("PYTHONPATH", "")]
    found = {
        "smolrun": (
            [
                sys.executable, "-c", "from smolrun.cli.main import main; raise SystemExit(main())",
                "serve", options.model, "--alias", "bench", "--port", str(ours),
                "--parallel", str(most), "-c", str(options.context), "-t", str(options.threads),
            ],
            ours,
            {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
    }  # fmt: skip
    if not options.alone:
        paths = [options.peer_path or "", os.environ.get("PYTHONPATH", "")]
        found["llama-cpp-python"] = (
            [
                sys.executable, "-m", "llama_cpp.server", "--model", options.model,
                "--model_alias", "bench", "--port", str(theirs), "--n_ctx", str(options.context),
                "--n_threads", str(options.threads), "--n_threads_batch", str(options.threads),
                # Else a new request ends the one under way.
                "--interrupt_requests", "false", "--verbose", "false",
            ],
            theirs,
            {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip
    return found


def row(name: str, load: Load) -> str:
    def milliseconds(pair: tuple[float, float]) -> str:
        return f"{1000 * pair[0]:7.1f} {1000 * pair[1]:8.1f}"

    return (
        f"{load.clients:7}  {name:17} {load.throughput:8.1f}  {load.goodput:6.2f}  "
        f"{milliseconds(load.ttft)}  {milliseconds(load.tpot)}  {milliseconds(load.gap)}  "
        f"{load.errors}/{load.answers + load.errors}"
    )


HEADER = (
    f"clients  {'server':17} {'tokens/s':>8}  {'good/s':>6}  {'TTFT ms':>7} {'p99':>8}  "
    f"{'TPOT ms':>7} {'p99':>8}  {'gap ms':>7} {'p99':>8}  errors"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3, help="of both servers, in turns")
    parser.add_argument("--answers", type=int, default=2, help="of each client and round")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--words", type=int, default=60, help="of each prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--ttft", type=float, default=1.0, help="seconds that are good")
    parser.add_argument("--tpot", type=float, default=0.1, help="seconds that are good")
    parser.add_argument("--bias", default="0,2", help="end-of-text tokens")
    parser.add_argument("--peer-path", help="of llama-cpp-python's server's other packages")
    parser.add_argument("--alone", action="store_true", help="no other server")
    parser.add_argument("--health", action="store_true", help="measure ours while clients ask")
    parser.add_argument("--parallel", type=int, help="answers of ours side by side; all clients'")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.clients = [int(number) for number in options.clients.split(",")]
    bias = [int(token) for token in options.bias.split(",") if token]
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(started(*server)) for name, server in servers(options).items()
        }
        for url in urls.values():  # warm
            asyncio.run(run(url, bodies_of(1, 8, options.words, 1, bias), 1))
        if not options.json:
            print(HEADER)
        for clients in options.clients:
            found: dict[str, list[Load]] = {name: [] for name in urls}
            health: list[float] = []
            for number in range(options.rounds):
                count = clients * options.answers
                seed = 1000 * clients + number
                bodies = bodies_of(count, options.tokens, options.words, seed, bias)
                # Who begins changes, so that no side has the quieter moments.
                for name in sorted(urls, reverse=bool(number % 2)):
                    asking = run(urls[name], bodies, clients)
                    if options.health and name == "smolrun":
                        answers, times = asyncio.run(watched(urls[name], asking))
                        health += times
                    else:
                        answers = asyncio.run(asking)
                    for error in {answer.error for answer in answers} - {None}:
                        print(f"{name}: {error}", file=sys.stderr)
                    found[name].append(load_of(answers, clients, options.ttft, options.tpot))
            for name, loads in found.items():
                middle = sorted(loads, key=lambda load: load.throughput)[len(loads) // 2]
                print(
                    json.dumps({"server": name} | vars(middle))
                    if options.json
                    else row(name, middle)
                )
            if len(found) == 2 and not options.json:
                pairs = zip(found["smolrun"], found["llama-cpp-python"], strict=True)
                ratios = sorted(ours.throughput / theirs.throughput for ours, theirs in pairs)
                print(
                    f"         throughput, smolrun : llama-cpp-python = "
                    f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                )
            if health and not options.json:
                middle_time, late = percentile(health, 0.5), percentile(health, 0.99)
                print(
                    f"         /health of smolrun: {1000 * middle_time:.1f} ms, "
                    f"p99 {1000 * late:.1f} ms, of {len(health)}"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
