"""Loss, KL and top token against a loop over tokens in float64; samples and batches."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from moeprune.checking import fidelity, generation, samples, statistics, subject, texts
from moeprune.errors import InputError
from moeprune.settings import Settings
from tests.checking import pairs

TEXTS = ["the cat sat on the mat", "2 + 2 = 4", "Grüße aus Köln", "def f(x): return x"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return pairs.parent(folder / "a", seed=1), pairs.parent(folder / "b", seed=2)


def test_every_measure_equals_a_loop_in_float64(models, monkeypatch):
    settings = Settings(device="cpu")
    held_out = [samples.Sample(f"d{i % 2}", text=text) for i, text in enumerate(TEXTS)]
    held_out.append(samples.Sample("answers", prompt="say yes: ", answer="yes"))
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    parent, child = (subject.Loaded(folder, settings) for folder in models)
    monkeypatch.setattr(fidelity, "CHUNK_NUMBERS", 260 * 5)  # five tokens at a time
    batches = samples.batches(held_out, tokenizer, 64, 2)
    (one,), (two,) = parent.variants(batches, [None]), child.variants(batches, [None])
    with parent.head() as a, child.head() as b:
        tokens = fidelity.compare(a, b, batches, (one, two), 260)
    found = fidelity.summary(tokens, held_out, seed=0)
    domains: dict[str, list[dict[str, float]]] = {}
    for sample in held_out:
        domains.setdefault(sample.domain, []).extend(_loop(parent.model, child.model, tokenizer, sample))
    for name, rows in domains.items():
        row = found["domains"][name]
        assert row["tokens"] == len(rows)
        for measure in fidelity.MEASURES:
            assert row[measure] == pytest.approx(sum(r[measure] for r in rows) / len(rows), rel=1e-4), measure
    means = [sum(r["kl"] for r in rows) / len(rows) for rows in domains.values()]
    assert found["overall"]["kl"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert found["overall"]["perplexity"] == pytest.approx(math.exp(found["overall"]["loss"]))
    low, high = found["overall"]["kl_interval"]
    assert low < found["overall"]["kl"] < high


@torch.no_grad()
def _loop(parent, child, tokenizer, sample):
    """One sample alone, no padding, float64 sums in Python."""
    first = 1 if sample.text else len(tokenizer(sample.prompt)["input_ids"])
    ids = tokenizer(sample.text or sample.prompt + sample.answer)["input_ids"] + ([] if sample.text else [257])
    logits = [model(input_ids=torch.tensor([ids])).logits[0].double() for model in (parent, child)]
    rows = []
    for place in range(first, len(ids)):
        p, q = (each[place - 1] - math.log(sum(math.exp(v) for v in each[place - 1].tolist())) for each in logits)
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        same = float(p.argmax() == q.argmax())
        rows.append({"parent_loss": -p[ids[place]].item(), "loss": -q[ids[place]].item(), "kl": kl, "same_top": same})
    return rows


def test_few_samples_still_see_every_domain(tmp_path):
    path = tmp_path / "held_out.jsonl"
    lines = [{"domain": "a", "text": str(i)} for i in range(50)] + [{"domain": "b", "prompt": "x", "answer": "y"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert {sample.domain for sample in samples.load_samples(str(path), 4, seed=0)} == {"a", "b"}
    assert samples.load_samples(str(path), 9, seed=0) == samples.load_samples(str(path), 9, seed=0)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"domain": "a"}', '{"text": 3}', '{"answer": "x"}'])
def test_held_out_data_that_cannot_be_used(tmp_path, content):
    path = tmp_path / "held_out.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="held_out"):
        samples.load_samples(str(path), 4, seed=0)


def test_the_built_in_set_is_large_enough_and_not_the_calibration():
    entries = samples.load_samples("", 10**6, seed=0)
    asked = generation.prompts(entries, Settings().generations)
    assert len(asked) >= statistics.needed_to_see(0.03, 0.06)
    assert len({sample.prompt or sample.text for sample in entries}) == len(entries)
    folder = Path(samples.__file__).parents[1] / "scoring" / "builtin"
    calibration = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.jsonl"))
    for sample in entries:
        words = json.dumps(sample.text or sample.prompt, ensure_ascii=False)[1:-1]
        assert words not in calibration


def test_the_built_in_answers_are_right():
    """The generated sums, stories and orders worked out once more, from their words."""
    for sample in samples.load_samples("", 10**6, seed=0):
        numbers = [int(word) for word in re.findall(r"-?\d+", sample.prompt)]
        if sample.domain == "arithmetic":
            assert eval(sample.prompt.rstrip("= ")) == int(sample.answer)
        elif sample.domain == "stories":
            assert numbers[0] - numbers[1] + numbers[2] == int(sample.answer)
        elif sample.domain == "ordering":
            assert [int(word) for word in sample.answer.split(",")] == sorted(numbers)
        elif sample.domain == "series":
            assert int(sample.answer) - numbers[-1] == numbers[1] - numbers[0] == numbers[-1] - numbers[-2]
        elif sample.domain in {"JSON", "tools"}:
            assert texts.json_object(sample.answer) is not None


def test_open_requests_are_only_written_on(tmp_path, models):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps({"prompt": "Write a poem."}) + "\n" + json.dumps({"text": "two words"}))
    (known,) = samples.load_held_out(str(path), 9, seed=0)
    assert known.text == "two words"
    everything = samples.load_samples(str(path), 9, seed=0)
    assert len(everything) == 2
    batches = samples.batches(everything, AutoTokenizer.from_pretrained(models[0]), 64, 4)
    assert sum(int(batch.scored_BT.sum()) for batch in batches) == len("two words") - 1
    path.write_text(json.dumps({"prompt": "Write a poem."}))
    with pytest.raises(InputError, match="open requests only"):
        samples.load_held_out(str(path), 9, seed=0)


def test_logits_that_are_no_numbers_are_large_losses_in_the_report():
    measured = fidelity.measure(torch.zeros(2, 5), torch.full((2, 5), float("nan")), torch.tensor([1, 2]))
    held_out = [samples.Sample("a", text="x")]
    tokens = fidelity.Tokens(torch.zeros(2).long().numpy(), {k: v.double().numpy() for k, v in measured.items()})
    assert fidelity.summary(tokens, held_out, 0)["overall"]["loss"] == 1e9
