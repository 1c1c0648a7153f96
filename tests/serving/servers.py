"""Servers for the tests: a port that nobody else can take, and the small server in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 900  # ends a test that hangs; nothing is measured by it


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port held by a socket that does not listen: connections are refused, and only a server told of it binds it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def echo_server(port: int, answers: int | None = None) -> Iterator[subprocess.Popen]:
    """The server of echo_server.py, listening; after so many answers it leaves every question open."""
    words = [sys.executable, ROOT / "tests/serving/echo_server.py", str(port)]
    words += [] if answers is None else [str(answers)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[int]:
    """`transformers serve` for one model; yields its port."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(sys.executable).with_name("transformers")
    with reserved_port() as port, log.open("w") as file:
        command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), model]
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file) as server:
            try:
                wait_until_listening(port, server)
                yield port
            finally:
                server.kill()


def wait_until_listening(port: int, process: subprocess.Popen) -> None:
    """For a server that does not say when it listens."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")
