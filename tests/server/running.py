"""A server on a thread of the test's process, and the oracle that asks whether it is well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx

from smolrun import Model
from smolrun.server.run import Loading, Server, bind
from smolrun.server.service import Service, Settings
from tests.waiting import SECONDS, eventually, joined

CHAT = "/v1/chat/completions"
GREEDY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 8,
    "temperature": 0,
}


class Records(logging.Handler):
    """Keeps what the server logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Running:
    """A server that answers on `url`."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.log = Records()
        self._started = threading.Event()
        self._bound = bind("127.0.0.1", 0)
        self.host, self.port = self._bound.getsockname()
        self.url = f"http://{self.host}:{self.port}"
        self._settings = settings
        self._thread = threading.Thread(target=self._run, daemon=True)
        keys = settings.api_keys
        self.headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}

    def __enter__(self) -> Running:
        logger = logging.getLogger("smolrun.server")
        logger.addHandler(self.log)  # it sees what servers beside this one log, too
        self._level_before = logger.level
        logger.setLevel(logging.INFO)
        self._thread.start()
        assert self._started.wait(SECONDS)
        self.client = httpx.Client(base_url=self.url, timeout=SECONDS, headers=self.headers)
        try:
            self.blocks_held = self.statistics()["kv_blocks_held"]
            self.expected = self.answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.should_exit = self.server.force_exit = True
        joined([self._thread])
        logger = logging.getLogger("smolrun.server")
        logger.removeHandler(self.log)
        logger.setLevel(self._level_before)

    def _run(self) -> None:
        async def main() -> None:
            self.service = Service(self._settings)
            self.server = Server(self.service, Loading(lambda progress: self.model))
            serving = asyncio.ensure_future(self.server.serve(sockets=[self._bound]))
            while self.service.state != "ready":
                await asyncio.sleep(0.01)
            self._started.set()
            await serving

        asyncio.run(main())

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.client.post(path, **options)

    def raw(self, path: str, body: bytes, **headers: str) -> httpx.Response:
        """A body as it is."""
        given = {"content-type": "application/json", **headers}
        return self.client.post(path, content=body, headers=given)

    def answer(self, **changes: Any) -> str:
        """The text of the request that always has the same answer."""
        reply = self.post(CHAT, {**GREEDY, **changes})
        assert reply.status_code == 200, reply.text
        message = reply.json()["choices"][0]["message"]
        return str(message.get("reasoning_content", "")) + str(message["content"])

    def statistics(self) -> dict[str, int]:
        return self.model.statistics()

    def settled(self) -> bool:
        """Wait until nothing runs or waits."""
        return eventually(lambda: not self.service.places_taken and self._idle())

    def _idle(self) -> bool:
        found = self.statistics()
        return found["running"] == found["waiting"] == 0

    def check_health(self) -> None:
        """ENG-00: whatever a test did, the server is as it was."""
        assert self.client.get("/health").status_code == 200
        assert self.settled()
        assert self.answer() == self.expected
        assert self.settled()
        assert self.statistics()["kv_blocks_held"] == self.blocks_held
        assert not [r for r in self.log.records if r.exc_info], "a traceback was logged"


def chunks_of(response: httpx.Response) -> list[Any]:
    """The events of a stream; the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:], parse_constant=_refused) for line in lines[:-1]]


def _refused(name: str) -> None:
    raise AssertionError(f"{name} in a reply")


class Slow:
    """A runner whose every step takes so many seconds longer."""

    def __init__(self, runner: Any, seconds: float) -> None:
        self.seconds = seconds
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, *arguments: Any) -> None:
        time.sleep(self.seconds)
        self._runner.step(*arguments)


@contextlib.contextmanager
def slowed(model: Model, seconds: float) -> Iterator[Slow]:
    """Steps take long, so that a test can act meanwhile however busy the machine is.

    Whoever has acted may set the seconds to 0.
    """
    runner: Any = model.loaded.engine.runner
    slow = Slow(runner, seconds)
    model.loaded.engine.runner = slow
    try:
        yield slow
    finally:
        model.loaded.engine.runner = runner


@contextlib.contextmanager
def limited(running: Running, **limits: float) -> Iterator[None]:
    """Requests have other limits; the answer that is asked for before and after has not."""
    before = running.service.limits
    running.service.limits = replace(before, **limits)  # type: ignore[arg-type]
    try:
        yield
    finally:
        running.service.limits = before
