"""serve and stop with a small server in vLLM's place, and with vLLM itself where VLLM_PYTHON names an interpreter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.servers import PATIENCE_S, ROOT, echo_server, reserved_port
from tests.serving.test_batch import batch

STAND_IN = """#!/bin/bash
# Called as an interpreter with -m vllm.entrypoints...; the name stays in the list of processes, as vLLM's would.
echo "asked for: $*"
[[ ! -e {folder}/die ]] || {{ echo "CUDA out of memory"; exit 1; }}
while [[ $1 != --port ]]; do shift; done
exec -a "vllm.entrypoints" {python} {root}/tests/serving/echo_server.py "$2"
"""


class Place:
    """A folder with a model in output/half and a stand-in for vLLM's interpreter."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        for name in ("output/half", "parent"):
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text("{}")
        (folder / "output/half/pruning.json").write_text("{}")
        self.python = folder / "vllm-python"
        self.python.write_text(STAND_IN.format(folder=folder, python=sys.executable, root=ROOT))
        self.python.chmod(0o755)

    def serve(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """serve.py, as run.sh calls it."""
        settings = {
            "REAP_SERVE_PYTHON": str(self.python),
            "REAP_RUNTIME": "native",
            "REAP_SERVE_TIMEOUT": str(PATIENCE_S),
        }
        env = {"PATH": os.environ["PATH"], "REAP_SERVE_PORT": str(self.port), **settings, **environ}
        command = [sys.executable, ROOT / "serve.py", *words]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)

    @property
    def state(self) -> dict | None:
        """What serve.py wrote about the server."""
        path = self.folder / "output/serve.json"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def place(tmp_path):
    with reserved_port() as port:
        made = Place(tmp_path, port)
        yield made
        made.serve("stop")


def test_it_waits_says_where_the_server_is_and_stops_it(place):
    done = place.serve("pruned", "--", "--max-model-len", "128")
    assert done.returncode == 0, done.stderr
    url = f"http://127.0.0.1:{place.port}/v1"
    assert done.stdout == f"{url}\n"
    assert "serving half" in done.stderr
    log = (place.folder / "output/serve.log").read_text()
    model = place.folder / "output/half"
    assert f"--model {model} --served-model-name half --host 127.0.0.1 --port {place.port} --max-model-len 128" in log
    (place.folder / "p.jsonl").write_text('"ab"\n')
    assert batch(place.folder, url, "--prompts-path", "p.jsonl").returncode == 0

    again = place.serve("parent", REAP_MODEL_PATH="parent")
    assert (again.returncode, "half is being served" in again.stderr) == (2, True)

    stopped = place.serve("stop")
    assert (stopped.returncode, "stopped half" in stopped.stderr) == (0, True)
    assert place.state is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", place.port), timeout=1)
    assert "no server that" in place.serve("stop").stderr


def test_the_parent_is_the_configured_model(place):
    assert "no parent is named" in place.serve("parent").stderr
    assert place.serve("parent", REAP_MODEL_PATH="parent").returncode == 0
    assert place.state["model"] == "parent"


def test_a_server_that_dies_while_loading_is_noticed_and_quoted(place):
    (place.folder / "die").touch()
    done = place.serve()
    assert done.returncode == 4
    said = done.stderr.splitlines()[-1]
    assert "the server ended while it loaded" in said and "CUDA out of memory" in said


def test_what_cannot_be_served_is_refused(place):
    assert place.serve("nothing").returncode == 2
    assert place.serve(REAP_PRUNED_OUTPUT_PATH="output").returncode == 3
    assert "no pruned model at nowhere" in place.serve(REAP_PRUNED_OUTPUT_PATH="nowhere").stderr
    assert "vLLM is not installed" in place.serve(REAP_SERVE_PYTHON="").stderr
    (place.folder / "output/half/pruning.json").unlink()
    assert place.serve().returncode == 3


def test_another_server_on_the_port_is_not_taken_for_ours(place):
    with echo_server(place.port):
        done = place.serve()
    assert (done.returncode, "another server answers" in done.stderr) == (2, True)
    assert place.state is None


def test_a_process_number_that_belongs_to_another_program_is_left_alone(place):
    bystander = subprocess.Popen(["sleep", str(PATIENCE_S)])
    try:
        state = {"url": "http://x/v1", "model": "half", "log": "x", "pid": bystander.pid, "service": ""}
        (place.folder / "output/serve.json").write_text(json.dumps(state))
        assert "no server that" in place.serve("stop").stderr
        assert bystander.poll() is None
    finally:
        bystander.kill()


@pytest.mark.skipif(not os.environ.get("VLLM_PYTHON"), reason="VLLM_PYTHON names an interpreter that has vLLM")
@pytest.mark.parametrize("which", ["parent", "pruned"])
def test_vllm_itself_serves_the_demo_model_and_its_cut(place, which):
    """Where vLLM is, the whole chain is real: cut, start, health, answers with the server's token counts, stop."""
    environ = {
        "REAP_SERVE_PYTHON": os.environ["VLLM_PYTHON"],
        "REAP_MODEL_PATH": str(ROOT / "demo/model"),
        "REAP_PRUNED_OUTPUT_PATH": str(place.folder / "output/cut"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    blocks = json.loads((ROOT / "demo/model/config.json").read_text())["num_hidden_layers"]
    keep = {f"model.layers.{block}": list(range(0, 32, 2)) for block in range(blocks)}
    (place.folder / "plan.json").write_text(json.dumps({"keep": keep}))
    cut = [sys.executable, ROOT / "prune_model.py", "--plan", "plan.json"]
    clean = {name: value for name, value in environ.items() if name in ("REAP_MODEL_PATH", "REAP_PRUNED_OUTPUT_PATH")}
    subprocess.run(cut, cwd=place.folder, env={"PATH": os.environ["PATH"], **clean}, check=True, capture_output=True)

    words = ("--enforce-eager", "--max-model-len", "128", "--dtype", "bfloat16")
    done = place.serve(which, "--", *words, **environ)
    assert done.returncode == 0, done.stderr + (place.folder / "output/serve.log").read_text()[-3000:]
    (place.folder / "p.jsonl").write_text('"2 + 2 ="\n"2 + 3 ="\n')
    asked = batch(place.folder, done.stdout.strip(), "--prompts-path", "p.jsonl", "--api", "completions")
    assert asked.returncode == 0, asked.stderr
    found = [json.loads(line) for line in (place.folder / "a.jsonl").read_text().splitlines()]
    assert {entry["model"] for entry in found} == {"model" if which == "parent" else "cut"}
    assert all(entry["completion_tokens"] > 0 for entry in found)
    if which == "parent":
        assert {entry["answer"].strip() for entry in found} == {"4", "5"}
