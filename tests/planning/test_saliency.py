"""Scores against the tokens they stand for; blends against data that was really mixed that way."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moeprune.errors import UsageError
from moeprune.metadata import BlockSums, Sums
from moeprune.planning import saliency
from tests.planning.tokens import add_up, random_sums, random_tokens

NORM = np.linalg.norm
# Each metric once more, from the list of (gate, output) pairs that an expert saw.
FROM_TOKENS = {
    "reap": lambda seen: np.mean([g * NORM(f) for g, f in seen]),
    "reap_l2": lambda seen: np.mean([(g * NORM(f)) ** 2 for g, f in seen]),
    "frequency": lambda seen: len(seen),
    "ean_sum": lambda seen: sum(NORM(f) for _, f in seen),
    "ean_mean": lambda seen: np.mean([NORM(f) for _, f in seen]),
    "ean_ca": lambda seen: NORM(np.mean([f for _, f in seen], axis=0)),
    "weighted_frequency_sum": lambda seen: sum(g for g, _ in seen),
    "weighted_ean_sum": lambda seen: sum(g * NORM(f) for g, f in seen),
    "weighted_ean_sum_l2": lambda seen: sum((g * NORM(f)) ** 2 for g, f in seen),
    "max_activations": lambda seen: max(np.abs(f).max() for _, f in seen),
}


def seen_by(tokens, expert):
    return [(g, f) for t in tokens for j, g, f in zip(t.experts, t.gates, t.outputs, strict=True) if j == expert]


def from_tokens(metric, tokens, experts=6):
    if metric == "full":
        return np.mean([t.all_probabilities * t.all_norms for t in tokens], axis=0)
    if metric == "router":
        return np.mean([t.all_probabilities * t.x_norm for t in tokens], axis=0)
    seen = [seen_by(tokens, j) for j in range(experts)]
    return np.array([FROM_TOKENS[metric](pairs) if pairs else 0.0 for pairs in seen])


def one_block(tokens, domains=("a",), mode="routed"):
    return Sums(mode, domains, (add_up(tokens, domains=len(domains)),))


def score(sums, *args, **options):
    return saliency.scores(sums, *args, **options)["model.layers.0"]


@pytest.mark.parametrize("metric", [*FROM_TOKENS, "full", "router"])
def test_metric_equals_its_definition_on_the_tokens(metric):
    for seed in range(5):
        tokens = random_tokens(seed, 80, domains=3)
        sums = one_block(tokens, ("a", "b", "c"))
        np.testing.assert_allclose(score(sums, metric, "pooled"), from_tokens(metric, tokens), rtol=1e-9)


@pytest.mark.parametrize("metric", [*FROM_TOKENS, "full", "router"])
def test_weighted_is_the_score_of_data_mixed_in_that_proportion(metric):
    tokens = random_tokens(3, 120, domains=2)
    few = [t for t in tokens if t.domain == 0][:10]
    many = [t for t in tokens if t.domain == 1][:40]
    assert (len(few), len(many)) == (10, 40)
    mixed = few * 4 * 3 + many * 2  # 120 tokens of a, 80 of b: 3 to 2
    got = score(one_block(few + many, ("a", "b")), metric, "weighted", {"a": 3, "b": 2})
    wanted = from_tokens(metric, mixed)
    if saliency.METRICS[metric].total and metric not in {"full", "router"}:
        wanted = wanted * 5 / len(mixed)  # totals are per 5 tokens of the mix
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_a_domain_of_weight_zero_has_no_say():
    tokens = random_tokens(4, 60, domains=2)
    only = [t for t in tokens if t.domain == 0]
    for metric in FROM_TOKENS:
        got = score(one_block(tokens, ("a", "b")), metric, "weighted", {"b": 0})
        alone = score(one_block(only), metric, "pooled")
        assert np.array_equal(np.argsort(got, kind="stable"), np.argsort(alone, kind="stable"))


def test_shares_give_every_domain_the_same_say():
    tokens = random_tokens(5, 100, domains=3)
    wanted = np.zeros(6)
    for d in range(3):
        alone = from_tokens("weighted_ean_sum", [t for t in tokens if t.domain == d])
        wanted += alone / alone.sum() / 3
    got = score(one_block(tokens, ("a", "b", "c")), "weighted_ean_sum", "shares")
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    louder = [replace(t, outputs=tuple(f * 50 for f in t.outputs)) if t.domain == 1 else t for t in tokens]
    got = score(one_block(louder * 2, ("a", "b", "c")), "weighted_ean_sum", "shares")
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_weights_tilt_the_shares():
    tokens = random_tokens(6, 100, domains=2)
    alone = [from_tokens("frequency", [t for t in tokens if t.domain == d]) for d in range(2)]
    wanted = (3 * alone[0] / alone[0].sum() + alone[1] / alone[1].sum()) / 4
    got = score(one_block(tokens, ("a", "b")), "frequency", "shares", {"a": 3})
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    got = score(one_block(tokens, ("a", "b")), "frequency", "shares", {"a": 0.003, "b": 0.001})
    np.testing.assert_allclose(got, wanted, rtol=1e-9)


def test_a_domain_without_tokens_does_not_count_among_shares():
    tokens = [t for t in random_tokens(7, 80, domains=3) if t.domain != 1]
    with_gap = score(one_block(tokens, ("a", "b", "c")), "weighted_ean_sum", "shares")
    assert with_gap.sum() == pytest.approx(1.0)


def with_shares(share_BDE):
    """Sums whose shares of weighted_ean_sum are these."""
    blocks = []
    for i, share_DE in enumerate(share_BDE):
        values = {"gate_norm_sum": share_DE * 7, "count": np.ones_like(share_DE)}
        blocks.append(BlockSums(f"b{i}", share_DE.shape[1], np.ones(len(share_DE)), values, {}))
    return Sums("routed", tuple("abcd"[: len(share_BDE[0])]), tuple(blocks))


def worst_coverage(share_BDE, keep):
    return np.mean([share[:, list(ids)].sum(axis=1) for share, ids in zip(share_BDE, keep, strict=True)], axis=0).min()


def best_lists(scores, count, groups=1):
    size = 6 // groups
    return [
        [
            g * size + j
            for g in range(groups)
            for j in np.argsort(-score_E[g * size : (g + 1) * size])[: count // groups]
        ]
        for score_E in scores.values()
    ]


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (3, 1), (4, 1), (4, 2)])
def test_maxmin_comes_close_to_the_best_of_all_lists(count, groups):
    gaps, plain = [], []
    legal = [
        ids
        for ids in itertools.combinations(range(6), count)
        if all(sum(j * groups // 6 == g for j in ids) == count // groups for g in range(groups))
    ]
    for seed in range(40):
        share_BDE = np.random.default_rng(seed).dirichlet(np.full(6, 0.5), size=(2, 3))
        sums = with_shares(share_BDE)
        best = max(worst_coverage(share_BDE, keep) for keep in itertools.product(legal, repeat=2))
        found = saliency.scores(sums, "weighted_ean_sum", "maxmin", count=count, groups=groups)
        equal = saliency.scores(sums, "weighted_ean_sum", "shares")
        gaps.append(best - worst_coverage(share_BDE, best_lists(found, count, groups)))
        plain.append(best - worst_coverage(share_BDE, best_lists(equal, count, groups)))
        assert -1e-12 < gaps[-1] <= plain[-1] + 1e-12
    assert np.mean(gaps) < 0.4 * np.mean(plain)
    assert np.mean(gaps) < 0.03


def test_maxmin_of_one_domain_is_the_order_of_its_scores():
    share_BDE = np.random.default_rng(0).dirichlet(np.ones(9), size=(3, 1))
    found = saliency.scores(with_shares(share_BDE), "weighted_ean_sum", "maxmin", count=4)
    for i, share_DE in enumerate(share_BDE):
        np.testing.assert_allclose(found[f"b{i}"], share_DE[0])


def test_maxmin_looks_at_the_worst_domain_only_where_it_left_a_trace():
    share_BDE = np.random.default_rng(1).dirichlet(np.full(6, 0.5), size=(2, 3))
    share_BDE[:, 1] = 0
    share_BDE[1, 2] = 0
    got = saliency.scores(with_shares(share_BDE), "weighted_ean_sum", "maxmin", count=3)
    alone = saliency.scores(with_shares(share_BDE[:, [0, 2]]), "weighted_ean_sum", "maxmin", count=3)
    for name in got:
        np.testing.assert_allclose(got[name], alone[name])


def test_never_routed_scores_nothing_and_is_reported():
    sums = one_block(random_tokens(1, 100))
    assert saliency.never_routed(sums.blocks[0]) == (5,)
    for metric in FROM_TOKENS:
        got = score(sums, metric)
        assert got[5] == 0 and np.isfinite(got).all()


def test_auto_follows_mode_and_domains():
    one, two = random_sums(1, domains=("a",)), random_sums(1)
    assert saliency.resolve(one) == ("reap", "pooled")
    assert saliency.resolve(two) == ("weighted_ean_sum", "shares")
    assert saliency.resolve(two, blend="pooled") == ("reap", "pooled")
    assert saliency.resolve(two, blend="weighted") == ("weighted_ean_sum", "weighted")
    assert saliency.resolve(two, blend="maxmin") == ("weighted_ean_sum", "maxmin")
    assert saliency.resolve(two, "reap") == ("reap", "pooled")
    assert saliency.resolve(two, "reap", weighted=True) == ("reap", "weighted")
    assert saliency.resolve(two, weighted=True) == ("weighted_ean_sum", "shares")
    assert saliency.resolve(replace(two, mode="full")) == ("full", "shares")
    assert saliency.resolve(replace(one, mode="router")) == ("router", "pooled")


def test_random_is_set_by_seed_and_block_alone():
    sums = random_sums(2)
    a, again = (saliency.scores(sums, "random", seed=7) for _ in range(2))
    assert all(np.array_equal(a[name], again[name]) for name in a)
    assert not np.array_equal(a["model.layers.0"], saliency.scores(sums, "random", seed=8)["model.layers.0"])
    assert not np.array_equal(a["model.layers.0"], a["model.layers.1"])
    assert not np.array_equal(a["model.layers.0"], saliency.scores(sums, "random", seed=-7)["model.layers.0"])
    last = replace(sums, blocks=sums.blocks[2:])
    assert np.array_equal(saliency.scores(last, "random", seed=7)["model.layers.2"], a["model.layers.2"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("reep",), "metric 'reep' is not known"),
        (("reap", "mean"), "blend 'mean' is not known"),
        (("auto", "shares", {"cod": 1}), "no domain 'cod'"),
        (("auto", "shares", {"code": 0, "chat": 0}), "one of them above 0"),
        (("auto", "maxmin", {"code": 2}), "weights have no meaning"),
    ],
)
def test_wrong_wishes_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        saliency.scores(random_sums(1), *arguments)


def test_a_metric_that_was_not_measured_is_refused():
    sums = random_sums(1)
    blocks = tuple(
        replace(b, values={k: b.values[k] for k in ("count", "gate_sum")}, gram_EDD=None) for b in sums.blocks
    )
    with pytest.raises(UsageError, match=r"metric reap needs gate_norm_sum.*frequency, weighted_frequency_sum, random"):
        saliency.scores(replace(sums, blocks=blocks), "reap")
    with pytest.raises(UsageError, match="ean_ca needs gram"):
        saliency.scores(replace(sums, blocks=blocks), "ean_ca")


def test_weights_are_read_from_text():
    assert saliency.parse_weights("") == {}
    assert saliency.parse_weights("code=2, chat=0.5") == {"code": 2.0, "chat": 0.5}
    assert saliency.parse_weights("a=b=1") == {"a=b": 1.0}
    for text in ("code", "code=", "=1", "code=-1", "code=nan", "code=inf", "code=1,code=2", "code=two"):
        with pytest.raises(UsageError, match="code=2,chat=1"):
            saliency.parse_weights(text)
