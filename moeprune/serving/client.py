"""A client of OpenAI-compatible servers that keeps asking while asking again can help."""

from __future__ import annotations

import http.client
import json
import random
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from moeprune.errors import InputError, MachineError, UsageError

WORTH_A_RETRY = {408, 425, 429, 500, 502, 503, 504}
HOPELESS = {401, 403, 404, 405}  # every other prompt would fail the same way
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


class Failed(Exception):
    """One prompt has no answer: refused by the server, or every attempt failed."""


class Stopped(Exception):
    """The run ended while this request was waiting."""


class _Again(Exception):
    """An attempt failed in a way that another one may mend."""

    def __init__(self, why: str, pause_s: float | None = None) -> None:
        super().__init__(why)
        self.pause_s = pause_s


@dataclass(frozen=True)
class Server:
    """Where the server is, and how patient to be with it."""

    url: str  # up to /v1
    key: str = ""
    timeout_s: float = 600.0  # without a byte from the server
    attempts: int = 8
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{self.url!r} is not the address of a server; write http://host:8000/v1")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
        """The JSON object that the server answers with, and how many attempts it took. Without a body: GET."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(self._target(path), body), attempt
            except _Again as error:
                if attempt == self.attempts:
                    raise Failed(f"{error} ({attempt} attempts)") from None
                self._pause(attempt, error.pause_s)
        raise AssertionError("at least one attempt is made")

    def only_model(self) -> str:
        """The name of the model that is served, when there is exactly one."""
        try:
            answer, _ = self.ask("/models")
        except Failed as error:
            raise MachineError(f"no answer from {self.url}: {error}") from None
        names = [entry["id"] for entry in answer.get("data", []) if isinstance(entry, dict) and "id" in entry]
        if len(names) != 1:
            raise UsageError(f"{self.url} serves {', '.join(names) or 'nothing'}; name one model with --served-model")
        return str(names[0])

    def count_tokens(self, model: str, text: str) -> int | None:
        """Tokens of a text by the server's own /tokenize, where it has one."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        root = urlsplit(self.url).path.removesuffix("/").removesuffix("/v1")
        try:
            count = self._once(f"{root}/tokenize", body).get("count")
        except (_Again, Failed, InputError):
            return None
        return count if isinstance(count, int) else None

    def _target(self, path: str) -> str:
        return urlsplit(self.url).path.removesuffix("/") + path

    def _pause(self, attempt: int, asked_s: float | None) -> None:
        """Twice as long each time, anywhere in the upper half of it, so that many clients do not come back at once."""
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
        pause = longest * random.uniform(0.5, 1) if asked_s is None else min(asked_s, 10 * LONGEST_PAUSE_S)
        if self.stop.wait(pause):
            raise Stopped

    def _once(self, target: str, body: dict[str, Any] | None) -> dict[str, Any]:
        status, headers, content = self._exchange(target, body)
        if status in WORTH_A_RETRY:
            raise _Again(f"HTTP {status}", _seconds(headers.get("Retry-After")))
        if status in HOPELESS:
            raise InputError(f"{self.url} answers {status} {_phrase(status)} to {target}: {_shortened(content)}")
        if status != HTTPStatus.OK:
            raise Failed(f"HTTP {status}: {_shortened(content)}")
        try:
            answer = json.loads(content)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise _Again("the answer is not JSON") from None
        if not isinstance(answer, dict):
            raise _Again("the answer is not a JSON object")
        return answer

    def _exchange(self, target: str, body: dict[str, Any] | None) -> tuple[int, http.client.HTTPMessage, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout_s)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", target, payload, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except TimeoutError:
            raise _Again(f"no answer within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase


def _shortened(content: bytes) -> str:
    return " ".join(content[:300].decode("utf-8", "replace").split())
