"""Intervals against published values and against a slow bootstrap written differently."""

from __future__ import annotations

import random

import pytest

from moeprune.checking import statistics


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0)],
)
def test_wilson_agrees_with_published_tables(hits, count, low, high):
    assert statistics.wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_nothing_seen_says_nothing():
    assert statistics.wilson(0, 0) == (0.0, 1.0)


def test_samples_to_see_a_doubled_loop_rate():
    found = statistics.needed_to_see(0.03, 0.06)
    generator = random.Random(3)
    seen = 0
    for _ in range(400):  # by simulation: about 80% of such experiments find it
        a, b = (sum(generator.random() < rate for _ in range(found)) for rate in (0.03, 0.06))
        seen += statistics.difference((b, found), (a, found))[0] > 0
    assert 700 < found < 800
    assert 0.73 < seen / 400 < 0.87


def test_domains_count_alike_and_samples_are_drawn_whole():
    sums = {"big": ([4.0, 8.0, 0.0, 4.0], [4, 4, 4, 4]), "small": ([3.0, 1.0], [1, 1])}
    mean, (low, high) = statistics.macro_interval(sums, seed=1)
    assert mean == pytest.approx((1.0 + 2.0) / 2)
    generator, draws = random.Random(0), []
    for _ in range(4000):
        parts = []
        for values, weights in sums.values():
            chosen = generator.choices(range(len(values)), k=len(values))
            parts.append(sum(values[i] for i in chosen) / sum(weights[i] for i in chosen))
        draws.append(sum(parts) / 2)
    draws.sort()
    assert (low, high) == pytest.approx((draws[100], draws[3900]), abs=0.13)
    assert statistics.macro_interval(sums, seed=1) == (mean, (low, high))
