"""The published rule for super experts, and each of its published bugs kept out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeprune.errors import UsageError
from moeprune.metadata import BlockSums, Sums
from moeprune.planning.protection import protect


def peaks(*rows, first_layer=0):
    """Sums with these largest activations by layer; dense layers may come before."""
    blocks = []
    for i, row in enumerate(rows):
        max_abs = np.atleast_2d(np.array(row, dtype=float))
        values = {"max_abs": max_abs, "count": np.ones_like(max_abs)}
        name = f"model.layers.{first_layer + i}"
        blocks.append(BlockSums(name, max_abs.shape[1], np.ones(len(max_abs)), values, {}))
    return Sums("routed", tuple("ab"[: len(blocks[0].tokens_D)]), tuple(blocks))


def by_hand(rows, share):
    """The rule in plain Python; the percentile by its definition with linear interpolation."""
    everything = sorted(v for row in rows for v in row)
    place = 0.995 * (len(everything) - 1)
    low = int(place)
    high = min(low + 1, len(everything) - 1)
    percentile = everything[low] + (everything[high] - everything[low]) * (place - low)
    threshold = max(percentile, max(everything) / 10)
    last = int(len(rows) * share)
    found = {f"model.layers.{i}": tuple(j for j, v in enumerate(row) if v > threshold) for i, row in enumerate(rows)}
    return {name: ids for i, (name, ids) in enumerate(found.items()) if ids and i < last}


def test_rule_against_plain_python():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        layers = int(rng.integers(1, 9))
        rows = rng.lognormal(0, rng.choice([0.1, 1, 3]), (layers, 64)).tolist()
        assert protect(peaks(*rows), "super") == by_hand(rows, 0.75)
        assert protect(peaks(*rows), "outliers") == by_hand(rows, 1.0)


LOUD = [1.0] * 63 + [1000.0]
QUIET = [1.0] * 64


def test_super_experts_are_in_the_first_three_quarters_only():
    found = protect(peaks(QUIET, LOUD, QUIET, LOUD), "super")
    assert found == {"model.layers.1": (63,)}
    assert set(protect(peaks(QUIET, LOUD, QUIET, LOUD), "outliers")) == {"model.layers.1", "model.layers.3"}


def test_dense_layers_before_do_not_move_the_layers():
    assert protect(peaks(QUIET, LOUD, QUIET, LOUD, first_layer=3), "super") == {"model.layers.4": (63,)}


def test_blocks_outside_the_trunk_do_not_count():
    sums = peaks(QUIET, QUIET, QUIET, LOUD, LOUD)
    trunk = [block.block for block in sums.blocks[:4]]
    assert protect(sums, "super") == {}  # 3 of 5 layers are early
    assert protect(sums, "outliers", trunk) == {"model.layers.3": (63,)}
    backwards = replace(sums, blocks=sums.blocks[::-1])
    assert protect(backwards, "super", trunk) == protect(sums, "super", trunk) == {}


def test_loudest_domain_decides():
    sums = peaks([QUIET, LOUD], [QUIET, QUIET])
    assert protect(sums, "super") == protect(sums, "outliers") == {"model.layers.0": (63,)}


def test_threshold_is_strict():
    assert protect(peaks(QUIET), "outliers") == {}


def test_nothing_is_protected_unless_asked():
    assert protect(peaks(LOUD), "none") == {}


def test_without_the_measurement_it_is_refused():
    sums = peaks(LOUD)
    bare = replace(sums, blocks=tuple(replace(b, values={"count": b.values["count"]}) for b in sums.blocks))
    with pytest.raises(UsageError, match="needs max_abs"):
        protect(bare, "super")
    with pytest.raises(UsageError, match="'some' is not known"):
        protect(sums, "some")
