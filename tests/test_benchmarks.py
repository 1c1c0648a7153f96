"""Benchmarks on the demo model: they count what a user would get, and the documents show what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks import show
from benchmarks.bench import DEMO, ROOT, Bench, Method, spread
from benchmarks.calibration import unequal
from moeprune.checking import masking
from moeprune.planning import saliency
from tests.contracts.documents import between

RESULTS = ("methods.json", "calibration.json")


@pytest.fixture(scope="module")
def bench():
    """On one thread: more only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(4)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def keep(bench):
    """Half of the experts, chosen on a little data."""
    sums = bench.score(bench.calibration(dict.fromkeys(bench.domains, 100), 0))["routed"].sums
    return bench.cut(sums, Method("weighted_ean_sum"), 0.5, 0)


@pytest.fixture(scope="module")
def evaluation():
    """The demo's own evaluation, which generates; `demo` is no package."""
    spec = importlib.util.spec_from_file_location("demo_evaluate", DEMO / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exact_answers_are_those_that_generation_gives(bench, keep, evaluation):
    """Teacher-forced and generated answers agree on a cut that gets about half right; rounding may turn one of them."""
    model, counted = bench.parent.model, bench.loss(keep).exact
    turned = 0.0
    for domain in bench.answered:
        asked = [{"prompt": s.prompt, "answer": s.answer} for s in bench.held_out if s.domain == domain]
        with masking.maskable(masking.routed_blocks(model)), masking.keeping(keep):
            generated = evaluation.exact_match(model, bench.tokenizer, asked)
        turned += len(asked) * abs(counted[domain] - generated)
    assert turned < 1.5
    assert 0.2 < sum(counted.values()) / len(counted) < 0.9


def test_the_parent_has_lost_nothing(bench):
    everything = {block.name: tuple(range(block.experts)) for block in bench.layout.blocks}
    loss = bench.loss(everything)
    assert max(loss.kl.values()) == 0
    assert loss.exact == bench.own_loss().exact


def test_calibration_is_drawn_anew_by_seed_and_never_asks_what_is_asked_later(bench):
    first, again, other = (bench.calibration({"sql": 2000, "stories": 500}, seed) for seed in (0, 0, 1))
    assert first == again != other
    asked = {sample.prompt for sample in bench.held_out}
    assert not asked & {line["prompt"] for line in first}


def test_unequal_domains_differ_twentyfold(bench):
    shares = unequal(bench.domains, 16_000, 3)
    assert max(shares.values()) / min(shares.values()) == pytest.approx(20, rel=0.01)
    assert sum(shares.values()) == pytest.approx(16_000, rel=0.001)


def test_spread_is_of_a_sample():
    assert spread([1.0, 2.0, 3.0, 4.0]) == {"mean": 2.5, "sd": pytest.approx(1.29099, abs=1e-5)}


@pytest.mark.parametrize("name", show.PICTURES)
def test_pictures_are_those_of_the_measurements(name):
    drawn = (show.DOCS / name).read_text(encoding="utf-8")
    assert drawn == show.made(show.PICTURES[name])
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert not re.search(r"<script|<foreignObject|href=|https?://(?!www\.w3\.org/2000/svg)", drawn)


def test_the_table_of_the_readme_is_made_from_the_measurements():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert between(readme, *show.README_MARKS)[1] == show.readme_table()


def test_the_page_of_measurements_is_made_from_them():
    assert (show.DOCS / "measurements.md").read_text(encoding="utf-8") == show.measurements()


def test_what_is_called_the_default_is_the_default(bench):
    sums = bench.score(bench.calibration({"sql": 50, "stories": 50}, 0))["routed"].sums
    metric, blend = saliency.resolve(sums)
    published = json.loads((show.DOCS / "methods.json").read_text(encoding="utf-8"))
    assert published["default"] == {"metric": metric, "blend": blend}


@pytest.mark.parametrize("name", RESULTS)
def test_published_measurements_have_five_seeds_and_all_samples(name):
    result = json.loads((show.DOCS / name).read_text(encoding="utf-8"))
    assert result["seeds"] >= 5
    assert result["evaluation"] == {"samples": 800, "domains": 20, "domains_with_answers": 16}
