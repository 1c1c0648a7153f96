"""Experts that work mostly for images or for special tokens: told by what they do for each kind of token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeprune.metadata import BlockSums, Sums
from moeprune.planning.decision import Model, decide
from moeprune.planning.outcome import for_images
from moeprune.planning.plan import Limits
from moeprune.settings import Settings

DOMAINS = ("chat", "photos", "photos [image]")
# Expert 0 sees, 1 reads, 2 does both, 3 only sees but hardly ever.
WORK_DE = np.array([[0.0, 5.0, 4.0, 0.0], [1.0, 5.0, 4.0, 0.0], [6.0, 1.0, 2.0, 0.5]])


def block(work_DE, name="l0"):
    slices_DSE = np.repeat(work_DE[:, None] / 4, 4, axis=1)
    count_DE = (work_DE > 0) * 10.0
    values = {"gate_norm_sum": work_DE, "count": count_DE}
    by_slice = {"gate_norm_sum": slices_DSE, "count": np.repeat(count_DE[:, None] / 4, 4, axis=1)}
    return BlockSums(name, work_DE.shape[1], np.full(len(work_DE), 100.0), values, by_slice)


@pytest.mark.parametrize("image_tokens", [1, 1000])
def test_the_number_of_image_tokens_does_not_matter(image_tokens):
    work_DE = WORK_DE * np.array([[1], [1], [image_tokens]])
    assert for_images(block(work_DE), "weighted_ean_sum", DOMAINS) == (0,)


def test_text_alone_has_no_image_experts():
    assert for_images(block(WORK_DE[:2]), "weighted_ean_sum", DOMAINS[:2]) == ()


def test_images_that_reach_no_expert_of_a_block_name_none():
    assert for_images(block(WORK_DE * [[1], [1], [0]]), "weighted_ean_sum", DOMAINS) == ()


def decided(weights: str):
    return decide(
        Settings(metric="weighted_ean_sum", weights=weights, keep=2),
        Sums("routed", DOMAINS, (block(WORK_DE), block(WORK_DE, name="l1"))),
        Model(Limits(4, 1, 1, 1), "", {"l0": 4, "l1": 4}, None),
        {"domains": {name: {"samples": 8} for name in DOMAINS}},
    )


def test_they_are_named_and_weights_keep_them():
    plain, seeing = decided(""), decided("photos [image]=2")
    assert plain.plan.keep == {"l0": (1, 2), "l1": (1, 2)}
    (line,) = (line for line in plain.sentences() if "images" in line)
    assert line.startswith("2 experts work mostly for images, 0 of them are kept;")
    assert line.endswith("(l0: 0; l1: 0)")
    assert [entry["for_images"] for entry in plain.to_json()["blocks"]] == [[0], [0]]
    assert seeing.plan.keep == {"l0": (0, 1), "l1": (0, 1)}
    assert "2 of them are kept" in next(line for line in seeing.sentences() if "images" in line)


@pytest.mark.parametrize(("protect", "kept"), [("auto", (1, 3)), ("none", (1, 2))])
def test_experts_of_special_tokens_are_kept_and_named(protect, kept):
    plain = block(WORK_DE)
    special_DE = np.array([[0.0, 1.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    seen = replace(plain, values={**plain.values, "special_sum": special_DE})
    made = decide(
        Settings(metric="weighted_ean_sum", protect=protect, keep=2),
        Sums("routed", DOMAINS, (seen,)),
        Model(Limits(4, 1, 1, 1), "", {"l0": 4}, None),
        {"domains": {name: {"samples": 8} for name in DOMAINS}},
    )
    assert made.plan.keep == {"l0": kept}
    said = [line for line in made.sentences() if "whatever their score" in line]
    assert said == (["kept whatever their score, as --protect says: 1 experts (l0: 3)"] if protect == "auto" else [])
    assert made.to_json()["blocks"][0]["protected"] == ([3] if protect == "auto" else [])
