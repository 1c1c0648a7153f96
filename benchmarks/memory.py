#!/usr/bin/env python3
"""Peak memory of scoring while the model grows fourfold in layers: flat, because one layer is in memory at a time.

Each size is scored by a process of its own, which reports the most memory it ever took. One JSON line on stdout, a
table on stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SLACK = 0.10  # the largest model may take this much more than the smallest


def child(folder: Path) -> None:
    """Score one model, then print the peak of this process in bytes, and what importing alone took."""
    import torch
    from score import DOMAINS, make_batches

    from moeprune.checkpoint.families import understand
    from moeprune.checkpoint.folder import open_checkpoint
    from moeprune.scoring.adapters import attached, find_sites
    from moeprune.scoring.memory import peak
    from moeprune.scoring.observer import Observer
    from moeprune.scoring.run import forward
    from moeprune.scoring.streaming import LayerStream
    from moeprune.settings import Settings

    imported = peak(torch.device("cpu"))
    data = make_batches(2, 4, 256)
    opened = open_checkpoint(folder)
    stream = LayerStream(opened, Settings(output_path=folder.parent))
    observer = Observer(stream, data, DOMAINS)
    find_sites(observer, understand(opened).blocks)
    with attached(observer):
        stream.run([forward(batch) for batch in data], watchers=(observer,), until=observer.sites[-1].layer)
    layer = max(stream.loader.nbytes[name] for name in stream.layers)
    print(json.dumps({"imported_bytes": imported, "peak_bytes": peak(stream.device), "layer_bytes": layer}))


def main() -> None:
    """Score models of growing depth and compare their peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="4,8,16", help="numbers of layers, ascending")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    rows = [measure(int(layers)) for layers in arguments.layers.split(",")]
    growth = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"{'layers':>8}{'model':>12}{'one layer':>12}{'imports':>12}{'peak':>12}", file=sys.stderr)
    for row in rows:
        sizes = (row[name] for name in ("model_bytes", "layer_bytes", "imported_bytes", "peak_bytes"))
        print(f"{row['layers']:>8}" + "".join(f"{count / 1e6:>9.0f} MB" for count in sizes), file=sys.stderr)
    print(json.dumps({"benchmark": "memory", "rows": rows, "growth": round(growth, 4), "limit": 1 + SLACK}))
    sys.exit(0 if growth <= 1 + SLACK else 1)


def measure(layers: int) -> dict[str, int]:
    """Make a model of this depth and score it in a process of its own."""
    import torch
    from score import make_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, layers, torch.float32)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, __file__, "--child", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"layers": layers, "model_bytes": size, **json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    main()
