"""A Docker engine for the container tests: the one that answers, else a private one where a script can start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE_SCRIPTS = Path(os.environ.get("ENGINE_SCRIPTS", ROOT.parent / "shared" / "containers"))
STATE = Path(os.environ.get("STATE", "/var/tmp/dockerlab"))
CALLER = 1000  # the tests call run.sh as this user, who is not root


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and not os.environ.get("CONTAINERS"):
            item.add_marker(pytest.mark.skip(reason="container tests take minutes: CONTAINERS=1 runs them"))


def answers(environ: dict[str, str]) -> bool:
    """Whether a Docker daemon and compose answer."""
    return shutil.which("docker", path=environ["PATH"]) is not None and all(
        subprocess.run(command, env=environ, capture_output=True).returncode == 0
        for command in (["docker", "info"], ["docker", "compose", "version"])
    )


def script(*words: str, **environ: str) -> str:
    """Run one of the engine scripts; a failure skips the tests, because then no engine can be had."""
    full = os.environ | {"STATE": str(STATE)} | environ
    done = subprocess.run([ENGINE_SCRIPTS / words[0], *words[1:]], env=full, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"no Docker engine can be had here: {' '.join(words)}: {why[-200:]}")
    return done.stdout


def private_engine() -> dict[str, str]:
    """The environment in which a private engine answers."""
    lines = [line.removeprefix("export ") for line in script("engine.sh", "env").splitlines()]
    pairs = dict(word.split("=", 1) for line in lines for word in line.split())
    return os.environ | pairs | {"PATH": pairs["PATH"].replace("$PATH", os.environ["PATH"])}


@pytest.fixture(scope="session")
def engine() -> Iterator[dict[str, str]]:
    """An environment in which `docker` works, with a base image named in REAP_BASE_IMAGE."""
    environ = dict(os.environ)
    started = False
    if not answers(environ):
        if os.getuid() or not (ENGINE_SCRIPTS / "engine.sh").exists():
            pytest.skip("no Docker engine answers, and none can be started here")
        environ = private_engine()
        if not answers(environ):
            subprocess.run(["apt-get", "update"], capture_output=True)
            script("engine.sh", "get")
            script("engine.sh", "up", GPU_STUB="1")
            started = True
        found = subprocess.run(["docker", "image", "inspect", "localhost/base:torch"], env=environ, capture_output=True)
        if found.returncode:
            script("base.sh", "--torch", **environ)
        environ["REAP_BASE_IMAGE"] = "localhost/base:torch"
        Path(environ["DOCKER_HOST"].removeprefix("unix://")).chmod(0o666)
    yield environ
    if started:
        script("engine.sh", "down")


@dataclass(frozen=True)
class Checkout:
    """A copy of the tracked files that belongs to the caller."""

    folder: Path
    environ: dict[str, str]

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """./run.sh as the caller."""
        return self.call("./run.sh", *words, **environ)

    def call(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Any command as the caller."""
        user = ("setpriv", f"--reuid={CALLER}", f"--regid={CALLER}", "--clear-groups") if os.getuid() == 0 else ()
        full = self.environ | environ
        return subprocess.run([*user, *command], cwd=self.folder, env=full, capture_output=True, text=True)

    def read(self, name: str) -> dict:
        """A JSON file of the checkout."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def copy_of_the_project(folder: Path) -> None:
    """The tracked files as they are now."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="session")
def checkout(engine) -> Iterator[Checkout]:
    """A checkout with a built image, a canary in its .env, and compose told to give no network to a step."""
    above = Path(tempfile.mkdtemp(prefix="moeprune-", dir="/var/tmp"))
    folder = above / "project"
    home = above / "home"
    home.mkdir()
    folder.mkdir()
    copy_of_the_project(folder)
    settings = Path(engine.get("DOCKER_CONFIG", Path.home() / ".docker"))
    if settings.exists():
        shutil.copytree(settings, home / ".docker", symlinks=True)
    (folder / ".env").write_text("HF_TOKEN=hf_canary\n")
    if os.getuid() == 0:
        subprocess.run(["chown", "-R", f"{CALLER}:{CALLER}", above], check=True)
    keep = {name: value for name, value in engine.items() if not name.startswith("REAP_") or name == "REAP_BASE_IMAGE"}
    made = Checkout(
        folder,
        keep
        | {
            "HOME": str(home),
            "DOCKER_CONFIG": str(home / ".docker"),
            "PWD": str(folder),
            "COMPOSE_FILE": "docker-compose.yml:tests/containers/override.yml",
        },
    )
    built = made.run("build")
    assert built.returncode == 0, built.stderr[-3000:]
    yield made
    shutil.rmtree(above, ignore_errors=True)
