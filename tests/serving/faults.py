"""A proxy between client and server that breaks requests in the ways that networks and servers do."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "503", "reset", "cut short", "garbage", "no object", "hang up")
SILENT = "silent"  # no byte until the same question comes again, so that only the client's patience can end it


class Proxy:
    """Forwards to `port`; the first request of a prompt meets the next fault, its second one goes through."""

    def __init__(self, port: int, faults: tuple[str, ...] = FAULTS) -> None:
        self.port, self.faults = port, faults
        self.met: Counter[str] = Counter()
        self.forwarded: Counter[bytes] = Counter()
        self._seen: dict[bytes, threading.Event] = {}  # set when the question comes again
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy.handle(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fault_for(self, body: bytes) -> str:
        """The fault that this request meets, empty for none."""
        with self._lock:
            if not body or not self.faults:
                return ""
            if body in self._seen:
                self._seen[body].set()
                return ""
            self._seen[body] = threading.Event()
            fault = self.faults[(len(self._seen) - 1) % len(self.faults)]
            self.met[fault] += 1
            return fault

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Break the request or pass it on."""
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self.fault_for(body) if "completions" in request.path else ""
        if fault in ("429", "500", "503"):
            self.reply(request, int(fault), b"busy", {"Retry-After": "0"} if fault == "429" else {})
        elif fault == "garbage":
            self.reply(request, 200, b'{"choices": [{"mess')
        elif fault == "no object":
            self.reply(request, 200, b"[]")
        elif fault == "cut short":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b'{"choices": []}')
            request.close_connection = True
        elif fault == "reset":
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{")
            request.wfile.flush()
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
        elif fault == "hang up":
            request.close_connection = True
        elif fault == SILENT:
            self._seen[body].wait()
            request.close_connection = True
        else:
            self.forward(request, body)

    def forward(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        """Let the real server answer."""
        if "completions" in request.path:
            with self._lock:
                self.forwarded[body] += 1
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        upstream.request(request.command, request.path, body, {"Content-Type": "application/json"})
        answer = upstream.getresponse()
        self.reply(request, answer.status, answer.read())
        upstream.close()

    def reply(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict | None = None) -> None:
        """Send a whole answer; a client that has left by then is no matter."""
        try:
            request.send_response(status)
            for name, value in (headers or {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            request.wfile.write(content)
        except OSError:
            request.close_connection = True
