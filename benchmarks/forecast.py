#!/usr/bin/env python3
"""How good the times that plan foretells are: the demo model and a larger random one, scored and cut for real.

The rates are measured as `plan` measures them, just before; the tokens are those that were really scored. One JSON line
on stdout, a table on stderr; `--output docs/forecast.json` keeps the numbers for docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import plan  # noqa: E402
from moeprune.checkpoint.families import understand  # noqa: E402
from moeprune.checkpoint.outline import open_outline  # noqa: E402
from moeprune.planning import forecast  # noqa: E402
from moeprune.planning.rates import scoring_share  # noqa: E402
from moeprune.settings import Settings  # noqa: E402

DEMO = ROOT / "demo"
SAMPLES = 512


SECTION = """\
## Foretold and real times

`python benchmarks/forecast.py --output docs/forecast.json` with {threads} threads: `plan` measures a
product of matrices with numpy and the disk, and the steps then run for real. Real times of scoring hold the start of
Python, torch and transformers, 3 to 4 s, which is what the demo model takes and `plan` leaves out. The last column is
what scoring reached of the product, start included; `plan` multiplies it by 45% in float32 and 80% in bfloat16. By
processor time on one core, models with hidden sizes of 512 and 1024 reached 40 to 54% and 69 to 95% without the start.

| model | size | tokens | score: foretold | real | cut: foretold | real | reached of the product |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    """Make the models, foretell, do, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to keep the result in")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        models = {"demo": DEMO / "model"}
        models |= {dtype: larger(Path(scratch), dtype) for dtype in ("float32", "bfloat16")}
        rows = [compare(name, folder, Path(scratch) / f"output-{name}") for name, folder in models.items()]
    result = {
        "benchmark": "forecast",
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "rows": rows,
    }
    print(section(result), file=sys.stderr)
    print(json.dumps(result))
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def section(result: dict[str, Any]) -> str:
    """The part of docs/measurements.md that tells of it."""
    rows = [
        f"| {row['model']} | {row['bytes'] / 1e6:.0f} MB | {row['tokens']:,} | {row['score_foretold_s']:.1f} s "
        f"| {row['score_s']:.1f} s | {row['cut_foretold_s']:.2f} s | {row['cut_s']:.2f} s | {row['reached']:.0%} |"
        for row in result["rows"]
    ]
    return SECTION.format(rows="\n".join(rows), threads=result["threads"])


def larger(scratch: Path, dtype: str) -> Path:
    """A random model with the demo's tokenizer and more of the proportions of a real one."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = scratch / dtype
    Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    for file in (DEMO / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def compare(name: str, folder: Path, output: Path) -> dict[str, Any]:
    """One model: rates, then the real steps, then what would have been foretold for their tokens."""
    settings = Settings(model_path=str(folder), output_path=output)
    outline = open_outline(str(folder))
    layout = understand(outline.checkpoint)
    weights = plan.weights_of(settings, outline.checkpoint, layout)
    rates = plan.rates_of(settings, outline, weights, None)
    step("reap.py", folder, output, "--calibration-path", DEMO / "calibration.jsonl", "--max-samples", SAMPLES)
    words = step("prune_model.py", folder, output)
    data = json.loads((output / "reap_metadata.json").read_text(encoding="utf-8"))
    tokens = data["inputs"]["calibration"]["tokens"]
    product = rates.compute.value / scoring_share(int(weights.compute_bytes))
    cut = forecast.cutting(weights, layout.experts // 2, rates, base_bytes=0, bytes_per_tensor=0)
    seconds = re.search(r"written and verified in ([\d.]+) s", words)
    return {
        "model": name,
        "bytes": weights.total_bytes,
        "tokens": tokens,
        "product_flops": product,
        "read_bytes_per_s": rates.read.value,
        "write_bytes_per_s": rates.write.value,
        "reached": 2 * weights.scored * tokens / data["timing"]["scoring_s"] / product,
        "score_foretold_s": forecast.scoring(weights, tokens, forecast.room_of(settings), rates).time_s,
        "score_s": data["timing"]["scoring_s"],
        "cut_foretold_s": cut.time_s,
        "cut_s": float(seconds[1]) if seconds else None,
    }


def step(script: str, folder: Path, output: Path, *words: object) -> str:
    """Run a step; what it said."""
    command = [sys.executable, ROOT / script, "--model-path", folder, "--output-path", output, *words]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr


if __name__ == "__main__":
    main()
