"""The process: sockets, signals, slow clients, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smolrun.api import Model
from smolrun.server import replies
from smolrun.server.app import create_app
from smolrun.server.edge import is_loopback
from smolrun.server.errors import ApiError
from smolrun.server.limits import Limits
from smolrun.server.service import Service, Settings

Progress = Callable[[int, int], None]

logger = logging.getLogger("smolrun.server")

_CLOSING_SECONDS = 2  # for replies on their way after the last answer
_RECEIVED_BYTES = 1 << 16  # of a connection at a time
_M_ARENA_MAX = -8  # of glibc's malloc.h


def check_bind(settings: Settings, insecure: bool) -> str | None:
    """Why a server must not be bound so, or None."""
    if is_loopback(settings.host) or settings.api_keys or insecure:
        return None
    return (
        f"--host {settings.host} lets other machines in, and there is no API key: give --api-key "
        "or --api-key-file, or say --insecure"
    )


def serve(settings: Settings, load: Callable[[Progress], Model]) -> int:
    """Serve one model until a signal ends it; returns the exit code.

    Args:
        settings: of the server.
        load: makes the model; calls its argument with bytes done and in all.

    Raises:
        SmolrunError: the model can not be loaded. Nothing listens before its memory is planned.
        OSError: the address can not be had.
    """
    use_one_arena()
    bound = bind(settings.host, settings.port)
    with bound:
        loading = Loading(load)
        loading.wait_for_plan()
        service = Service(settings)
        asyncio.run(Server(service, loading).serve(sockets=[bound]))
    if loading.under_way:
        # Its thread can not be stopped, and waits for nobody.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    if loading.error is not None:
        raise loading.error
    service.close()
    return 0


def use_one_arena() -> None:
    """Have all threads that start from now on allocate from one heap.

    glibc gives each its own, which keeps what it once needed. A grammar or a prompt is made by one
    thread and dropped by another, so the holes of one heap are of no use to the next: the memory
    of a busy server would grow for hours (docs/decisions.md).
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def bind(host: str, port: int) -> socket.socket:
    """A socket that has an address and does not listen yet. OSError where it can not have it."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{error.strerror}: {host} port {port}") from None
    return bound


class Loading:
    """Loads the model on a thread, so that the server can say that it does."""

    def __init__(self, load: Callable[[Progress], Model]) -> None:
        self.error: BaseException | None = None
        self.model: Model | None = None
        self._planned = threading.Event()
        self._lock = threading.Lock()
        self._told: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, args=(load,), daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether it is not known yet how it ends."""
        return self.model is None and self.error is None

    def wait_for_plan(self) -> None:
        """Wait until the memory is planned, which the first progress tells. Raises what failed."""
        self._planned.wait()
        if self.error is not None:
            raise self.error

    def when_done(self, tell: Callable[[], None]) -> None:
        """Have `tell` called, on any thread, when there is a model or an error."""
        with self._lock:
            self._told = tell
            done = not self.under_way
        if done:
            tell()

    def _run(self, load: Callable[[Progress], Model]) -> None:
        try:
            model = load(lambda done, total: self._planned.set())
            error = None
        except BaseException as raised:
            model, error = None, raised
        with self._lock:
            self.model, self.error = model, error
            told = self._told
        self._planned.set()
        if told is not None:
            told()


class Server(uvicorn.Server):
    """Ends in order: no new answers, those under way to their end, then the sockets."""

    def __init__(self, service: Service, loading: Loading) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=protocol_with(service.limits),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=service.limits.header_bytes,
                timeout_keep_alive=int(service.limits.idle_seconds),
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                backlog=service.limits.connections,
            )
        )
        self._service = service
        self._loading = loading
        self._signals = 0
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and take the model when it is there."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._loading.when_done(lambda: _call_on(loop, self._loaded))
        assert sockets
        host, port = sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("listening", extra={"url": url, "pid": os.getpid()})

    def _loaded(self) -> None:
        model = self._loading.model
        if model is None:
            self._service.state = "failed"
            self.should_exit = True
            return
        self._service.ready(model)
        if self._service.state == "ready":
            self._service.prepare()
        logger.info(
            "ready",
            extra={
                "model": self._service.names[0],
                "context": model.context_size,
                "threads": model.loaded.threads.value,
            },
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers come to their end, the second does not."""
        self._signals += 1
        self._service.state = "draining"
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._signals and self._draining is None:
            logger.info("draining", extra={"under_way": self._service.places_taken})
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        if not await self._service.drained():
            logger.warning("answers were cut off", extra={"number": self._service.places_taken})
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what is left with an error, and close."""
        self._service.abort()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            transport = connection.transport
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        logger.info("ended")


def protocol_with(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 for clients that may be slow on purpose."""
    received = bytearray(_RECEIVED_BYTES)  # one for all: it is emptied before the next is read

    # A plain protocol has asyncio ask for 256 KiB whenever something comes, and shrink them to what
    # there was. Only the end of the heap has room for that, so what comes is always put there, and
    # the heap grows by every piece that outlives the next (docs/decisions.md).
    class Protocol(H11Protocol, asyncio.BufferedProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._header_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None

        def get_buffer(self, sizehint: int) -> bytearray:
            return received

        def buffer_updated(self, nbytes: int) -> None:
            self.data_received(bytes(memoryview(received)[:nbytes]))

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self._stop_writing_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._expect_headers()
            super().data_received(data)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._disarm()

        def on_response_complete(self) -> None:
            self._disarm()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.write_seconds, self._drop, "write")

        def resume_writing(self) -> None:
            self._stop_writing_timer()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            error = ApiError(400, msg, "invalid_http")
            body = replies.dumped(error.body())
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

        def _expect_headers(self) -> None:
            self._disarm()
            self._header_timer = self.loop.call_later(limits.header_seconds, self._drop, "headers")

        def _disarm(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _stop_writing_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _drop(self, what: str) -> None:
            logger.info("dropped a slow client", extra={"timeout": what})
            self.transport.abort()

    return Protocol


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # it is closed: a signal came while loading
        loop.call_soon_threadsafe(function)
