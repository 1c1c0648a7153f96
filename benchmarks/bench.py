"""The demo model on the bench: calibration data drawn anew for every seed, scores, and cuts measured by masking.

What is measured is what the tool does: its reader, its scoring, its metrics and plans, and the mask that computes what
the cut model computes. Answers are judged without generating text: greedy decoding writes an answer and then stops just
when the most likely token is the right one at every place of the answer, its end included.

Legend of the array suffixes: N judged positions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
sys.path[:0] = [str(ROOT), str(DEMO)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from corpus import draw, identity  # noqa: E402
from domains import Sample  # noqa: E402

from moeprune.checking import fidelity, samples, subject  # noqa: E402
from moeprune.checkpoint.families import understand  # noqa: E402
from moeprune.checkpoint.folder import open_checkpoint  # noqa: E402
from moeprune.metadata import Sums, write_json  # noqa: E402
from moeprune.planning import plan, saliency  # noqa: E402
from moeprune.planning.protection import for_special_tokens  # noqa: E402
from moeprune.scoring.building import read_config  # noqa: E402
from moeprune.scoring.calibration.load import load_calibration  # noqa: E402
from moeprune.scoring.run import load_tokenizer, score_experts  # noqa: E402
from moeprune.settings import Settings  # noqa: E402

MODEL = DEMO / "model"
RATIOS = (0.25, 0.5, 0.75)
ROWS = 64  # samples that run together
EVERYTHING = 1_000_000  # samples at most: all that were drawn


@dataclass(frozen=True, slots=True)
class Method:
    """How the experts that stay are chosen."""

    metric: str
    blend: str = "pooled"
    protect: str = "auto"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a cut costs, by domain: KL divergence to the parent, and the share of exactly right answers."""

    kl: Mapping[str, float]
    exact: Mapping[str, float]

    def over(self, domains: Sequence[str]) -> dict[str, float]:
        """The means over these domains, every domain counting alike."""
        return {
            "kl": fmean(self.kl[domain] for domain in domains),
            "exact": fmean(self.exact[domain] for domain in domains if domain in self.exact),
        }


class Bench:
    """The parent with everything that a cut is compared with."""

    def __init__(self, samples_per_domain: int, model: Path = MODEL) -> None:
        settings = Settings(model_path=str(model), device="cpu")
        self.checkpoint = open_checkpoint(model)
        self.layout = understand(self.checkpoint)
        self.tokenizer = load_tokenizer(model, settings)
        self.held_out = _first(samples.load_samples(str(DEMO / "evaluation.jsonl"), EVERYTHING, 0), samples_per_domain)
        self.batches = samples.batches(self.held_out, self.tokenizer, 512, ROWS)
        self.domains = tuple(sorted({sample.domain for sample in self.held_out}))
        self.answered = tuple(sorted({sample.domain for sample in self.held_out if sample.answer}))
        self.parent = subject.Loaded(model, settings)
        self.parent.model.set_attn_implementation("eager")  # the fastest on a CPU for rows as short as these
        self.states = self.parent.variants(self.batches, [None])[0]
        self.asked = {identity(Sample(s.prompt or s.text, s.answer)) for s in self.held_out if s.domain != "facts"}
        self.known: dict[Any, Loss] = {}

    @property
    def limits(self) -> plan.Limits:
        """What the demo model's router demands."""
        return plan.Limits.of(self.layout)

    def kept(self, ratio: float) -> int:
        """How many experts of a layer stay."""
        return plan.keep_count(self.limits, ratio=ratio)

    def calibration(self, tokens: Mapping[str, int], seed: int) -> list[dict[str, str]]:
        """Fresh samples of each domain up to its number of tokens; none of them is among those asked later."""
        lines = []
        for domain, wanted in tokens.items():
            rng, seen = Random(f"bench {seed} {domain}"), 0
            while seen < wanted:
                sample = draw(domain, 1, self.asked, rng)[0]
                seen += len(self.tokenizer(sample.prompt + sample.answer)["input_ids"])
                text = {"prompt": sample.prompt, "answer": sample.answer} if sample.answer else {"text": sample.prompt}
                lines.append({"domain": domain, **text})
        return lines

    def score(
        self, lines: Sequence[Mapping[str, str]], modes: Sequence[str] = ("routed",), special_tokens: str = ""
    ) -> dict[str, Scored]:
        """The sums of each scoring mode on these samples."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            path = Path(folder) / "calibration.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            return {mode: self._scored(path, mode, special_tokens) for mode in modes}

    def _scored(self, path: Path, mode: str, special_tokens: str) -> Scored:
        settings = Settings(
            model_path=str(self.checkpoint.folder),
            calibration_path=str(path),
            output_path=path.parent,
            max_samples=EVERYTHING,
            batch_size=ROWS,
            device="cpu",
            scoring_mode=mode,
            **({"special_tokens": special_tokens} if special_tokens else {}),
        )
        data = load_calibration(settings, self.tokenizer, read_config(self.checkpoint, settings))
        begun = time.process_time()
        sums = score_experts(settings, self.checkpoint, self.layout, data, "bench")
        return Scored(sums, time.process_time() - begun)

    def cut(self, sums: Sums, method: Method, ratio: float, seed: int) -> dict[str, tuple[int, ...]]:
        """The experts that stay, by block."""
        count = self.kept(ratio)
        scores = saliency.scores(sums, method.metric, method.blend, seed=seed, count=count)
        protected = for_special_tokens(sums, self.limits, count) if method.protect == "auto" else {}
        return plan.make_plan(scores, count, self.limits, protected).keep

    def loss(self, keep: Mapping[str, tuple[int, ...]]) -> Loss:
        """What the model loses that has only these experts."""
        key = tuple(sorted(keep.items()))
        if key not in self.known:
            self.known[key] = self._loss(self.parent.variants(self.batches, [keep])[0])
        return self.known[key]

    def own_loss(self) -> Loss:
        """The parent against itself: no divergence, and its own share of right answers."""
        return self._loss(self.states)

    def _loss(self, states: list[Any]) -> Loss:
        with self.parent.head() as head:
            vocabulary = self.parent.vocabulary
            tokens = fidelity.compare(head, head, self.batches, (self.states, states), vocabulary)
            right_N = np.concatenate(
                [
                    (head(state).argmax(-1) == fidelity.targets(batch)[0]).numpy()
                    for state, batch in zip(states, self.batches, strict=True)
                ]
            )
        return self._by_domain(tokens, right_N)

    def _by_domain(self, tokens: fidelity.Tokens, right_N: np.ndarray) -> Loss:
        domain_N = np.array([self.held_out[index].domain for index in tokens.sample_N])
        kl = {domain: float(tokens.values_N["kl"][domain_N == domain].mean()) for domain in self.domains}
        wrong = np.bincount(tokens.sample_N, ~right_N, minlength=len(self.held_out))
        exact: dict[str, list[bool]] = defaultdict(list)
        for sample, mistakes in zip(self.held_out, wrong, strict=True):
            if sample.answer:
                exact[sample.domain].append(mistakes == 0)
        return Loss(kl, {domain: fmean(answers) for domain, answers in exact.items()})


@dataclass(frozen=True, slots=True)
class Scored:
    """Sums, and the processor seconds that they took."""

    sums: Sums
    cpu_s: float


def _first(held_out: Sequence[samples.Sample], count: int) -> tuple[samples.Sample, ...]:
    """The first `count` samples of every domain."""
    seen: dict[str, int] = defaultdict(int)
    chosen = []
    for sample in held_out:
        seen[sample.domain] += 1
        if seen[sample.domain] <= count:
            chosen.append(sample)
    return tuple(chosen)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    return {"mean": round(fmean(values), 5), "sd": round(stdev(values), 5) if len(values) > 1 else 0.0}


def summed_up(losses: Sequence[Loss], bench: Bench) -> dict[str, Any]:
    """A method's losses over the seeds: macro means with their spread, the worst domain, and every domain's mean."""
    macro = [loss.over(bench.domains) for loss in losses]
    return {
        "kl": spread([each["kl"] for each in macro]),
        "exact": spread([each["exact"] for each in macro]),
        "worst_kl": spread([max(loss.kl.values()) for loss in losses]),
        "worst_exact": spread([min(loss.exact.values()) for loss in losses]),
        "runs": [{name: round(value, 5) for name, value in each.items()} for each in macro],
        "domains": {domain: _means(domain, losses) for domain in bench.domains},
    }


def _means(domain: str, losses: Sequence[Loss]) -> dict[str, float]:
    """One domain's means; running text has no answers to be right about."""
    means = {"kl": fmean(loss.kl[domain] for loss in losses)}
    if domain in losses[0].exact:
        means["exact"] = fmean(loss.exact[domain] for loss in losses)
    return {what: round(value, 5) for what, value in means.items()}


def facts(bench: Bench) -> dict[str, Any]:
    """What every result says about how it was measured."""
    return {
        "model": {"experts": bench.layout.experts, "top_k": bench.layout.top_k, "blocks": len(bench.layout.blocks)},
        "evaluation": {
            "samples": len(bench.held_out),
            "domains": len(bench.domains),
            "domains_with_answers": len(bench.answered),
        },
        "parent": {"exact": round(bench.own_loss().over(bench.domains)["exact"], 5)},
    }


Measure = Callable[[Bench, int, int], dict[str, Any]]  # seeds, tokens of calibration data


def main(about: str | None, measure: Measure, show: Callable[[dict[str, Any]], None], tokens: int) -> None:
    """Measure, show, print. With --quick a quarter of the tokens is drawn, once."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="draws of calibration data")
    parser.add_argument("--samples", type=int, default=40, help="held-out samples of each domain")
    parser.add_argument("--quick", action="store_true", help="one seed, ten samples of each domain, half a minute")
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more only wait for each other on tensors as small as these
    begun = time.monotonic()
    seeds, per_domain = (1, 10) if arguments.quick else (arguments.seeds, arguments.samples)
    result = measure(Bench(per_domain), seeds, tokens // 4 if arguments.quick else tokens)
    result["timing"] = {"total_s": round(time.monotonic() - begun, 1)}
    show(result)
    if arguments.output:
        write_json(arguments.output, result)
    print(json.dumps(result))
