#!/usr/bin/env python3
"""How good the times that plan foretells are: the demo model and a larger random one, scored and cut for real.

The rates are measured as `plan` measures them, just before; the tokens are those that were really scored. One JSON line
on stdout, a table on stderr.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: E402

import plan  # noqa: E402
from moeprune.checkpoint.families import understand  # noqa: E402
from moeprune.checkpoint.outline import open_outline  # noqa: E402
from moeprune.planning import forecast  # noqa: E402
from moeprune.settings import Settings  # noqa: E402

DEMO = ROOT / "demo"
SAMPLES = 512


def main() -> None:
    """Make the models, foretell, do, compare."""
    with tempfile.TemporaryDirectory() as scratch:
        models = {"demo": DEMO / "model"}
        models |= {str(d).removeprefix("torch."): larger(Path(scratch), d) for d in (torch.float32, torch.bfloat16)}
        rows = [compare(name, folder, Path(scratch) / f"output-{name}") for name, folder in models.items()]
    print(f"{'':<10}{'tokens':>8}{'product':>14}{'score: foretold':>17}{'real':>8}{'cut: foretold':>15}{'real':>8}",
          file=sys.stderr)  # fmt: skip
    for row in rows:
        print(f"{row['model']:<10}{row['tokens']:>8}{row['rates']['compute']['value'] / 1e12:>7.3f} TFLOP/s"
              f"{row['score_foretold_s']:>15.1f} s{row['score_s']:>6.1f} s{row['cut_foretold_s']:>13.2f} s"
              f"{row['cut_s']:>6.2f} s", file=sys.stderr)  # fmt: skip
    print(json.dumps({"benchmark": "forecast", "threads": torch.get_num_threads(), "rows": rows}))


def larger(scratch: Path, dtype: torch.dtype) -> Path:
    """A random model with the demo's tokenizer and more of the proportions of a real one."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=2048, moe_intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = scratch / str(dtype)
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)
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
    cut = forecast.cutting(weights, layout.experts // 2, rates, base_bytes=0, bytes_per_tensor=0)
    seconds = re.search(r"written and verified in ([\d.]+) s", words)
    return {
        "model": name,
        "bytes": weights.total_bytes,
        "tokens": tokens,
        "rates": asdict(rates),
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
