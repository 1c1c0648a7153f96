"""Measure how many answers of the demo model, or of a pruned copy of it, are exactly right.

    python demo/evaluate.py [MODEL_DIR] [--samples N]

Prints a table on stderr and one JSON line on stdout. An answer counts when the model writes it and then ends. The
samples were held out of training and calibration, except the facts: those can only be learnt by heart, so trained ones
are asked. Domains of running text have no answers to check and are left out here.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent


def read_samples(path: Path, *, limit: int | None = None) -> dict[str, list[dict[str, str]]]:
    """Read the samples that have an answer, by domain, at most `limit` of each."""
    samples: dict[str, list[dict[str, str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if "answer" in sample:
            samples.setdefault(sample["domain"], []).append(sample)
    return {domain: of_domain[:limit] for domain, of_domain in samples.items()}


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Continue all prompts greedily in one batch; a continuation that does not end in time gives no text."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)[:, batch["input_ids"].shape[1] :]
    ended = (tokens == tokenizer.eos_token_id).any(dim=1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text if done else "" for text, done in zip(texts, ended, strict=True)]


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: list[dict[str, str]]) -> float:
    """Return the share of samples whose continuation is the answer and nothing else."""
    longest = max(len(tokenizer(sample["answer"])["input_ids"]) for sample in samples)
    texts = complete(model, tokenizer, [sample["prompt"] for sample in samples], longest + 1)
    right = sum(text.strip() == sample["answer"].strip() for text, sample in zip(texts, samples, strict=True))
    return right / len(samples)


def evaluate(folder: Path, *, limit: int | None = None) -> dict[str, object]:
    """Return exact match per domain and its mean over the domains."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = read_samples(HERE / "evaluation.jsonl", limit=limit)
    domains = {domain: exact_match(model, tokenizer, of_domain) for domain, of_domain in samples.items()}
    return {"model": str(folder), "macro": sum(domains.values()) / len(domains), "domains": domains}


def main() -> None:
    """Evaluate one model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=HERE / "model", help="model folder")
    parser.add_argument("--samples", type=int, default=None, help="samples per domain (default: all)")
    arguments = parser.parse_args()
    result = evaluate(arguments.model, limit=arguments.samples)
    for domain, share in [*result["domains"].items(), ("macro", result["macro"])]:
        print(f"{domain:<16} {100 * share:5.1f}%", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
