"""Batch jobs: OpenAI's batch file format, answered in this process.

Every line goes through the server's own application, without a socket: what may be asked, and what
the replies look like, is what `smolrun serve` says. Requests share the steps of one engine. The
output says what is done: a job that was cut off goes on where it stopped, and no line is written
twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from smolrun.api import Model
from smolrun.errors import OutputError, RequestError
from smolrun.server.app import create_app
from smolrun.server.limits import Limits
from smolrun.server.service import Service, Settings

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_LINE_BYTES = 64 << 20
_FOREVER = 1e8  # seconds


@dataclass(frozen=True)
class Done:
    """What became of a job."""

    total: int  # requests in the input
    before: int  # of which the output had these already
    failed: int  # of those answered now, by their status


@dataclass(frozen=True)
class Line:
    """One request of the input."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


def run_batch(
    model: Model,
    source: Path,
    target: Path,
    *,
    names: tuple[str, ...] = (),
    parallel: int,
    progress: Callable[[int, int], None] | None = None,
) -> Done:
    """Answer the requests of `source`, each with one line appended to `target`.

    Args:
        model: answers.
        source: JSON lines with custom_id, method, url and body.
        target: JSON lines with custom_id, response and error, in the order in which they end.
            Requests whose custom_id is there already are not run again.
        names: by which requests may call the model; none: what its files say.
        parallel: requests under way at a time.
        progress: called with the requests done, and those in all.

    Raises:
        RequestError: a line of `source` is no request, or two have one custom_id. Nothing ran.
        OutputError: `target` is no output of a batch, or another process writes it.
    """
    total = len({line.custom_id for line in _lines(source)})
    with _Output(target) as output:
        before = sum(line.custom_id in output.done for line in _lines(source))
        waiting = (line for line in _lines(source) if line.custom_id not in output.done)
        limits = dataclasses.replace(
            Limits(),
            body_bytes=MAX_LINE_BYTES,
            queued_requests=Limits().choices * Limits().prompts * parallel,
            queued_tokens=1 << 60,
            side_requests=parallel,
            total_seconds=_FOREVER,
            queue_seconds=_FOREVER,
        )
        failed = asyncio.run(
            _answer_all(
                model,
                Settings(names=names, parallel=parallel, limits=limits),
                waiting,
                output,
                parallel,
                (lambda done: progress(before + done, total)) if progress else lambda done: None,
            )
        )
    return Done(total, before, failed)


async def _answer_all(
    model: Model,
    settings: Settings,
    lines: Iterator[Line],
    output: _Output,
    parallel: int,
    progress: Callable[[int], None],
) -> int:
    """How many failed."""
    service = Service(settings)
    service.ready(model)
    app = create_app(service)
    done = failed = 0

    async def work() -> None:
        nonlocal done, failed
        for line in lines:  # one iterator, of which each worker takes the next
            record = await _answered(app, line)
            await asyncio.to_thread(output.append, record)
            done += 1
            failed += record["response"]["status_code"] >= 400
            progress(done)

    workers = [asyncio.ensure_future(work()) for _ in range(parallel)]
    try:
        await asyncio.gather(*workers)
    finally:  # where one fails, as on a full disk, the others end too
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return failed


async def _answered(app: ASGIApp, line: Line) -> dict[str, Any]:
    """The line of the output for a line of the input."""
    started = time.monotonic()
    if line.body.get("stream"):
        message = "stream: the lines of a batch are whole answers"
        status, request_id, body = 400, uuid.uuid4().hex, _error(message, "stream")
    elif line.url not in URLS:
        message = f"url: expected one of {', '.join(URLS)}, got {line.url[:200]!r}"
        status, request_id, body = 400, uuid.uuid4().hex, _error(message, "url")
    else:
        status, request_id, body = await _request(app, line)
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
        "seconds": round(time.monotonic() - started, 3),
    }


def _error(message: str, param: str) -> dict[str, Any]:
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": param,
            "code": "invalid_value",
        }
    }


async def _request(app: ASGIApp, line: Line) -> tuple[int, str, Any]:
    """Status, request id and body of the application's reply."""
    data = json.dumps(line.body).encode()
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": line.method,
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ],
        "client": None,
        "server": None,
    }
    sent = False
    status, headers, parts = 0, {}, []

    async def receive() -> Message:
        nonlocal sent
        if sent:  # the next would be that the client has gone, and it never does
            await asyncio.get_running_loop().create_future()
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], dict(message["headers"])
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers.get(b"x-request-id", b"").decode(), json.loads(b"".join(parts))


def _lines(source: Path) -> Iterator[Line]:
    """The requests of a file, checked; it is read piece by piece, so it may be large."""
    seen: dict[str, int] = {}
    with source.open("rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            where = f"{source}, line {number}"
            if len(data) > MAX_LINE_BYTES:
                raise RequestError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB")
            if not data.strip():
                continue
            line = _checked(where, data)
            if line.custom_id in seen:
                raise RequestError(
                    f"{where}: custom_id {line.custom_id[:100]!r} is that of line "
                    f"{seen[line.custom_id]}"
                )
            seen[line.custom_id] = number
            yield line


def _checked(where: str, data: bytes) -> Line:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{where}: expected an object with custom_id, method, url and body")
    for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
        if not isinstance(value.get(name), kind) or not (value[name] or name == "body"):
            expected = "an object" if kind is dict else "a text"
            raise RequestError(f"{where}: {name}: expected {expected}, got {value.get(name)!r:.80}")
    if value["method"] != "POST":
        raise RequestError(f"{where}: method: expected POST, got {value['method']!r:.80}")
    return Line(value["custom_id"], value["method"], value["url"], value["body"])


class _Output:
    """The output: what it has already, and more lines. A context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        self._descriptor = -1
        self._writing = threading.Lock()

    def __enter__(self) -> _Output:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; when this returns it is on the disk.

        What a crash leaves of a line is taken away when the job goes on.
        """
        rest = memoryview(json.dumps(record).encode() + b"\n")
        with self._writing:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)

    def _lock(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self._path}: another process writes it") from None

    def _read(self) -> None:
        whole = 0  # bytes of complete lines
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    break  # of a process that was cut off
                custom_id = None
                with contextlib.suppress(ValueError, RecursionError, TypeError, LookupError):
                    custom_id = json.loads(data)["custom_id"]
                if not isinstance(custom_id, str):
                    raise OutputError(
                        f"{self._path}, line {number}: no line of a batch's output; name another "
                        "file, or take it away"
                    )
                self.done.add(custom_id)
                whole += len(data)
        os.ftruncate(self._descriptor, whole)
