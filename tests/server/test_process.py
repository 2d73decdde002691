"""The process itself: how it starts, what it prints, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from smolrun.cli.main import main
from tests.api.tiny import make_folder
from tests.waiting import SECONDS, eventually, joined

from .running import CHAT, GREEDY, chunks_of

CONTEXT = 32_768
# Some seconds of work.
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 1_500, "ignore_eos": True}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "large", max_position_embeddings=CONTEXT)


class Process:
    """A server of its own, with its lines of log."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self.raw: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.raw.append(line)
            with contextlib.suppress(ValueError):
                self.lines.append(json.loads(line))

    def event(self, name: str) -> dict[str, Any]:
        """Wait for a line of the log."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            ended = not self._reader.is_alive()
            found[:] = [line for line in self.lines if line["event"] == name]
            return bool(found) or ended

        assert eventually(there), self.raw
        assert found, self.raw
        return found[0]

    def end(self) -> int:
        code = self.process.wait(SECONDS)
        joined([self._reader])
        return code


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        process.process.kill()
        process.end()
        assert process.process.stderr is not None
        process.process.stderr.close()


def command(folder: Path, *flags: str) -> list[str]:
    serve = [sys.executable, "-m", "smolrun.cli.main", "serve", str(folder), "--port", "0"]
    return [*serve, "-t", "1", "-c", str(CONTEXT), *flags]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_it_drains(large: Path) -> None:  # SRV-03
    with (
        serving(*command(large, "--drain-timeout", "300", "--parallel", "4")) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        url = server.event("listening")["url"]
        assert server.event("ready")["context"] == CONTEXT
        with httpx.Client(base_url=url, timeout=2 * SECONDS) as client:
            expected = client.post(CHAT, json=LONG).json()["choices"][0]["message"]
            answers: list[Future[httpx.Response]] = [
                pool.submit(client.post, CHAT, json=LONG) for _ in range(8)
            ]
            assert eventually(lambda: "num_requests_waiting 4.0" in client.get("/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: client.get("/ready").status_code == 503)
            assert client.get("/health").status_code == 200
            refused = client.post(CHAT, json=GREEDY)
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            assert refused.json()["error"]["code"] == "shutting_down"
            for answer in answers:
                reply = answer.result(2 * SECONDS)
                assert reply.status_code == 200
                assert reply.json()["choices"][0]["message"] == expected
        assert server.end() == 0
        assert is_free(int(url.rpartition(":")[2]))
        assert len(server.raw) == len(server.lines)  # OBS-02
        assert server.lines[-1]["event"] == "ended"


def test_it_does_not_wait_for_ever(large: Path) -> None:  # SRV-03
    with (
        serving(*command(large, "--drain-timeout", "0.3")) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = server.event("listening")["url"]
        server.event("ready")
        with httpx.Client(base_url=url, timeout=2 * SECONDS) as client:
            body = {**LONG, "max_tokens": 30_000}
            whole = pool.submit(client.post, CHAT, json=body)
            with client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
                server.process.send_signal(signal.SIGTERM)
                chunks = chunks_of(reply)
            assert chunks[-1]["error"]["code"] == "shutting_down"
            assert whole.result(SECONDS).status_code == 503
        assert server.end() == 0


def test_a_second_signal_ends_it_at_once(large: Path) -> None:  # SRV-03
    with serving(*command(large)) as server, ThreadPoolExecutor(1) as pool:
        url = server.event("listening")["url"]
        server.event("ready")
        with httpx.Client(base_url=url, timeout=2 * SECONDS) as client:
            answer = pool.submit(client.post, CHAT, json={**LONG, "max_tokens": 30_000})
            assert eventually(lambda: "num_requests_running 1.0" in client.get("/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            server.event("draining")
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0
            with contextlib.suppress(httpx.HTTPError):
                assert answer.result(SECONDS).status_code == 503


LOADING = """
import sys, time
from smolrun.server import logs
from smolrun.server.run import serve
from smolrun.server.service import Settings
def load(progress):
    progress(1, 100)
    time.sleep(600)
logs.listen("json")
sys.exit(serve(Settings(port=0), load))
"""


def test_a_signal_while_it_loads() -> None:  # SRV-04
    with serving(sys.executable, "-c", LOADING) as server:
        url = server.event("listening")["url"]
        assert httpx.get(url + "/health", timeout=SECONDS).json() == {
            "status": "ok",
            "state": "loading",
        }
        for path in ("/ready", "/v1/models", "/props"):
            reply = httpx.get(url + path, timeout=SECONDS)
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert reply.json()["error"]["code"] == "loading"
        assert httpx.post(url + CHAT, json=GREEDY, timeout=SECONDS).status_code == 503
        assert httpx.get(url + "/metrics", timeout=SECONDS).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


ARENAS = """
import ctypes, threading
from smolrun.server.run import use_one_arena
use_one_arena()
together = threading.Barrier(4)
def work():
    held = bytearray(20_000)
    together.wait(60)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_threads_share_one_heap() -> None:  # SRV-10
    done = subprocess.run(
        [sys.executable, "-c", ARENAS], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    assert done.stdout.count("<heap ") == 1


def test_ctrl_c_ends_it_too(large: Path) -> None:
    with serving(*command(large)) as server:
        server.event("ready")
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0


def test_a_context_that_does_not_fit(
    large: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # SRV-07
    from smolrun.engine.machine import Limit

    little = Limit(70 << 20, "all that this test has")
    monkeypatch.setattr("smolrun.engine.load.memory_available", lambda: little)
    listened: list[object] = []
    monkeypatch.setattr(socket.socket, "listen", lambda *args: listened.append(args))
    code = main(["serve", str(large), "--port", "0", "-c", str(CONTEXT)])
    said = capsys.readouterr().err
    assert code == 2, said
    assert "KV cache" in said
    assert "largest context that fits" in said
    assert little.why in said
    assert not listened


def test_a_port_that_is_taken(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(large), "--port", str(port)]) == 1
        assert str(port) in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-key", ""], ["--api-key", "ключ"], ["--timeout", "0"], ["--port", "70000"],
        ["--queue", "0"], ["--parallel", "-1"], ["--log-format", "xml"], ["words", "words"],
    ],
    ids=str,
)  # fmt: skip
def test_flags_that_make_no_sense(large: Path, flags: list[str]) -> None:
    assert main(["serve", str(large), *flags]) == 2


def test_keys_come_from_a_file(tmp_path: Path, folder: Path) -> None:
    from smolrun.cli.options import Parser
    from smolrun.cli.serve import add_arguments, settings_of

    keys = tmp_path / "keys"
    keys.write_text("one\n\n  two\n")
    parser = Parser("serve", "")
    add_arguments(parser)
    parsed = parser.parse_args(["--api-key", "zero", "--api-key-file", str(keys)])
    settings = settings_of(parsed, str(folder))
    assert settings.api_keys == ("zero", "one", "two")
    assert settings.names == ("tiny",)
    assert settings_of(parsed, "smollm3-3b:q4_k_m").names == ("smollm3-3b:q4_k_m",)


def test_help_imports_no_server() -> None:
    script = (
        "import sys; from smolrun.cli.main import main; main(['--help']); "
        "found = {'uvicorn', 'starlette', 'pydantic', 'prometheus_client'} & set(sys.modules); "
        "sys.exit(bool(found))"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=SECONDS)
