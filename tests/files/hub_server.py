"""A Hub on localhost, for tests: the listing, and files with what the Hub says about them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repo -> file -> bytes
    gated: set[str] = field(default_factory=set)
    lies: dict[str, bytes] = field(default_factory=dict)  # file -> bytes served in its stead
    cuts: dict[str, int] = field(default_factory=dict)  # file -> bytes after which, once, it breaks
    requests: list[str] = field(default_factory=list)  # "GET /path" and, after it, its Range
    tokens: set[str] = field(default_factory=set)

    def listing(self, repo: str) -> bytes:
        siblings = []
        for name, data in self.repositories[repo].items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data)}
            if name.endswith((".gguf", ".safetensors")):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 1}
            siblings.append(entry)
        values = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []}
        return json.dumps(values).encode()


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            ranged = self.headers.get("Range", "")
            hub.requests.append(f"{self.command} {self.path} {ranged}".strip())
            if token := self.headers.get("Authorization"):
                hub.tokens.add(token)
            path = self.path.split("?")[0]
            if path.startswith("/api/models/"):
                repo = path.removeprefix("/api/models/").split("/revision/")[0]
                if repo in hub.gated:
                    self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                elif repo in hub.repositories:
                    self.answer(200, hub.listing(repo), {"Content-Type": "application/json"})
                else:
                    self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
                return
            repo, _, rest = path[1:].partition("/resolve/")
            name = rest.partition("/")[2]
            data = hub.repositories.get(repo, {}).get(name)
            if data is None:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            digest = hashlib.sha256(data).hexdigest()
            served = hub.lies.get(name, data)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
            if ranged:
                start = int(ranged.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.answer(206, served[start:], headers)
            elif self.command == "GET" and (cut := hub.cuts.pop(name, None)):
                self.answer(200, served[:cut], {**headers, "Content-Length": str(len(served))})
                self.close_connection = True
            else:
                self.answer(200, served, headers)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
