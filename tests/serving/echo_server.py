"""A small OpenAI-compatible server in a process of its own: `python echo_server.py PORT [ANSWERS]`.

Answers are the prompt backwards, so that a mixed-up answer shows. No usage is given: /tokenize counts characters.
After ANSWERS answers it holds every question and says so, which makes "in the middle of a run" a state, not a moment.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LEFT = threading.Semaphore(int(sys.argv[2]) if len(sys.argv) > 2 else sys.maxsize)


class Handler(BaseHTTPRequestHandler):
    """The four addresses that the batch uses."""

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "echo"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._send(200, {"count": len(body["prompt"])})
            return
        if not LEFT.acquire(blocking=False):
            print("holding", flush=True)
            threading.Event().wait()
        chat = self.path == "/v1/chat/completions"
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if "refuse me" in text:
            self._send(400, {"error": "too long"})
            return
        answer = f"{text[::-1]} by {body['model']}"
        choice = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
        self._send(200, {"choices": [choice | {"finish_reason": "stop"}]})

    def _send(self, status: int, data: dict) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print("listening", flush=True)
    server.serve_forever()
