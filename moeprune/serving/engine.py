"""A vLLM server for one model: started apart from this process, in a container or on this machine, and found again.

What runs is written to output/serve.json, which `stop` reads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moeprune import console
from moeprune.errors import InputError, MachineError, UsageError
from moeprune.results import newest_model
from moeprune.settings import Settings

STATE, LOG = "serve.json", "serve.log"
SERVICE = {True: "serve", False: "serve-cpu"}  # with a GPU, without
PATIENCE_S = 20.0  # between asking a server to end and ending it


@dataclass(frozen=True)
class Running:
    """A server: pid on this machine, or service of docker-compose.yml."""

    url: str
    model: str
    log: str
    pid: int = 0
    service: str = ""


def model_to_serve(settings: Settings, which: str) -> str:
    """The folder of the pruned model (named, or the newest in the output folder), or the parent."""
    if which == "parent":
        if not settings.model_path:
            raise UsageError("no parent is named; set REAP_MODEL_PATH or pass --model-path")
        return settings.model_path
    folder = settings.pruned_output_path or str(newest_model(settings.output_path))
    if not Path(folder).is_dir():
        raise InputError(f"no pruned model at {folder}; run ./run.sh prune first, or name another --pruned-output-path")
    return folder


def start(settings: Settings, model: str, extra: Sequence[str]) -> Running:
    """Start the server and come back when it answers; a server of ours that runs already is refused."""
    folder = Path(model).absolute()
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; name the folder of a model")
    before = _state(settings)
    if before is not None and _alive(before):
        raise UsageError(f"{before.model} is being served at {before.url}; ./run.sh stop ends it")
    url = f"http://{settings.serve_host}:{settings.serve_port}/v1"
    if _listens(settings.serve_host, settings.serve_port):
        raise UsageError(f"another server answers at {url}; choose another --serve-port")
    reference = str(folder) if folder.exists() else model
    name = settings.served_model or folder.name
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", reference, "--served-model-name", name]
    command += ["--host", settings.serve_host, "--port", str(settings.serve_port), *extra]
    settings.output_path.mkdir(parents=True, exist_ok=True)
    begin = _in_container if settings.runtime == "docker" else _on_this_machine
    running = begin(settings, command, folder, Running(url, name, ""))
    (settings.output_path / STATE).write_text(json.dumps(asdict(running), indent=2) + "\n", encoding="utf-8")
    _wait(running, settings.serve_timeout)
    return running


def _on_this_machine(settings: Settings, command: list[str], _folder: Path, running: Running) -> Running:
    python = settings.serve_python or sys.executable
    if not settings.serve_python and importlib.util.find_spec("vllm") is None:
        raise MachineError("vLLM is not installed here; name an interpreter that has it in REAP_SERVE_PYTHON")
    log = settings.output_path / LOG
    console.say(f"+ {shlex.join([python, *command])} >{log}")
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                [python, *command], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            raise MachineError(f"{python} does not start: {error.strerror}") from None
    return Running(running.url, running.model, str(log), pid=process.pid)


def _in_container(settings: Settings, command: list[str], folder: Path, running: Running) -> Running:
    service = SERVICE[bool(_output(["nvidia-smi", "-L"]))]
    words = ["python3", *command]
    environ = {"SERVE_COMMAND": shlex.join(words), "SERVE_FOLDER": str(folder if folder.exists() else Path.cwd())}
    if settings.serve_image:
        environ["SERVE_IMAGE"] = settings.serve_image
    compose = ["docker", "compose", "up", "--detach", service]
    console.say(f"+ {shlex.join(compose)}  # {environ['SERVE_COMMAND']}")
    if subprocess.run(compose, env=os.environ | environ, stdout=sys.stderr).returncode:
        raise MachineError("docker compose could not start the server; see the lines above")
    return Running(running.url, running.model, f"docker compose logs {service}", service=service)


def _wait(running: Running, longest_s: float) -> None:
    """Loading takes minutes for a large model; a server that ends meanwhile is noticed at once."""
    bar = console.Progress("waiting for the server, seconds", round(longest_s))
    end = time.monotonic() + longest_s
    while time.monotonic() < end:
        if _answers(running.url):
            return
        if not _alive(running):
            raise MachineError(f"the server ended while it loaded: {_last_words(running)}")
        time.sleep(1)
        bar.step()
    raise MachineError(f"no answer from {running.url} within {longest_s:g} s; {running.log} says why, or wait longer")


def _listens(host: str, port: int) -> bool:
    """Whether any program has this port already, a server of models or not."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _alive(running: Running) -> bool:
    if running.service:
        command = ["docker", "compose", "ps", "--status", "running", "--quiet", running.service]
        return bool(_output(command))
    try:
        done, _ = os.waitpid(running.pid, os.WNOHANG)  # our own child would stay as a zombie
        return done == 0
    except ChildProcessError:
        return _is_server(running.pid)


def _is_server(pid: int) -> bool:
    """Whether this process number still belongs to a vLLM server; numbers are used again."""
    return "vllm.entrypoints" in _output(["ps", "-o", "args=", "-p", str(pid)])


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # not there, or in a folder of PATH that this user may not enter
        return ""


def _last_words(running: Running) -> str:
    if running.service:
        text = _output(["docker", "compose", "logs", "--tail", "3", "--no-log-prefix", running.service])
    else:
        text = Path(running.log).read_text(encoding="utf-8", errors="replace")
    return " / ".join(text.splitlines()[-3:]) or "it said nothing"


def stop(settings: Settings) -> None:
    """End the server that `start` started."""
    running = _state(settings)
    if running is None or not _alive(running):
        console.say("no server that ./run.sh serve started is running")
    elif running.service:
        subprocess.run(["docker", "compose", "rm", "--stop", "--force", running.service], stdout=sys.stderr)
        console.say(f"stopped {running.model}")
    else:
        _end(running.pid)
        console.say(f"stopped {running.model}")
    (settings.output_path / STATE).unlink(missing_ok=True)


def _end(pid: int) -> None:
    """The whole process group: vLLM has workers of its own."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, how)
        except ProcessLookupError:
            return
        if _within(PATIENCE_S, lambda: not _is_server(pid)):
            return
    raise MachineError(f"process {pid} does not end; end it by hand")


def _within(seconds: float, happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.1)
    return happened()


def _state(settings: Settings) -> Running | None:
    try:
        return Running(**json.loads((settings.output_path / STATE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
