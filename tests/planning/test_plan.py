"""Counts with exact arithmetic, and the choice of experts against a plain search."""

from __future__ import annotations

import itertools
from decimal import Decimal

import numpy as np
import pytest

from moeprune.errors import UsageError
from moeprune.planning.plan import Limits, check_count, exact, keep_count, make_plan


@pytest.mark.parametrize(
    ("experts", "ratio", "kept"),
    [
        (128, 0.3, 90),  # 38.4 go: 38
        (100, 0.29, 71),  # the float product is 28.999...
        (10, 0.9, 1),
        (100, 0.57, 43),
        (128, 0.25, 96),
        (60, 0.35, 39),
        (96, 1 / 3, 64),
        (8, 0.0, 8),
        (8, 0.1, 8),  # less than one expert: none goes
    ],
)
def test_ratio_is_exact(experts, ratio, kept):
    assert keep_count(Limits(experts, 1), ratio=ratio) == kept


def test_every_two_digit_ratio_is_exact():
    for experts in (8, 60, 100, 128, 384):
        for percent in range(90):
            removed = int(Decimal(experts) * Decimal(percent) / 100)
            assert keep_count(Limits(experts, 1), ratio=percent / 100) == experts - removed
    assert exact(0.1 + 0.2) * 10 == 3


def legal(count, experts, top_k, groups, top_groups):
    if not top_k <= count <= experts:
        return False
    if groups == 1 or count == experts:
        return True
    size, rest = divmod(count, groups)
    return rest == 0 and size >= 2 and size * top_groups >= top_k


@pytest.mark.parametrize(
    "limits", [Limits(8, 2), Limits(256, 8, 8, 4), Limits(160, 6, 8, 3), Limits(64, 8, 8, 2), Limits(16, 4, 8, 2)]
)
def test_limits_and_where_counts_move(limits):
    counts = range(1, limits.experts + 1)
    good = [c for c in counts if legal(c, limits.experts, limits.top_k, limits.groups, limits.top_groups)]
    assert [c for c in counts if not limits.objection(c)] == good
    assert limits.smallest == good[0]
    for count in counts:
        if count in good:
            assert keep_count(limits, keep=count) == count
        else:
            with pytest.raises(UsageError, match="possible nearby"):
                keep_count(limits, keep=count)
        if count >= limits.top_k:
            assert keep_count(limits, ratio=1 - count / limits.experts) == min(c for c in good if c >= count)


def test_impossible_counts_say_what_is_possible():
    with pytest.raises(UsageError, match=r"cannot keep 4 of \d+ experts: the router chooses 8.*nearby: 8, 9"):
        check_count(4, Limits(128, 8))
    with pytest.raises(UsageError, match=r"cannot keep 100 of \d+ experts: .* 8 groups.*nearby: 96, 104"):
        check_count(100, Limits(256, 8, 8, 4))
    with pytest.raises(UsageError, match=r"cannot keep 8 of \d+ experts: .*two best"):
        check_count(8, Limits(256, 8, 8, 8))
    with pytest.raises(UsageError, match="2 groups of 3 are fewer than the 8"):
        check_count(24, Limits(64, 8, 8, 2))
    for count in (0, -1, 129):
        with pytest.raises(UsageError, match="128 experts in a layer"):
            check_count(count, Limits(128, 8))
    with pytest.raises(UsageError, match="router chooses 8"):
        keep_count(Limits(128, 8), ratio=0.99)


def test_target_size_gives_the_largest_that_fits():
    limits = Limits(256, 8, 8, 4)
    for target in range(2_000, 40_000, 137):
        size = {c: 1_234 + 101 * c for c in range(1, 257) if legal(c, 256, 8, 8, 4)}
        fitting = [c for c in size if size[c] <= target]
        options = {"target_bytes": target, "fixed_bytes": 1_234, "bytes_per_expert": 101}
        if fitting:
            assert keep_count(limits, **options) == max(fitting)
        else:
            with pytest.raises(UsageError, match=f"16 of 256 experts in each layer, takes {1_234 + 16 * 101:,} bytes"):
                keep_count(limits, **options)


def test_keep_and_target_size_exclude_each_other():
    with pytest.raises(UsageError, match="both"):
        keep_count(Limits(8, 2), keep=4, target_bytes=100)


def test_choice_is_the_best_sum_of_all_lists():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        groups = int(rng.choice([1, 2, 4]))
        score_E = rng.random(8)
        count = 4 if groups == 1 else groups * int(rng.integers(2, 8 // groups + 1))
        quota, size = count // groups, 8 // groups
        lists = [
            ids
            for ids in itertools.combinations(range(8), count)
            if all(sum(j // size == g for j in ids) == quota for g in range(groups))
        ]
        best = max(lists, key=lambda ids: score_E[list(ids)].sum())
        plan = make_plan({"b": score_E}, count, Limits(8, 2, groups, groups))
        assert plan.keep == {"b": best}


def test_ties_go_to_the_lower_index_and_the_order_ascends():
    plan = make_plan({"b": np.array([1.0, 2.0, 1.0, 2.0, 1.0, 0.0])}, 4, Limits(6, 2))
    assert plan.keep["b"] == (0, 1, 2, 3)
    assert make_plan({"b": np.zeros(6)}, 3, Limits(6, 2)).keep["b"] == (0, 1, 2)


def test_protected_experts_stay_whatever_their_score():
    score_E = np.arange(8.0)
    plan = make_plan({"b": score_E, "c": score_E}, 4, Limits(8, 2), {"b": (0, 2)})
    assert plan.keep == {"b": (0, 2, 6, 7), "c": (4, 5, 6, 7)}
    grouped = make_plan({"b": score_E}, 4, Limits(8, 2, 2, 2), {"b": (0,)})
    assert grouped.keep["b"] == (0, 3, 6, 7)


def test_more_protected_than_may_stay_is_refused():
    with pytest.raises(UsageError, match="3 experts are protected in layer b but only 2 can be kept"):
        make_plan({"b": np.arange(8.0)}, 2, Limits(8, 2), {"b": (0, 1, 2)})
    with pytest.raises(UsageError, match="3 experts are protected in group 1 of layer b but only 2"):
        make_plan({"b": np.arange(8.0)}, 4, Limits(8, 2, 2, 2), {"b": (5, 6, 7)})


def test_blocks_without_scores_keep_evenly_spaced_experts():
    plan = make_plan({"b": np.arange(8.0)}, 4, Limits(8, 2, 2, 2), unscored={"mtp": 8, "b": 8})
    assert plan.keep == {"b": (2, 3, 6, 7), "mtp": (0, 2, 4, 6)}
    assert plan.unscored == ("mtp",)
    for experts, count, groups in ((128, 90, 1), (256, 176, 8), (8, 8, 1), (7, 3, 1)):
        limits = Limits(experts, 2, groups, groups)
        keep = make_plan({}, count, limits, unscored={"mtp": experts}).keep["mtp"]
        size = experts // groups
        assert len(set(keep)) == count and list(keep) == sorted(keep)
        assert all(sum(j // size == g for j in keep) == count // groups for g in range(groups))


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(UsageError, match="not a finite number"):
        make_plan({"b": np.array([1.0, np.nan, 0.0])}, 2, Limits(3, 1))


@pytest.mark.parametrize("groups", (1, 2))
def test_experts_that_share_a_tensor_stay_or_go_together(groups):
    limits = Limits(12, 2, groups, groups, run=2)
    assert keep_count(limits, ratio=0.4) == 8  # 8 of 12; in two groups 4 each
    scores_E = np.random.default_rng(0).random(12)
    keep = make_plan({"a": scores_E}, 8, limits, {"a": (3,)}, {"b": 12}).keep
    size = 12 // groups
    runs = [range(first, first + 2) for first in range(0, 12, 2)]
    allowed = [
        {e for run in chosen for e in run}
        for chosen in itertools.combinations(runs, 4)
        if all(sum(run[0] // size == g for run in chosen) == 4 // groups for g in range(groups))
    ]
    assert set(keep["a"]) == max((s for s in allowed if 3 in s), key=lambda s: scores_E[list(s)].sum())
    assert set(keep["b"]) in allowed
    with pytest.raises(UsageError, match="kept or removed together"):
        check_count(9, Limits(12, 2, run=2))
