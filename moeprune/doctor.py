"""What this machine has, what is missing, and what to do about it: `./run.sh doctor`.

`look` gathers facts; everything behind it decides on those facts alone. Runs with any Python 3.11, before set-up too.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moeprune import console, errors
from moeprune.errors import MachineError, UsageError
from moeprune.settings import FIELDS, Settings, env_name, resolve

NEEDED = ("torch", "transformers", "safetensors", "numpy", "greenlet", "python-dotenv")
OLDEST_COMPOSE = (2, 20)
OLDEST_DRIVER = 580  # for CUDA 13, which NVIDIA's 26.07 images hold
IMAGE_BYTES = 25_000_000_000  # NVIDIA's PyTorch image, unpacked
PYTHON_BYTES = 2_000_000_000  # an interpreter with torch loaded
UNIFIED = "GB10"  # CPU and GPU share one memory there


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    driver: str
    memory: int | None  # bytes; None where it is shared with the CPU


@dataclass(frozen=True)
class Model:
    """What the configured model will need, from its headers."""

    name: str
    total: int = 0
    result: int = 0  # about: after the configured cut
    layer: int = 0  # the largest one
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """The facts. Docker's answers are empty where it gave none."""

    packages: dict[str, str] = field(default_factory=dict)
    docker: str = ""
    docker_error: str = ""
    compose: str = ""
    runtimes: tuple[str, ...] = ()
    image: bool = False
    gpus: tuple[Gpu, ...] = ()
    memory_total: int = 0
    memory_free: int = 0
    page_cache: int = 0
    disk_free: int = 0
    docker_disk_free: int = 0


@dataclass(frozen=True)
class Finding:
    """One line for the person: state is ok, note or missing."""

    state: str
    text: str


def main(argv: list[str]) -> None:
    """Print every finding; exit code 4 when something is missing that the configured way of running needs."""
    if argv:
        raise UsageError(f"doctor takes no arguments ({' '.join(argv)}); it reads .env and the environment")
    settings, problem = _settings()
    found = [Finding("missing", problem)] if problem else [Finding("ok", f".env and environment: {_said(settings)}")]
    found += examine(look(settings), settings, describe_model(settings))
    for finding in found:
        console.say(f"{finding.state:8}{finding.text}")
    missing = sum(finding.state == "missing" for finding in found)
    if missing:
        raise MachineError(f"{missing} {'thing is' if missing == 1 else 'things are'} missing; see the lines above")


def _settings() -> tuple[Settings, str]:
    try:
        return resolve("reap", []), ""
    except UsageError as error:
        return Settings(), str(error)
    except ModuleNotFoundError:  # python-dotenv comes with the set-up
        return Settings(), ".env cannot be read before the set-up: ./run.sh demo makes one"


def _said(settings: Settings) -> str:
    names = sorted(env_name(f) for f in FIELDS if f.name in settings.origin)
    return ", ".join(names) or "nothing set, all defaults"


def examine(machine: Machine, settings: Settings, model: Model) -> list[Finding]:
    """All findings about a machine, in the order in which a person would mend them."""
    docker_works = bool(machine.docker and machine.compose)
    in_docker = settings.runtime == "docker" or (settings.runtime == "auto" and docker_works)
    return [
        Finding(
            "ok",
            f"steps run {'in the container' if in_docker else 'on this machine'} (REAP_RUNTIME={settings.runtime})",
        ),
        *_docker(machine, in_docker),
        *_native(machine, in_docker),
        *_gpu(machine, in_docker),
        *_room(machine, settings, model, in_docker),
    ]


def _docker(machine: Machine, needed: bool) -> Iterator[Finding]:
    lacking = "missing" if needed else "note"
    if not machine.docker:
        why = machine.docker_error or "install Docker Engine and its compose plugin to run in a container"
        yield Finding(lacking, f"Docker does not answer: {why}")
        return
    yield Finding("ok", f"Docker {machine.docker}")
    if not machine.compose:
        yield Finding(lacking, "docker compose is not there: install the package docker-compose-plugin")
    elif _version(machine.compose) < OLDEST_COMPOSE:
        yield Finding(lacking, f"docker compose {machine.compose} is too old: 2.20 or newer is needed")
    else:
        yield Finding("ok", f"docker compose {machine.compose}")
    if machine.image:
        yield Finding("ok", "image moeprune is built")
    else:
        yield Finding("note", "image moeprune is not built yet: ./run.sh build, or the first step does it")


def _native(machine: Machine, in_docker: bool) -> Iterator[Finding]:
    lacking = [name for name in NEEDED if name not in machine.packages]
    if lacking and not in_docker:
        yield Finding("note", f"Python packages to come: {', '.join(lacking)}; the first step installs them into .venv")
    elif not lacking:
        shown = ", ".join(f"{name} {machine.packages[name]}" for name in ("torch", "transformers"))
        yield Finding("ok", f"Python packages for this machine: {shown}")
        if machine.gpus and "+cpu" in machine.packages["torch"] and not in_docker:
            yield Finding(
                "missing",
                "torch is the CPU build though there is a GPU: remove .venv and run a step again",
            )


def _gpu(machine: Machine, in_docker: bool) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("note", "no NVIDIA GPU answers (nvidia-smi): everything runs on the CPU, slowly for large models")
        return
    for gpu in machine.gpus:
        memory = "memory shared with the CPU" if gpu.memory is None else console.size(gpu.memory)
        yield Finding("ok", f"GPU {gpu.name}, {memory}, driver {gpu.driver}")
    if in_docker and not any("nvidia" in runtime for runtime in machine.runtimes):
        yield Finding(
            "missing",
            "Docker does not know the NVIDIA runtime: install nvidia-container-toolkit, then "
            "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker",
        )
    if in_docker and _version(machine.gpus[0].driver)[0] < OLDEST_DRIVER:
        yield Finding(
            "note", f"driver {machine.gpus[0].driver} is older than {OLDEST_DRIVER}, which the default image expects: "
            "update it, or name an older image in REAP_BASE_IMAGE"
        )  # fmt: skip
    if any(UNIFIED in gpu.name or gpu.memory is None for gpu in machine.gpus) and machine.page_cache > 4e9:
        yield Finding(
            "note", f"the page cache holds {console.size(machine.page_cache)} of the memory that CPU and GPU share: "
            "before a large run, sync && echo 3 | sudo tee /proc/sys/vm/drop_caches"
        )  # fmt: skip


def _room(machine: Machine, settings: Settings, model: Model, in_docker: bool) -> Iterator[Finding]:
    if in_docker and not machine.image and machine.docker_disk_free < IMAGE_BYTES and machine.gpus:
        free = console.size(machine.docker_disk_free)
        yield Finding(
            "note", f"Docker's disk has {free} free; the default image takes about {console.size(IMAGE_BYTES)}"
        )
    if model.problem:
        yield Finding("note", f"model: {model.problem}")
        return
    yield Finding(
        "ok", f"model {model.name}: {console.size(model.total)}, about {console.size(model.result)} after the cut"
    )
    need = int(model.result * 1.02) + min(settings.hidden_memory, model.total)
    yield _compare("disk in the output folder", machine.disk_free, need, "free some, or move REAP_OUTPUT_PATH")
    need = PYTHON_BYTES + 2 * model.layer + min(settings.hidden_memory, machine.memory_total // 2)
    yield _compare("memory for scoring", machine.memory_free, need, "lower REAP_HIDDEN_MEMORY and REAP_BATCH_SIZE")


def _compare(what: str, have: int, need: int, advice: str) -> Finding:
    text = f"{what}: {console.size(have)} free, up to {console.size(need)} needed"
    return Finding("ok", text) if have >= need else Finding("missing", f"{text}; {advice}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2]) or (0,)


# --- gathering ------------------------------------------------------------------------------------------------------


def describe_model(settings: Settings) -> Model:
    """Sizes from the headers of a local model; a hub id is not downloaded for this."""
    name = settings.model_path
    if not name:
        return Model("", problem="none configured (REAP_MODEL_PATH), so disk and memory are not compared with it")
    if not Path(name).exists():
        return Model(name, problem=f"{name} is not here; as a hub id it will be downloaded by the first step")
    try:
        from moeprune.checkpoint import families, folder

        checkpoint = folder.open_checkpoint(Path(name))
        layout = families.understand(checkpoint)
    except ModuleNotFoundError:
        return Model(name, problem=f"{name} is looked into once the set-up is done")
    except errors.InputError as error:
        return Model(name, problem=str(error))
    experts = sum(checkpoint.tensors[part.tensor].nbytes for block in layout.blocks for part in block.parts)
    layers: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        layer = re.match(r".*?\.\d+\.", tensor.name)
        of_gguf = checkpoint.container == "gguf"  # dequantized as it is loaded: two bytes for each number
        layers[layer[0] if layer else tensor.name] += 2 * math.prod(tensor.shape) if of_gguf else tensor.nbytes
    total = checkpoint.total_bytes
    removed = 1 - settings.keep / layout.experts if settings.keep else settings.prune_ratio
    return Model(name, total, total - int(experts * removed), max(layers.values()))


def look(settings: Settings) -> Machine:
    """Ask Docker, nvidia-smi, the kernel and the disk."""
    memory = _meminfo()
    docker, problem = _ask("docker", "version", "--format", "{{.Server.Version}}")
    runtimes = _ask("docker", "info", "--format", "{{json .Runtimes}}")[0] if docker else ""
    root = _ask("docker", "info", "--format", "{{.DockerRootDir}}")[0] if docker else ""
    return Machine(
        packages={name: version for name in NEEDED if (version := _installed(name))},
        docker=docker,
        docker_error=_docker_advice(problem),
        compose=_ask("docker", "compose", "version", "--short")[0],
        runtimes=tuple(json.loads(runtimes)) if runtimes.startswith("{") else (),
        image=bool(docker and _ask("docker", "image", "inspect", "moeprune", "--format", "{{.Id}}")[0]),
        gpus=_gpus(),
        memory_total=memory.get("MemTotal", 0),
        memory_free=memory.get("MemAvailable", 0),
        page_cache=memory.get("Cached", 0),
        disk_free=_free(settings.output_path),
        docker_disk_free=_free(Path(root)) if root else 0,
    )


def _ask(*command: str) -> tuple[str, str]:
    """What a program answers on stdout, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError:  # not there, or in a folder of PATH that this user may not enter
        return "", ""
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} does not answer within 20 s"
    return (done.stdout.strip(), "") if done.returncode == 0 else ("", " ".join(done.stderr.split()))


def _docker_advice(problem: str) -> str:
    if "permission denied" in problem.lower():
        return "this user may not use it: sudo usermod -aG docker $USER, then log in again"
    if "daemon running" in problem.lower() or "cannot connect" in problem.lower():
        return "the program is there but its service is not: sudo systemctl start docker"
    return problem


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> tuple[Gpu, ...]:
    query = "--query-gpu=name,driver_version,memory.total"
    rows, _ = _ask("nvidia-smi", query, "--format=csv,noheader,nounits")
    return tuple(parse_gpu(row) for row in rows.splitlines() if row.count(",") == 2)


def parse_gpu(row: str) -> Gpu:
    """One row of nvidia-smi; a GPU without memory of its own answers [N/A]."""
    name, driver, mebibytes = (part.strip() for part in row.split(","))
    return Gpu(name, driver, int(mebibytes) * 2**20 if mebibytes.isdigit() else None)


def _meminfo() -> dict[str, int]:
    path = Path("/proc/meminfo")
    if not path.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"MemTotal": total, "MemAvailable": total}
    rows = re.findall(r"(\w+):\s+(\d+) kB", path.read_text(encoding="ascii"))
    return {name: int(count) * 1024 for name, count in rows}


def _free(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


if __name__ == "__main__":
    errors.run(main)
