"""The published rule for super experts, and each of its published bugs kept out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeprune.errors import UsageError
from moeprune.metadata import BlockSums, Sums
from moeprune.planning.plan import Limits, make_plan
from moeprune.planning.protection import for_special_tokens, protect


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


# ---------------------------------------------------------------------------------------------------- special tokens


def work(special, text, *, groups=1, count=4):
    """Which experts stay because of special tokens, from what each does for them and for the rest, by domain."""
    special_DE, text_DE = np.atleast_2d(np.array(special, dtype=float)), np.atleast_2d(np.array(text, dtype=float))
    domains = tuple("ab"[: len(special_DE)])
    values = {"special_sum": special_DE, "gate_norm_sum": text_DE}
    sums = Sums("routed", domains, (BlockSums("layer", special_DE.shape[1], np.ones(len(domains)), values, {}),))
    limits = Limits(special_DE.shape[1], 1, groups, groups)
    found = for_special_tokens(sums, limits, count).get("layer", ())
    scores = {"layer": text_DE.sum(0)}
    assert set(found) <= set(make_plan(scores, count, limits, {"layer": found}).keep["layer"])  # never too many
    return found


def test_experts_that_work_mostly_for_special_tokens_stay():
    assert work([5, 1, 9, 0, 0, 0], [4, 9, 1, 8, 8, 8]) == (0, 2)


def test_half_of_the_work_is_not_most_of_it():
    assert work([5, 9, 0, 0, 0, 0], [5, 9, 1, 8, 8, 8]) == ()


def test_an_expert_that_does_next_to_nothing_is_not_kept_for_it():
    assert work([99, 1, 0, 0, 0, 0], [9, 0, 8, 8, 8, 8]) == (0,)


def test_domains_are_added_up():
    assert work([[6, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [9, 1, 1, 1]]) == ()
    assert work([[6, 0, 0, 0], [6, 0, 0, 0]], [[1, 1, 1, 1], [9, 1, 1, 1]]) == (0,)


def test_special_tokens_take_half_of_the_places_at_most_and_the_strongest_go_first():
    assert work([5, 6, 7, 8, 9, 4], [0, 0, 0, 0, 0, 9], count=4) == (3, 4)
    assert work([5, 6, 7, 8, 9, 4], [0, 0, 0, 0, 0, 9], count=1) == ()


def test_the_places_are_those_of_each_group():
    assert work([9, 8, 7, 0, 9, 0, 0, 0], [1] * 8, groups=2, count=4) == (0, 4)


def test_where_special_tokens_count_or_were_never_seen_nothing_stays_for_them():
    assert work([0, 0, 0, 0], [1, 2, 3, 4]) == ()
    assert for_special_tokens(peaks(LOUD), Limits(64, 2), 32) == {}
    assert protect(peaks(LOUD), "auto") == {}
