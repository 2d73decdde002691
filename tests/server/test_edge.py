"""The edge of the network: headers, hosts, origins, keys, ids, and what is logged."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import socket
import tracemalloc
from collections.abc import Iterator

import httpx
import pytest

from smolrun import Model
from smolrun.cli.main import main
from smolrun.server import edge
from smolrun.server.app import ROUTES
from smolrun.server.logs import JsonFormatter, TextFormatter
from smolrun.server.run import check_bind
from smolrun.server.service import Settings
from tests.waiting import SECONDS, eventually

from .running import CHAT, GREEDY, Running

KEYS = ("sk-first-key", "sk-second-key-which-is-longer")


@pytest.fixture(scope="module")
def guarded(model: Model) -> Iterator[Running]:
    settings = Settings(api_keys=KEYS, cors_origins=("https://good.example",))
    with Running(model, settings) as running:
        yield running


@pytest.fixture(scope="module")
def stranger(guarded: Running) -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(base_url=guarded.url, timeout=SECONDS) as client:
        yield client


def talk(server: Running, data: bytes) -> bytes:
    """Bytes of the whole reply to bytes."""
    with socket.create_connection((server.host, server.port), SECONDS) as connection:
        connection.sendall(data)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:  # it closed before it had read all
            pass
        return found


def request(path: str = "/health", *headers: str, host: str = "localhost") -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request("/health", "X-Big: " + "a" * 66_000), {400, 431, 0}),
        (request("/health", *[f"X-{i}: a" for i in range(300)]), {431}),
        (request("/health", *[f"X-{i}: a" for i in range(254)]), {200}),
        (request("/health", *[f"X-{i}: a" for i in range(255)]), {431}),
        (request("/health?" + "a" * 65_500), {400, 431, 0}),
        (request("/health?" + "a" * 8_000), {200}),
        (b"GET /health HTTP/1.1\r\n\r\n", {400}),
        (b"\x16\x03\x01\x00\xa5\x01\x00", {400, 0}),
        (b"nonsense\r\n\r\n", {400}),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", {400}),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: a.example\r\n\r\n", {400, 403}),
    ],
    ids=range(11),
)
def test_headers(healthy: Running, data: bytes, expected: set[int]) -> None:  # HTTP-01
    reply = talk(healthy, data)
    assert (status(reply) if reply else 0) in expected
    if reply and status(reply) != 200:
        assert b'{"error":' in reply


def test_what_comes_takes_the_memory_it_needs(healthy: Running) -> None:  # SRV-10
    talk(healthy, request())
    tracemalloc.start()
    try:
        assert b"200 OK" in talk(healthy, request())
        # A block of 256 KiB for each piece, as asyncio takes it, makes a heap grow without end.
        assert tracemalloc.get_traced_memory()[1] < 256 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200), ("LOCALHOST", 200), ("localhost:8080", 200), ("127.0.0.1:8080", 200),
        ("127.0.0.1", 200), ("[::1]:8080", 200), ("[::1]", 200), ("app.localhost", 200),
        ("evil.example", 403), ("evil.example:8080", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("10.0.0.1", 403), ("0.0.0.0", 403), ("", 403),
        ("localhost@evil.example", 403), ("localhost:80:80", 403),
    ],
)  # fmt: skip
def test_hosts(healthy: Running, host: str, expected: int) -> None:  # HTTP-02
    assert status(talk(healthy, request(host=host))) == expected


def test_no_origin_is_let_in(healthy: Running) -> None:  # HTTP-03
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        headers = {"origin": origin}
        reply = healthy.client.get("/health", headers=headers)
        assert not [name for name in reply.headers if name.startswith("access-control")]
        asked = {**headers, "access-control-request-method": "POST"}
        reply = healthy.client.options(CHAT, headers=asked)
        assert reply.status_code == 405
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_an_origin_that_is_allowed(guarded: Running, stranger: httpx.Client) -> None:  # HTTP-03
    asked = {"access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type"}  # fmt: skip
    good = stranger.options(CHAT, headers={"origin": "https://good.example", **asked})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    evil = stranger.options(CHAT, headers={"origin": "https://evil.example", **asked})
    assert evil.status_code == 400
    for origin in ("https://good.example", "https://evil.example"):
        reply = guarded.client.get("/v1/models", headers={"origin": origin})
        allowed = reply.headers.get("access-control-allow-origin")
        assert allowed == ("https://good.example" if "good" in origin else None)
        assert "access-control-allow-credentials" not in reply.headers


def test_keys(guarded: Running, stranger: httpx.Client) -> None:  # HTTP-04
    for key in KEYS:
        reply = stranger.get("/v1/models", headers={"authorization": f"bearer {key}"})
        assert reply.status_code == 200
    wrong = [KEYS[0][:n] for n in range(1, len(KEYS[0]))]
    wrong += [KEYS[0] + "x", "ключ", KEYS[0].upper(), KEYS[0] + KEYS[1], "Bearer " + KEYS[0]]
    for given in wrong:
        reply = stranger.get("/v1/models", headers={b"authorization": b"Bearer " + given.encode()})
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"
    for headers in ({}, {"authorization": KEYS[0]}, {"authorization": "Basic " + KEYS[0]}):
        assert stranger.get("/v1/models", headers=headers).status_code == 401
    logged = " ".join(str(vars(record)) for record in guarded.log.records)
    assert not any(key in logged for key in KEYS)
    tree = ast.parse(inspect.getsource(edge))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "hmac.compare_digest" in calls


def test_every_route_wants_a_key(guarded: Running, stranger: httpx.Client) -> None:  # HTTP-05
    public = {"/health", "/ready"}
    for route in ROUTES:
        path = route.path.replace("{model}", "tiny")
        reply = stranger.request(route.method, path)
        assert reply.status_code == (200 if path in public else 401), path
    for path in ("/", "/nowhere", "/health/", "//health"):
        assert stranger.get(path).status_code == 401
    # Nothing is read or computed for whoever has none.
    assert stranger.post(CHAT, content=b"{" * 1000).status_code == 401


def test_keys_share_no_cache(guarded: Running, stranger: httpx.Client) -> None:  # ISO-03
    prompt = "The sky is blue because air scatters short waves of light. " * 20

    def cached(key: str, **fields: object) -> int:
        body = {"prompt": prompt, "max_tokens": 1, **fields}
        headers = {"authorization": f"Bearer {key}"}
        usage = stranger.post("/v1/completions", json=body, headers=headers).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[0]) > 100
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[1]) > 100
    assert cached(KEYS[1], cache_prompt=False) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_others_are_let_in_with_a_key_only(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:  # HTTP-05
    assert check_bind(Settings(host=host), insecure=False)
    assert check_bind(Settings(host=host), insecure=True) is None
    assert check_bind(Settings(host=host, api_keys=("k",)), insecure=False) is None
    assert check_bind(Settings(), insecure=False) is None
    assert main(["serve", "--host", host, "nowhere.gguf"]) == 2
    assert "--insecure" in capsys.readouterr().err


def test_ids_of_requests(healthy: Running) -> None:  # HTTP-06
    def ids() -> set[str]:
        return {vars(record).get("id", "") for record in healthy.log.records}

    for good in ("abc", "A.b_c-1", "x" * 128):
        reply = healthy.client.get("/nowhere", headers={"x-request-id": good})
        assert reply.headers["x-request-id"] == good
        assert reply.json()["error"]["request_id"] == good
    assert eventually(lambda: {"abc", "A.b_c-1", "x" * 128} <= ids())
    for bad in (b"x" * 129, b"a b", b"a;b", b"x" * 10_000, "ä".encode(), b""):
        reply = healthy.client.get("/nowhere", headers={b"x-request-id": bad})
        fresh = reply.headers["x-request-id"]
        assert fresh.isalnum()
        assert len(fresh) == 32
    split = talk(healthy, request("/health", "X-Request-Id: a\r\n\tSet-Cookie: x"))
    assert b"Set-Cookie" not in split


def test_logs_are_lines_without_prompts(healthy: Running) -> None:  # OBS-02
    before = len(healthy.log.records)
    secret = "sesame\n\x1b[31m" + "x" * 1_000_000
    healthy.post("/tokenize", {"content": secret})
    healthy.post(CHAT, {**GREEDY, "messages": [{"role": "user", "content": "sesame\n\x1b[31m"}]})
    healthy.post(CHAT, {**GREEDY, "model": "sesame\n{}"})
    healthy.client.get("/v1/models/ses%0Aame%1b[31m")
    assert eventually(lambda: len(healthy.log.records) == before + 4)
    records = healthy.log.records[before:]
    for formatter in (JsonFormatter(), TextFormatter()):
        for record in records:
            line = formatter.format(record)
            assert line.isprintable()
            assert len(line) < 1000
            assert "sesame" not in line
    found = [json.loads(JsonFormatter().format(record)) for record in records]
    assert [one["status"] for one in found] == [200, 200, 404, 404]
    assert all(one.keys() >= {"time", "level", "event", "id", "path", "ms"} for one in found)


def test_tracebacks_are_one_line_of_json() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": (ValueError, error, None)})
    assert "\n" not in JsonFormatter().format(record)
