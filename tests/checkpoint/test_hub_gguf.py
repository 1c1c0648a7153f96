"""A repository of GGUF files on a hub: `maker/model:Q4_K_M` fetches one model of it and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moeprune.checkpoint.folder import locate_model, open_checkpoint
from moeprune.errors import InputError
from tests.checkpoint import test_gguf

COMMIT = "c" * 40
WHOLE = test_gguf.build(test_gguf.ENTRIES, test_gguf.TENSORS)[0]
HALVES = (dict(list(test_gguf.TENSORS.items())[:9]), dict(list(test_gguf.TENSORS.items())[9:]))
FILES = {
    "README.md": b"a model",
    "model-Q4_K_M.gguf": WHOLE,
    "model-q4_k.gguf": WHOLE,
    "model-IQ4_K_M.gguf": WHOLE,
    "mmproj-Q8_0.gguf": b"no model",
    "Q8_0/model-Q8_0-00001-of-00002.gguf": test_gguf.build(test_gguf.ENTRIES, HALVES[0])[0],
    "Q8_0/model-Q8_0-00002-of-00002.gguf": test_gguf.build([test_gguf.number("split.no", 1)], HALVES[1])[0],
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[set[str]]:
    """A hub with this one repository, and the names of the files that were fetched from it."""
    asked: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = re.sub(r"^/maker/model/resolve/[^/]+/|\?.*$", "", self.path)
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": n, "size": len(data), "oid": "0" * 40} for n, data in FILES.items()]
                self.answer(json.dumps(tree).encode())
            elif self.path.startswith("/api/"):
                body = json.dumps({"id": "maker/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]})
                self.answer(body.encode())
            elif name in FILES:
                asked.update({name} if self.command == "GET" else ())
                self.answer(FILES[name])

        do_HEAD = do_GET

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

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
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("maker/model:Q4_K_M", {"model-Q4_K_M.gguf"}),
        ("maker/model:q8_0@main", {name for name in FILES if name.startswith("Q8_0/")}),
    ],
)
def test_one_model_is_fetched(model, names, fetched):
    file = locate_model(model)
    assert file.name == min(names).rpartition("/")[2]
    assert set(open_checkpoint(file).tensors) == set(test_gguf.TENSORS)
    assert fetched == names


def test_numbers_that_the_repository_does_not_have(fetched):
    with pytest.raises(InputError, match=r"maker/model:Q2_K: the repository has no GGUF file with Q2_K"):
        locate_model("maker/model:Q2_K")
    assert not fetched
    with pytest.raises(InputError, match=r"has no config\.json.*name one: maker/model:Q4_K_M"):
        locate_model("maker/model")
    assert fetched == {"README.md"}
