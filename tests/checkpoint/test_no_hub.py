"""A hub that is not there, does not answer as one, or does not know the model: one line that says what to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moeprune.checkpoint.folder import locate_model
from moeprune.checkpoint.outline import open_outline
from moeprune.errors import InputError, MachineError, StageError

ANSWERS = {
    "broken": (503, b"", {}),
    "nobody may": (401, b"", {}),
    "a page of a captive portal": (200, b"<html>log in first</html>", {}),
    "a hub without it": (404, b"", {"X-Error-Code": "RepoNotFound"}),
    "nothing": (0, b"", {}),
}


@pytest.fixture(params=ANSWERS)
def hub(request, monkeypatch, tmp_path) -> Iterator[str]:
    """What answers to every question; `nothing` hangs up."""
    status, body, headers = ANSWERS[request.param]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_port}"
    files = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield request.param
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ask", [locate_model, open_outline])
def test_a_model_that_the_hub_does_not_give(ask, hub, capfd):
    with pytest.raises(StageError) as caught:
        ask("maker/model")
    text = str(caught.value)
    unknown = hub == "a hub without it"
    assert isinstance(caught.value, InputError if unknown else MachineError), text
    assert "maker/model" in text
    assert "folder" in text or unknown
    assert "\n" not in text
    assert len(text) < 400
    assert capfd.readouterr().err.count("\n") < 3  # no retry of the library fills the screen


@pytest.mark.parametrize("ask", [locate_model, open_outline])
def test_what_no_model_is_named(ask):
    with pytest.raises(InputError, match=r"no folder at a/b--c.* check the path"):
        ask("a/b--c")
