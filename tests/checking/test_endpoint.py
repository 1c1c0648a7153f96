"""The judge against real HTTP servers: one sound, one that loops, one that is ill."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moeprune.checking.judge import judge
from moeprune.errors import MachineError
from moeprune.settings import Settings


@contextmanager
def server(answer, status=200):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._reply({"data": [{"id": "only"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            text, reason = answer(prompt)
            choice = {"message": {"content": text}} if "messages" in body else {"text": text}
            self._reply({"choices": [choice | {"finish_reason": reason}], "usage": {"completion_tokens": 7}}, status)

        def _reply(self, data, code=200):
            content = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


def good(prompt):
    return ("4" if prompt.startswith("2 + 2") else "Sure."), "stop"


def looping(prompt):
    return "a a a a a a a a", "length"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_looping_server_fails_beside_a_sound_parent(api):
    with server(looping) as (url, _), server(good) as (parent, asked):
        settings = Settings(endpoint=url, parent_endpoint=parent, endpoint_key="secret", generations=12, api=api)
        report = judge(None, settings, "key")
    checks = {check["name"]: check["status"] for check in report["checks"]}
    assert report["verdict"] == checks["generated text"] == "fail"
    assert checks["KL"] == checks["structure"] == "not tested"
    rates = report["generation"]["rates"]["not ended"]
    assert (rates["pruned"]["rate"], rates["parent"]["rate"]) == (1.0, 0.0)
    path, key, body = asked[0]
    assert path == ("/v1/chat/completions" if api == "chat" else "/v1/completions")
    assert (key, body["model"], body["temperature"]) == ("Bearer secret", "only", 0)
    assert "secret" not in json.dumps(report)


def test_two_sound_servers_pass():
    with server(good) as (url, _):
        report = judge(None, Settings(endpoint=url, parent_endpoint=url, generations=12), "key")
    assert report["verdict"] == "pass"
    assert report["generation"]["pairs"][0]["pruned"]["text"] == "4"


def test_an_ill_server_ends_in_one_line():
    with server(good, status=500) as (url, _), pytest.raises(MachineError, match="is the server well"):
        judge(None, Settings(endpoint=url, generations=3, attempts=1), "key")
