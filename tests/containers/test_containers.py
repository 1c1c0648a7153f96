"""The image and the compose file for real: every step of the demo in the container, as a caller who is not root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.containers.conftest import CALLER, ROOT, STATE
from tests.contracts.documents import passed_to_steps
from tests.serving.servers import PATIENCE_S, reserved_port

SMALLER = {"REAP_GENERATIONS": "40", "REAP_EVALUATION_SAMPLES": "40"}  # they also show that the shell reaches a step


@pytest.fixture(scope="module")
def demo(checkout):
    done = checkout.run("--docker", "demo", **SMALLER)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def native(checkout, tmp_path_factory):
    """The same demo on this machine, in a copy that shares nothing with the other."""
    folder = tmp_path_factory.mktemp("native") / "project"
    shutil.copytree(checkout.folder, folder, ignore=shutil.ignore_patterns(".env", "output"))
    (folder / "output").mkdir()
    environ = {k: v for k, v in os.environ.items() if not k.startswith("REAP_")} | SMALLER
    environ["REAP_PYTHON"] = sys.executable
    done = subprocess.run(["./run.sh", "--native", "demo"], cwd=folder, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_demo_runs_in_the_container_without_a_network(demo):
    assert demo.stderr.count("docker compose run --rm") >= 3


def test_stdout_is_the_path_alone_and_a_second_run_is_quick(checkout, demo):
    done = checkout.run("--docker", "reap", "--model-path", "demo/model", "--output-path", "output/demo",
                        "--calibration-path", "demo/calibration.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "output/demo/reap_metadata.json"


def test_results_are_those_of_this_machine_to_the_bit(checkout, demo, native):
    inside, outside = (folder / "output/demo" for folder in (checkout.folder, native))
    scores = [json.loads((folder / "reap_metadata.json").read_text()) for folder in (inside, outside)]
    assert scores[0]["scores"] == scores[1]["scores"]
    assert scores[0]["plan"] == scores[1]["plan"]
    weights = sorted(path.name for path in (inside / "pruned").glob("*.safetensors"))
    assert weights
    for name in [*weights, "config.json"]:
        assert (inside / "pruned" / name).read_bytes() == (outside / "pruned" / name).read_bytes(), name
    reports = [json.loads((folder / "test_report.json").read_text()) for folder in (inside, outside)]
    assert reports[0]["generation"]["prompts"] <= 40
    assert reports[0]["verdict"] == reports[1]["verdict"]
    assert reports[0]["fidelity"] == reports[1]["fidelity"]


def test_every_file_belongs_to_the_caller(checkout, demo):
    made = list((checkout.folder / "output").rglob("*"))
    assert made
    assert {path.stat().st_uid for path in made} == {CALLER if os.getuid() == 0 else os.getuid()}


def test_secrets_are_in_no_layer_and_no_result(checkout, demo):
    inside = checkout.call(
        "docker", "run", "--rm", "--network", "none", "moeprune", "sh", "-c", "cd /opt/moeprune && find . -type f"
    )
    assert inside.returncode == 0, inside.stderr
    names = inside.stdout.splitlines()
    assert "./reap.py" in names
    assert not [name for name in names if ".env" in name or ".git" in name or "output" in name or "tests" in name]
    history = checkout.call("docker", "history", "--no-trunc", "moeprune").stdout
    assert "hf_canary" not in history
    for path in (checkout.folder / "output").rglob("*.json"):
        assert "hf_canary" not in path.read_text(), path


def test_the_base_keeps_its_torch_and_the_user_is_not_root(checkout):
    code = "import torch; print(torch.__version__)"
    base = checkout.environ.get("REAP_BASE_IMAGE")
    versions = {
        checkout.call("docker", "run", "--rm", "--network", "none", image, "python3", "-c", code).stdout
        for image in ("moeprune", base)
        if image
    }
    assert len(versions) == 1 and versions != {""}
    assert checkout.call("docker", "run", "--rm", "--network", "none", "moeprune", "id", "-u").stdout == "1000\n"


def test_only_output_can_be_written(checkout):
    for name in ("demo/model/x", "reap.py", "/opt/moeprune/x"):
        done = checkout.run("--docker", "shell", "-c", f"echo >> {name}")
        assert done.returncode != 0, name
        assert "Read-only" in done.stderr or "Permission denied" in done.stderr
    done = checkout.run("--docker", "shell", "-c", "id -u; touch output/x")
    assert (done.returncode, done.stdout) == (0, f"{CALLER if os.getuid() == 0 else os.getuid()}\n"), done.stderr


def test_a_model_elsewhere_is_mounted_read_only_where_it_is(checkout, demo):
    model = checkout.folder.parent / "elsewhere" / "model"
    model.parent.mkdir(exist_ok=True)
    shutil.copytree(checkout.folder / "demo" / "model", model, dirs_exist_ok=True)
    done = checkout.run("--docker", "prune", "--model-path", str(model), "--dry-run", "--keep", "8",
                        "--output-path", "output/demo", "--other-scores")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{model}:{model}:ro" in done.stderr


@pytest.mark.parametrize(
    ("words", "environ", "code"),
    [
        (["prune", "--prune-ratio", "2"], {}, 2),
        (["reap"], {"REAP_PRUNE_RATOI": "0.3"}, 2),
        (["reap", "--model-path", "nowhere/at-all"], {"HF_HUB_OFFLINE": "1"}, None),
        (["test", "--pruned-output-path", "nowhere"], {}, 3),
    ],
)
def test_exit_codes_come_through(checkout, words, environ, code):
    done = checkout.run("--docker", *words, **environ)
    assert done.returncode in ((3, 4) if code is None else (code,)), done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith(("error: ", "reap.py: error", "prune_model.py: error"))


def test_a_misspelt_name_in_dotenv_is_refused_inside(checkout):
    env = checkout.folder / ".env"
    before = env.read_text()
    env.write_text(before + "REAP_PRUNE_RATOI=0.3\n")
    done = checkout.run("--docker", "reap")
    env.write_text(before)
    assert done.returncode == 2
    assert "did you mean REAP_PRUNE_RATIO?" in done.stderr


def test_compose_passes_every_setting_from_shell_and_dotenv(checkout):
    env = checkout.folder / ".env"
    before = env.read_text()
    names = passed_to_steps()
    env.write_text("".join(f"{name}=from-file\n" for name in names))
    done = checkout.call("docker", "compose", "config", "--format", "json", REAP_SEED="from-shell")
    env.write_text(before)
    assert done.returncode == 0, done.stderr
    expected = dict.fromkeys(names, "from-file") | {"REAP_SEED": "from-shell"}
    for service in json.loads(done.stdout)["services"].values():
        found = {name: value for name, value in service["environment"].items() if name in expected}
        assert found == expected


def test_the_gpu_is_asked_for_where_there_is_one(checkout, tmp_path):
    """A stub of NVIDIA's hook notes what the engine hands over: it proves the request, not a GPU."""
    calls = STATE / "stub" / "calls"
    if not calls.parent.exists():
        pytest.skip("this engine has no stub of NVIDIA's hook")
    calls.unlink(missing_ok=True)
    programs = checkout.folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (programs / "nvidia-smi").chmod(0o755)
    path = f"{programs}:{checkout.environ['PATH']}"
    done = checkout.run("--docker", "test", "--help", PATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " reap python3 " in done.stderr
    assert "NVIDIA_VISIBLE_DEVICES=all" in calls.read_text()
    calls.unlink()
    assert checkout.run("--docker", "prune", "--help", PATH=path).returncode == 0
    assert not calls.exists()


def test_this_is_the_checkout_that_is_tested(checkout):
    assert (Path(checkout.folder) / "Dockerfile").read_bytes() == (ROOT / "Dockerfile").read_bytes()


def test_serve_and_stop_through_compose(checkout, demo):
    """An image with a small server under vLLM's name: it proves service, mount and waiting, not vLLM."""
    context = checkout.folder.parent / "stand-in"
    package = context / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "tests/serving/echo_server.py", package / "echo_server.py")
    (package / "api_server.py").write_text(
        "import runpy, sys, pathlib\n"
        "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert (pathlib.Path(words['--model']) / 'config.json').is_file(), words\n"
        "sys.argv = ['echo', words['--port']]\n"
        "runpy.run_path(str(pathlib.Path(__file__).with_name('echo_server.py')), run_name='__main__')\n"
    )
    (context / "Dockerfile").write_text("FROM moeprune\nENV PYTHONPATH=/stand-in\nCOPY . /stand-in\n")
    built = checkout.call("docker", "build", "-t", "localhost/vllm-stand-in", str(context))
    assert built.returncode == 0, built.stderr
    settings = {"REAP_SERVE_IMAGE": "localhost/vllm-stand-in", "REAP_SERVE_TIMEOUT": str(PATIENCE_S)}
    words = ("--pruned-output-path", "output/demo/pruned")
    with reserved_port() as port:
        try:
            done = checkout.run("--docker", "serve", "pruned", *words, "--serve-port", str(port), **settings)
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stdout.strip() == f"http://127.0.0.1:{port}/v1"
            with urllib.request.urlopen(f"{done.stdout.strip()}/models", timeout=PATIENCE_S) as response:
                assert response.status == 200
        finally:
            stopped = checkout.run("stop")
    assert "stopped pruned" in stopped.stderr
    left = checkout.call("docker", "compose", "--profile", "serve", "ps", "--all", "--quiet").stdout
    assert left == ""


@pytest.mark.parametrize(("blow", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_leaves_no_container(checkout, blow, code):
    words = ["./run.sh", "--docker", "shell", "-c", "echo up; trap 'exit 1' TERM INT; while :; do sleep 0.1; done"]
    process = subprocess.Popen(
        words,
        cwd=checkout.folder,
        env=checkout.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "up\n"
    os.killpg(process.pid, blow) if blow == signal.SIGINT else process.send_signal(blow)
    assert process.wait() == code
    end = time.monotonic() + PATIENCE_S
    while checkout.call("docker", "ps", "--all", "--quiet", "--filter", f"name=moeprune-{process.pid}").stdout:
        assert time.monotonic() < end, "the container is still there"
        time.sleep(0.2)
