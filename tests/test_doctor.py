"""What the doctor says, decided on facts alone; the facts of real machines are written down here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from moeprune.doctor import Gpu, Machine, Model, describe_model, examine, parse_gpu
from moeprune.settings import Settings
from tests.checkpoint import test_gguf

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = dict.fromkeys(("torch", "transformers", "safetensors", "numpy", "greenlet", "python-dotenv"), "9.9")
H100 = Machine(
    packages=PACKAGES,
    docker="28.2.1",
    compose="2.36.0",
    runtimes=("nvidia", "runc"),
    image=True,
    gpus=(Gpu("NVIDIA H100 80GB HBM3", "580.82.07", 85_520_809_984),),
    memory_total=2_000_000_000_000,
    memory_free=1_900_000_000_000,
    disk_free=5_000_000_000_000,
    docker_disk_free=500_000_000_000,
)
SPARK = replace(
    H100, gpus=(parse_gpu("NVIDIA GB10, 580.95.05, [N/A]"),), memory_total=128 * 10**9, page_cache=60 * 10**9
)
QWEN = Model("Qwen3-30B-A3B", total=61 * 10**9, result=32 * 10**9, layer=1_250_000_000)


def states(machine: Machine, model: Model = QWEN, **settings) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "note": [], "missing": []}
    for finding in examine(machine, Settings(**settings), model):
        found[finding.state].append(finding.text)
    return found


def test_a_complete_h100_host_lacks_nothing():
    found = states(H100)
    assert found["missing"] == found["note"] == []
    assert any("H100" in text and "85.5 GB" in text for text in found["ok"])


def test_unified_memory_is_recognised_and_the_page_cache_named():
    found = states(SPARK)
    assert any("memory shared with the CPU" in text for text in found["ok"])
    assert any("drop_caches" in text and "60 GB" in text for text in found["note"])
    assert not any("drop_caches" in text for text in states(replace(SPARK, page_cache=10**9))["note"])
    assert not any("drop_caches" in text for text in states(replace(H100, page_cache=10**12))["note"])


def test_docker_with_a_gpu_needs_the_nvidia_runtime():
    machine = replace(H100, runtimes=("runc",))
    assert any("nvidia-ctk" in text for text in states(machine)["missing"])
    assert states(machine, runtime="native")["missing"] == []


def test_what_is_missing_depends_on_where_steps_run():
    machine = replace(H100, docker="", compose="", docker_error="sudo systemctl start docker", packages={})
    assert any("systemctl" in text for text in states(machine, runtime="docker")["missing"])
    assert states(machine)["missing"] == []
    assert any("the first step installs them" in text for text in states(machine)["note"])
    assert any("too old" in text for text in states(replace(H100, compose="2.3.3"))["missing"])


def test_cpu_torch_beside_a_gpu_is_found():
    machine = replace(H100, packages=PACKAGES | {"torch": "2.13.0+cpu"})
    assert any("CPU build" in text for text in states(machine, runtime="native")["missing"])
    assert states(replace(machine, gpus=()), runtime="native")["missing"] == []


def test_an_old_driver_is_noted():
    machine = replace(H100, gpus=(replace(H100.gpus[0], driver="535.104.05"),))
    assert any("535.104.05 is older" in text for text in states(machine)["note"])


def test_disk_and_memory_are_compared_with_the_model():
    assert any(text.startswith("disk") for text in states(replace(H100, disk_free=31 * 10**9))["missing"])
    assert any(text.startswith("memory") for text in states(replace(H100, memory_free=10**9))["missing"])
    assert states(H100, Model("x", problem="not a folder"))["note"] == ["model: not a folder"]


def test_the_configured_model_is_measured_from_its_headers():
    folder = ROOT / "demo" / "model"
    with safe_open(folder / "model.safetensors", "np") as file:
        numbers = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    experts = 2 * sum(count for name, count in numbers.items() if ".experts." in name)
    layer = 2 * sum(count for name, count in numbers.items() if name.startswith("model.layers.0."))
    routers = 0.01 * experts  # a row for each expert, which goes with it
    for wish, removed in (({"prune_ratio": 0.5}, 0.5), ({"keep": 8}, 0.75)):
        found = describe_model(Settings(model_path=str(folder), **wish))
        assert (found.total, found.layer, found.problem) == (2 * sum(numbers.values()), layer, "")
        assert abs(found.total - found.result - removed * experts) <= routers
    assert "no/where is not here" in describe_model(Settings(model_path="no/where")).problem


def test_a_gguf_file_is_measured_as_it_will_be_loaded(tmp_path):
    data, stored = test_gguf.build(test_gguf.ENTRIES, test_gguf.TENSORS)
    (tmp_path / "model.gguf").write_bytes(data)
    found = describe_model(Settings(model_path=str(tmp_path / "model.gguf")))
    sizes = [math.prod(shape) for name, (_, shape) in test_gguf.TENSORS.items() if name.startswith("blk.0.")]
    assert (found.total, found.layer, found.problem) == (sum(map(len, stored.values())), 2 * sum(sizes), "")


def run_doctor(cwd: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeprune.doctor", *words]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


def test_this_machine_and_an_unsound_dotenv(tmp_path):
    assert "steps run" in run_doctor(tmp_path, REAP_RUNTIME="native").stderr
    (tmp_path / ".env").write_text("REAP_SEED='1'\n")
    done = run_doctor(tmp_path, REAP_RUNTIME="native")
    assert done.returncode == 4
    assert ".env:1: write NAME=value" in done.stderr


def test_words_it_does_not_know_are_refused(tmp_path):
    done = run_doctor(tmp_path, "--verbose")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "takes no arguments (--verbose)" in done.stderr
