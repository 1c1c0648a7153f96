"""A hub that stands on this machine: whatever a test answers to the library's questions."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The address of a hub that gives these answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(answer: Answer, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """The library of this process asks such a hub, and keeps what it fetches in `cache`."""
    with serving(answer) as place:
        files = place + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield


def send(to: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """One answer."""
    to.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        to.send_header(name, value)
    to.end_headers()
    with suppress(BrokenPipeError):  # who asks may have seen enough
        to.wfile.write(body if to.command == "GET" else b"")


@dataclass
class Repository:
    """maker/model: its files, and what was asked for, name -> bytes sent."""

    files: Mapping[str, bytes]
    sent: dict[str, int] = field(default_factory=dict)
    knows_ranges: bool = True

    def __call__(self, to: BaseHTTPRequestHandler) -> None:
        name = re.sub(r"^/maker/model/resolve/[^/]+/|\?.*$", "", to.path)
        if "/tree/" in to.path:
            tree = [{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in self.files.items()]
            self.answer(to, json.dumps(tree).encode())
        elif to.path.startswith("/api/models/maker/model"):
            siblings = [{"rfilename": n} for n in self.files]
            self.answer(to, json.dumps({"id": "maker/model", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in self.files:
            sent = self.answer(to, self.files[name])
            if to.command == "GET":
                self.sent[name] = self.sent.get(name, 0) + sent
        else:
            known = to.path.startswith("/maker/model/")
            send(to, 404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def answer(self, to: BaseHTTPRequestHandler, body: bytes) -> int:
        """The body, or the part of it that was asked for; how much that was."""
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", to.headers.get("Range") or "")
        if part is None or not self.knows_ranges:
            send(to, 200, body, headers)
            return len(body)
        first, last = int(part[1]), min(int(part[2]), len(body) - 1)
        send(to, 206, body[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"})
        return last + 1 - first
