"""Pruning against `cp` of the bytes that stay: time (median of paired runs) and peak memory above the interpreter.

    python benchmarks/prune.py [--gigabytes 2] [--runs 7] [--layout expert|stacked] [--folder DIR]

Makes a random checkpoint of that size with half of its experts to be removed, lets the page cache hold it, and runs
the stage and `cp` of the result's weights in turns. The stage syncs what it writes, so `cp` followed by `sync` of the
same files is measured too. One JSON line goes to stdout.
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

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EXPERTS, HIDDEN, INTER = 64, 1024, 512
SHARD_BYTES = 500_000_000
LIMIT = {"ratio": 1.5, "memory_bytes": 200_000_000}


def write_shard(path: Path, tensors: dict[str, tuple[str, list[int]]], noise: bytes) -> None:
    """One safetensors file whose data is noise."""
    sizes = {"BF16": 2, "F32": 4, "U8": 1}
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape)) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, at, len(noise)):
            file.write(noise[: min(len(noise), at - start)])


def layer(number: int, layout: str) -> dict[str, tuple[str, list[int]]]:
    """The tensors of one decoder layer."""
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.self_attn.{p}_proj.weight": ("BF16", [HIDDEN, HIDDEN]) for p in "qkvo"}
    tensors[f"{prefix}.mlp.gate.weight"] = ("BF16", [EXPERTS, HIDDEN])
    if layout == "stacked":
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = ("BF16", [EXPERTS, 2 * INTER, HIDDEN])
        tensors[f"{prefix}.mlp.experts.down_proj"] = ("BF16", [EXPERTS, HIDDEN, INTER])
        return tensors
    for expert in range(EXPERTS):
        for name, shape in (("gate", [INTER, HIDDEN]), ("up", [INTER, HIDDEN]), ("down", [HIDDEN, INTER])):
            tensors[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = ("BF16", shape)
    return tensors


def make_model(folder: Path, gigabytes: float, layout: str) -> int:
    """A checkpoint of about that size, in shards with an index; gives the number of layers."""
    folder.mkdir()
    noise = np.random.default_rng(0).bytes(1 << 24)
    per_layer = EXPERTS * 3 * HIDDEN * INTER * 2 + (4 * HIDDEN + EXPERTS) * HIDDEN * 2
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    together = max(1, SHARD_BYTES // per_layer)
    weight_map: dict[str, str] = {}
    for first in range(0, layers, together):
        name = f"model-{first // together + 1:05d}-of-{-(-layers // together):05d}.safetensors"
        tensors = {k: v for n in range(first, min(first + together, layers)) for k, v in layer(n, layout).items()}
        if first == 0:
            tensors["model.embed_tokens.weight"] = ("BF16", [1000, HIDDEN])
        write_shard(folder / name, tensors, noise)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": layers, "hidden_size": HIDDEN, "num_experts": EXPERTS}
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 8}, indent=2))
    return layers


def measured(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process and its children."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_memory(code: str, argv: list[str]) -> int:
    """The most bytes that an interpreter running this code ever held, by its own account."""
    code += "; print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return int(done.stdout.split()[-1]) * 1024


def settle(folder: Path) -> None:
    """Remove what a run wrote and let the disk come to rest, so that no run pays for the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="Pruning against cp of the kept bytes.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--layout", choices=("expert", "stacked"), default="expert")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; empty: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        report(options, Path(name))


def report(options: argparse.Namespace, work: Path) -> None:
    """Paired runs in turns, then one JSON line and a table."""
    layers = make_model(work / "model", options.gigabytes, options.layout)
    keep = {f"model.layers.{n}": [(e + n) % 2 + 2 * (e // 2) for e in range(0, EXPERTS, 2)] for n in range(layers)}
    (work / "plan.json").write_text(json.dumps({"keep": keep}))
    flags = ["--model-path", str(work / "model"), "--plan", str(work / "plan.json")]
    prune = [sys.executable, "prune_model.py", *flags, "--pruned-output-path", str(work / "out")]
    copy = ["sh", "-c", f"mkdir {work}/copy && cp {work}/kept/*.safetensors {work}/copy/"]
    synced = [*copy[:2], f"{copy[2]} && sync {work}/copy/*"]
    code = "import sys, prune_model; prune_model.main(sys.argv[1:])"
    peak = peak_memory(code, [*prune[2:-1], str(work / "kept")])  # also warms the page cache, and gives what stays
    times: dict[str, list[tuple[float, float]]] = {"prune": [], "cp": [], "cp_sync": []}
    for _ in range(options.runs):
        for what, command, made in (("cp", copy, "copy"), ("prune", prune, "out"), ("cp_sync", synced, "copy")):
            settle(work / made)
            times[what].append(measured(command))
            settle(work / made)
    kept = sum(path.stat().st_size for path in (work / "kept").glob("*.safetensors"))
    result = {
        "benchmark": "prune",
        "layout": options.layout,
        "model_bytes": sum(path.stat().st_size for path in (work / "model").glob("*.safetensors")),
        "kept_bytes": kept,
        "runs": options.runs,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    for what, pairs in times.items():
        result[f"{what}_s"] = round(statistics.median(wall for wall, _ in pairs), 3)
        result[f"{what}_cpu_s"] = round(statistics.median(cpu for _, cpu in pairs), 3)
    for what in ("cp", "cp_sync"):
        ratios = [mine[0] / other[0] for mine, other in zip(times["prune"], times[what], strict=True)]
        result[f"ratio_to_{what}"] = round(statistics.median(ratios), 3)
    result["peak_memory_above_interpreter_bytes"] = peak - peak_memory("pass", [])
    result["limits"] = LIMIT
    print(json.dumps(result))
    for key, value in result.items():
        print(f"{key:40} {value}", file=sys.stderr)


if __name__ == "__main__":
    main()
