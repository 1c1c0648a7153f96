"""Pruning against `cp` of the bytes that stay: time (median of paired runs) and peak memory above the interpreter.

    python benchmarks/prune.py [--format bf16 fp8 ...] [--gigabytes 2] [--runs 7] [--against cp_sync|cp] [--folder DIR]

Makes a random checkpoint of that size, of which half of the experts go, lets the page cache hold it, and runs the
stage and `cp` of the result's weights in turns. What is judged is the ratio to `cp` followed by `sync` of its files:
the stage has its result on the disk when it says so, and plain `cp` does not. `--against cp` judges the harder ratio;
both are always reported. One JSON line for each format goes to stdout; beyond a limit the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import checkpoints  # noqa: E402 - the path comes first

RATIO, MEMORY_BYTES = 1.5, 200_000_000
WHY = {
    "cp_sync": "cp and sync: like the stage, it has the bytes on the disk when it ends",
    "cp": "plain cp: it ends while bytes may still be in memory alone, which the stage never does",
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as installed: compiled once


def measured(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process and its children."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=ENVIRONMENT, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_memory(code: str, argv: list[str]) -> int:
    """The most bytes that an interpreter running this code ever held, by its own account."""
    code += "; print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=True)
    return int(done.stdout.split()[-1]) * 1024


def settle(folder: Path) -> None:
    """Remove what a run wrote and let the disk come to rest, so that no run pays for the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def weights(folder: Path) -> list[Path]:
    """The weight files of a model."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]


def bytes_of(folder: Path) -> int:
    """What the weight files of a model take."""
    return sum(path.stat().st_size for path in weights(folder))


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Pruning against cp of the kept bytes.")
    parser.add_argument("--format", nargs="+", choices=checkpoints.NAMES, default=["bf16"])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--against", choices=tuple(WHY), default="cp_sync", help="which ratio is judged")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; empty: a temporary folder")
    options = parser.parse_args()
    failed = False
    for name in options.format:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            failed |= not report(measure(Path(folder), name, options.gigabytes, options.runs), options.against)
    return int(failed)


def measure(work: Path, name: str, gigabytes: float, runs: int) -> dict[str, Any]:
    """Paired runs in turns."""
    keep = checkpoints.make(work / "model", gigabytes, name)
    (work / "plan.json").write_text(json.dumps({"keep": keep}))
    flags = ["--model-path", str(work / "model"), "--plan", str(work / "plan.json"), "--pruned-output-path"]
    code = "import sys, prune_model; prune_model.main(sys.argv[1:])"
    peak = peak_memory(code, [*flags, str(work / "kept")])  # also warms the page cache, and gives what stays
    copy = f"mkdir {work}/copy && cp {' '.join(map(str, weights(work / 'kept')))} {work}/copy/"
    commands = {
        "cp": (["sh", "-c", copy], "copy"),
        "prune": ([sys.executable, "prune_model.py", *flags, str(work / "out")], "out"),
        "cp_sync": (["sh", "-c", f"{copy} && sync {work}/copy/*"], "copy"),
    }
    times: dict[str, list[tuple[float, float]]] = {what: [] for what in commands}
    for _ in range(runs):
        for what, (command, made) in commands.items():
            settle(work / made)
            times[what].append(measured(command))
            settle(work / made)
    result = {
        "benchmark": "prune",
        "format": name,
        "model_bytes": bytes_of(work / "model"),
        "kept_bytes": bytes_of(work / "kept"),
        "runs": runs,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "peak_memory_above_interpreter_bytes": peak - peak_memory("pass", []),
    }
    return result | summed_up(times)


def summed_up(times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians of wall and processor time, and of the ratios of runs that followed each other."""
    result = {}
    for what, pairs in times.items():
        result[f"{what}_s"] = round(statistics.median(wall for wall, _ in pairs), 3)
        result[f"{what}_cpu_s"] = round(statistics.median(cpu for _, cpu in pairs), 3)
    for what in WHY:
        ratios = [mine[0] / other[0] for mine, other in zip(times["prune"], times[what], strict=True)]
        result[f"ratio_to_{what}"] = round(statistics.median(ratios), 3)
    return result


def report(result: dict[str, Any], against: str) -> bool:
    """One JSON line, a table, and a sentence on what was judged; whether it is within the limits."""
    ratio, memory = result[f"ratio_to_{against}"], result["peak_memory_above_interpreter_bytes"]
    good = ratio <= RATIO and memory <= MEMORY_BYTES
    result |= {
        "limits": {"ratio": RATIO, "memory_bytes": MEMORY_BYTES},
        "judged": f"ratio_to_{against}",
        "passed": good,
    }
    print(json.dumps(result), flush=True)
    for key, value in result.items():
        print(f"{key:40} {value:,}" if type(value) is int else f"{key:40} {value}", file=sys.stderr)
    judged = f"{'passed' if good else 'FAILED'}: {ratio} times {WHY[against]}; at most {RATIO}"
    print(f"{judged}, and {memory / 1e6:.0f} MB of memory; at most {MEMORY_BYTES / 1e6:.0f}", file=sys.stderr)
    return good


if __name__ == "__main__":
    sys.exit(main())
