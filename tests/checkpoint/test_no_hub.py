"""A hub that is not there, does not answer as one, or does not know the model: one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from moeprune.checkpoint.folder import locate_model
from moeprune.checkpoint.outline import open_outline
from moeprune.errors import InputError, MachineError, StageError
from tests.checkpoint.stand_in import send, served

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

    def answer(to: BaseHTTPRequestHandler) -> None:
        if status:
            send(to, status, body, headers)

    with served(answer, monkeypatch, tmp_path):
        yield request.param


@pytest.mark.parametrize("model", ["maker/model", "maker/model:Q4_K_M"])
@pytest.mark.parametrize("ask", [locate_model, open_outline])
def test_a_model_that_the_hub_does_not_give(ask, model, hub, capfd):
    with pytest.raises(StageError) as caught:
        ask(model)
    text = str(caught.value)
    unknown = hub == "a hub without it"
    assert isinstance(caught.value, InputError if unknown else MachineError), text
    assert "maker/model" in text
    assert "on this disk" in text or "folder" in text or unknown
    assert "\n" not in text
    assert len(text) < 400
    assert capfd.readouterr().err.count("\n") < 3  # no retry of the library fills the screen


@pytest.mark.parametrize("ask", [locate_model, open_outline])
def test_what_no_model_is_named(ask):
    with pytest.raises(InputError, match=r"no folder at a/b--c.* check the path"):
        ask("a/b--c")
