"""What the page draws of the scores, worked out once more expert by expert; no model is needed."""

from __future__ import annotations

import numpy as np
import pytest

from moeprune.checking import report
from moeprune.checking.report import numbers
from moeprune.planning.decision import Model, decide
from moeprune.planning.plan import Limits
from moeprune.settings import Settings
from tests.planning.tokens import random_sums

IMAGES = {"model.layers.0": [1, 6], "model.layers.1": [3]}


@pytest.fixture
def recipe():
    """Scores and a plan for two layers of eight experts."""
    sums = random_sums(3, blocks=2, experts=8)
    model = Model(Limits(8, 2), "qwen3_moe", {block.block: 8 for block in sums.blocks}, None)
    plan = decide(Settings(keep=4), sums, model, {}).to_json()
    for entry in plan["blocks"]:
        entry["for_images"] = IMAGES[entry["block"]]
    facts = {"path": "maker/model", "blocks": 2}
    inputs = {"model": facts, "calibration": {}, "fingerprint": "f"}
    return {"inputs": inputs, "scores": sums.to_json(), "plan": plan}, sums


def test_coverage_is_what_the_best_experts_hold_of_each_domain(recipe):
    data, sums = recipe
    layers = numbers.layers(sums, data["plan"])
    x_C, held_DC = numbers.coverage(layers)
    for kept in (0, 2, 5, 8):
        at = int(np.flatnonzero(np.isclose(x_C, kept / 8))[0])
        for d in range(len(sums.domains)):
            shares = []
            for block, layer in zip(sums.blocks, layers, strict=True):
                work = block.values["gate_norm_sum"][d].tolist()
                best = sorted(range(8), key=lambda e: -layer.score_E[e])[:kept]
                shares.append(sum(work[e] for e in best) / sum(work))
            assert held_DC[d, at] == pytest.approx(sum(shares) / 2)


def test_experts_for_images_are_framed_and_listed(recipe):
    data, _ = recipe
    page = report.page(data, {}, {})
    assert page.count(' framed" x=') == 3
    kept = sum(len({*ids} & {*data["plan"]["keep"][block]}) for block, ids in IMAGES.items())
    assert f"3 experts work mostly for images (framed above); {kept} of them are kept." in page
    assert "worst at this cut: " in page
    for entry in data["plan"]["blocks"]:
        entry["for_images"] = []
    assert "for images" not in report.page(data, {}, {})
