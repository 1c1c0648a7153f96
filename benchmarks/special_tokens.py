#!/usr/bin/env python3
"""Should special tokens count? A chat model made from the demo model, scored with and without them.

    python benchmarks/special_tokens.py [--model FOLDER] [--seeds 5] [--output FILE]

The demo model's chats have no marks of roles and no begin of text. So it first learns some on its own training data:
<s> in front of every document, <|user|> and <|assistant|> before their turns, <|endoftext|> behind the answer; about
ten minutes on two cores, or --model with the folder of an earlier run. Then each draw of calibration data is scored
twice: with every token in the sums, and without the special ones; the latter also with the experts kept that work
mostly for special tokens. KL and exact as in benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import bench  # noqa: E402  (puts the demo folder on the path)
from benchmarks.bench import RATIOS, Bench, Loss, Method, facts, summed_up  # noqa: E402

import train  # noqa: E402  # isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer  # noqa: E402

from moeprune.metadata import Sums, write_json  # noqa: E402

BEGIN, USER, ASSISTANT = "<s>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COUNTED = ("count", "skip")
STEPS = 300
PEAK_RATE = 0.006  # a third of what the model was trained with from nothing
TOKENS = 1200  # of each domain
METHODS = (("reap", "pooled"), ("weighted_ean_sum", "pooled"), ("weighted_ean_sum", "shares"))
VARIANTS = (("count", "none"), ("skip", "none"), ("skip", "auto"))  # --special-tokens, --protect


def chat_tokenizer() -> Qwen2Tokenizer:
    """The demo's tokenizer with the marks of a chat."""
    tokenizer = AutoTokenizer.from_pretrained(bench.MODEL)
    tokenizer.add_special_tokens({"bos_token": BEGIN, "additional_special_tokens": [USER, ASSISTANT]})
    from tokenizers.processors import TemplateProcessing

    begin = [(BEGIN, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=begin)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chats(samples: Sequence[Any], tokenizer: Qwen2Tokenizer) -> list[tuple[list[int], list[float]]]:
    """Samples as (tokens, loss weights) in the form of the chat template."""
    user, assistant = tokenizer.convert_tokens_to_ids([USER, ASSISTANT])
    documents = []
    for (ids, weights), sample in zip(plain_encode(samples, tokenizer), samples, strict=True):
        ids = [token for token in ids if token != tokenizer.bos_token_id]
        length = len(tokenizer(sample.prompt, add_special_tokens=False)["input_ids"])
        marks = [tokenizer.bos_token_id, user] if sample.answer else [tokenizer.bos_token_id]
        turn = [assistant] if sample.answer else []
        weights = weights[-len(ids) :]
        made = marks + ids[:length] + turn + ids[length:]
        documents.append((made, [0.0] * len(marks) + weights[:length] + [0.2] * len(turn) + weights[length:]))
    return documents


plain_encode = train.encode


def teach(folder: Path, steps: int) -> None:
    """Train the demo model on in chats and save it in `folder`."""
    os.environ.update(train.PROCESS_ENVIRONMENT)
    train.PROCESSES, train.encode = 1, chats
    tokenizer = chat_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(bench.MODEL, dtype=torch.bfloat16)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=True)
    model.config.bos_token_id = tokenizer.bos_token_id
    model.set_attn_implementation("eager")
    model.set_experts_implementation("grouped_mm")
    evaluation = {domain: train.draw_evaluation(domain) for domain in train.DOMAINS}
    held_out = {train.identity(s) for domain in train.DOMAINS if domain != "facts" for s in evaluation[domain]}
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/point", rank=0, world_size=1)
        optimizer = train.Optimizer(model, 0)
        for step, (rows, weights) in enumerate(train.make_batches(steps, held_out, tokenizer)):
            loss, reported = train.loss_of(model, rows, weights)
            loss.backward()
            optimizer.step(PEAK_RATE * min(1.0, (step + 1) / 20, 1.02 - step / steps))
            if step % 20 == 19:
                print(f"step {step + 1}/{steps}  loss {reported:.3f}", file=sys.stderr, flush=True)
        dist.destroy_process_group()
    train.save(model, tokenizer, folder)


def measure(model: Path, seeds: int, samples: int, tokens: int) -> dict[str, Any]:
    """Every method at every ratio on the same draws, in each variant."""
    measured = Bench(samples, model)
    losses: dict[tuple[str, str, str, str, float], list[Loss]] = {}
    special: list[dict[str, float]] = []
    for seed in range(seeds):
        lines = measured.calibration(dict.fromkeys(measured.domains, tokens), seed)
        sums = {counted: measured.score(lines, special_tokens=counted)["routed"].sums for counted in COUNTED}
        special.append(on_special(sums))
        for (metric, blend), ratio, (counted, protect) in product(METHODS, RATIOS, VARIANTS):
            keep = measured.cut(sums[counted], Method(metric, blend, protect), ratio, seed)
            losses.setdefault((counted, protect, metric, blend, ratio), []).append(measured.loss(keep))
        print(f"seed {seed + 1} of {seeds}: measured", file=sys.stderr)
    keys = ("special_tokens", "protect", "metric", "blend", "ratio")
    return {
        "benchmark": "special_tokens",
        **facts(measured),
        "seeds": seeds,
        "calibration_tokens": tokens * len(measured.domains),
        "steps": STEPS,
        "special": special,
        "rows": [dict(zip(keys, key, strict=True)) | summed_up(found, measured) for key, found in losses.items()],
    }


def on_special(sums: dict[str, Sums]) -> dict[str, float]:
    """The share of special tokens, and for how many experts more than half of the g |f| is on them."""
    tokens = [sums[counted].blocks[0].tokens_D.sum() for counted in COUNTED]
    special_E = np.concatenate([block.values["special_sum"].sum(0) for block in sums["skip"].blocks])
    text_E = np.concatenate([block.values["gate_norm_sum"].sum(0) for block in sums["skip"].blocks])
    return {"tokens": round(float(1 - tokens[1] / tokens[0]), 4), "experts": int((special_E > text_E).sum())}


def show(result: dict[str, Any]) -> None:
    """The table for a person."""
    keys = ("metric", "blend", "special_tokens", "protect", "ratio")
    rows = {tuple(row[key] for key in keys): row for row in result["rows"]}
    print(f"parent: {result['parent']['exact']:.1%} exactly right; {result['special']}", file=sys.stderr)
    for name in dict.fromkeys(key[:4] for key in rows):
        cells = [rows[*name, ratio] for ratio in RATIOS]
        text = "".join(
            f"{c['kl']['mean']:>9.3f} ±{c['kl']['sd']:.3f}{c['exact']['mean']:>8.1%} ±{c['exact']['sd']:.1%}"
            for c in cells
        )
        print(f"{', '.join(name):<42}{text}", file=sys.stderr)


def main() -> None:
    """Teach if there is no taught model yet, measure, show, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the taught model; made if it is not there")
    parser.add_argument("--seeds", type=int, default=5, help="draws of calibration data")
    parser.add_argument("--samples", type=int, default=40, help="held-out samples of each domain")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = (arguments.model or Path(folder) / "chat").resolve()
        if not model.exists():
            teach(model, STEPS)
        result = measure(model, arguments.seeds, arguments.samples, TOKENS)
    show(result)
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
