"""Whether the calibration is enough: the prediction against a simulated truth, and the sentence against the numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeprune.errors import UsageError
from moeprune.metadata import BlockSums, Sums
from moeprune.planning.decision import Model, check_wishes, decide
from moeprune.planning.enough import How, assess, restrict
from moeprune.planning.plan import Limits
from moeprune.settings import Settings
from tests.planning.tokens import add_up, random_tokens

LIMITS = Limits(32, 2)


def drawn(rng, truth_LDE, noise_D, samples_D, slices=4):
    """Sums of samples whose saliency scatters around the truth; `noise_D` is the deviation of one sample."""
    domains = tuple(f"d{i}" for i in range(len(noise_D)))
    blocks = []
    for i, truth_DE in enumerate(truth_LDE):
        per_slice = np.asarray(samples_D)[:, None, None] / slices
        spread = np.asarray(noise_D)[:, None, None] / np.sqrt(per_slice)
        shape = (len(domains), slices, truth_DE.shape[1])
        saliency_DSE = per_slice * truth_DE[:, None] * (1 + spread * rng.standard_normal(shape)).clip(0.01)
        by_slice = {"count": per_slice * np.ones(shape) * 10, "gate_norm_sum": saliency_DSE}
        values = {name: array.sum(axis=1) for name, array in by_slice.items()}
        blocks.append(BlockSums(f"l{i}", shape[2], np.asarray(samples_D) * 160.0, values, by_slice))
    return Sums("routed", domains, tuple(blocks))


def how(count=16, metric="weighted_ean_sum", blend="shares"):
    return How(metric, blend, {}, 0, count, LIMITS, {})


def truth(rng, domains, blocks=6):
    return rng.lognormal(0, 0.7, (blocks, domains, 32))


def test_restricted_sums_are_those_of_the_chosen_samples():
    tokens = random_tokens(1, 200, domains=2)
    sums = Sums("routed", ("a", "b"), (add_up(tokens, domains=2),))
    chosen = np.array([[True, False, True, False], [False, True, True, True]])
    wanted = add_up([t for t in tokens if chosen[t.domain, t.slice]], domains=2)
    got = restrict(sums, chosen).blocks[0]
    for name in ("count", "gate_norm_sum"):
        np.testing.assert_allclose(got.values[name], wanted.values[name])
    np.testing.assert_allclose(got.tokens_D, wanted.tokens_D)  # each token chooses the same number of experts


def test_predicted_change_is_what_endless_samples_change():
    predicted, real = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth_LDE = truth(rng, 2)
        sums = drawn(rng, truth_LDE, [3.0, 3.0], [400, 400])
        predicted.append(assess(sums, how()).change)
        endless = drawn(rng, truth_LDE, [0.0, 0.0], [400, 400])
        a, b = (how().plan(s).keep for s in (sums, endless))
        real.append(np.mean([1 - len(set(a[name]) & set(b[name])) / 16 for name in a]))
    assert 0.03 < np.mean(real) < 0.2
    assert 0.8 < np.mean(predicted) / np.mean(real) < 1.25


def test_the_noisy_domain_is_named_and_its_advice_would_do():
    before, after = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truth_LDE = truth(rng, 2)
        found = assess(drawn(rng, truth_LDE, [0.3, 6.0], [400, 400]), how(), {"d0": 400, "d1": 400})
        assert found.enough is False and found.domains[0].domain == "d1"
        assert "more would help of: d1 (about " in found.verdict and "d0 (" not in found.verdict
        before.append(found.change)
        more = round(400 * found.domains[0].factor)
        after.append(assess(drawn(rng, truth_LDE, [0.3, 6.0], [400, more]), how()).change)
    assert np.mean(before) > 0.08
    assert np.mean(after) < 0.06


def test_enough_is_said_plainly():
    rng = np.random.default_rng(1)
    found = assess(drawn(rng, truth(rng, 2), [0.2, 0.2], [400, 400]), how())
    assert found.enough is True
    assert found.verdict.startswith("the calibration is enough for data of this kind: about ")
    assert found.convergence[-1] == 1.0 and len(found.convergence) == 4
    assert all(share > 0.85 for share in found.jaccard.values())


def test_experts_that_hardly_matter_do_not_make_it_too_little():
    rng = np.random.default_rng(2)
    truth_LDE = np.ones((4, 1, 32)) + 0.001 * rng.random((4, 1, 32))
    found = assess(drawn(rng, truth_LDE, [0.02], [400]), how())
    assert found.change > 0.05 and found.held_out_loss < 0.005 and found.enough is True


def test_jaccard_and_curve_by_hand():
    # Slices 0 and 1 like experts 0 and 1, slices 2 and 3 like 1 and 2; expert 3 is liked by none.
    by_slice = np.array([[[9, 8, 1, 0], [9, 8, 1, 0], [1, 8, 7, 0], [1, 8, 7, 0]]], dtype=float)
    slices = {"count": np.ones_like(by_slice), "gate_norm_sum": by_slice}
    block = BlockSums("l0", 4, np.array([8.0]), {k: v.sum(axis=1) for k, v in slices.items()}, slices)
    plan = How("weighted_ean_sum", "pooled", {}, 0, 2, Limits(4, 1), {})
    found = assess(Sums("routed", ("a",), (block,)), plan)
    assert found.jaccard == {"l0": pytest.approx(1 / 3)}
    assert found.change == 0.25  # the halves share one of two
    assert found.domains[0].factor == pytest.approx(25)  # (0.25 / 0.05)^2
    assert found.convergence == (1.0, 1.0, 1.0, 1.0)
    assert found.held_out_loss == pytest.approx((17 - 9) / 18)  # of the first half: 9 + 8 against 8 + 1


def test_curve_grows_with_the_slices():
    # Slice 0 likes experts 0 and 1; all that follow like 2 and 3 ever more.
    by_slice = np.array([[[5, 5, 0, 0], [0, 4, 4, 0], [0, 0, 4, 9], [0, 0, 4, 9]]], dtype=float)
    slices = {"count": np.ones_like(by_slice), "gate_norm_sum": by_slice}
    block = BlockSums("l0", 4, np.array([8.0]), {k: v.sum(axis=1) for k, v in slices.items()}, slices)
    plan = How("weighted_ean_sum", "pooled", {}, 0, 2, Limits(4, 1), {})
    found = assess(Sums("routed", ("a",), (block,)), plan, {"a": 10})
    assert found.convergence == (0.0, 0.0, 0.5, 1.0)
    assert found.change == 0.5 and found.domains[0].factor == 100.0  # (0.5 / 0.05)^2
    assert "more would help of: a (about 990 more than its 10 samples)" in found.verdict


def test_too_few_samples_to_judge_names_the_domain():
    rng = np.random.default_rng(3)
    sums = drawn(rng, truth(rng, 2), [0.2, 0.2], [400, 400])
    blocks = []
    for block in sums.blocks:
        slices = {name: array.copy() for name, array in block.slices.items()}
        for array in slices.values():
            array[1, 2:] = 0  # the second domain has samples in its first half alone
        blocks.append(replace(block, slices=slices))
    found = assess(replace(sums, blocks=tuple(blocks)), how())
    assert found.enough is None and "too few samples of d1" in found.verdict
    assert found.domains[0].domain == "d1" and found.domains[0].change is None


def test_what_cannot_be_judged_says_why():
    rng = np.random.default_rng(4)
    sums = drawn(rng, truth(rng, 1), [0.2], [400])
    assert "nothing is removed" in assess(sums, how(count=32)).verdict
    assert "random" in assess(sums, how(metric="random")).verdict
    bare = replace(sums, blocks=tuple(replace(b, slices={}) for b in sums.blocks))
    assert "no sums by slice" in assess(bare, how()).verdict
    assert assess(bare, how()).enough is None


def test_a_metric_that_slices_cannot_give_is_judged_by_the_nearest():
    rng = np.random.default_rng(5)
    sums = drawn(rng, truth(rng, 1), [0.2], [400])
    assert assess(sums, how(metric="ean_mean")).metric == "reap"
    assert assess(sums, how(metric="ean_sum")).metric == "weighted_ean_sum"
    counts = tuple(replace(b, slices={"count": b.slices["count"]}) for b in sums.blocks)
    assert assess(replace(sums, blocks=counts), how(metric="router")).metric == "frequency"


def test_decision_holds_plan_outcome_and_verdict():
    rng = np.random.default_rng(6)
    sums = drawn(rng, truth(rng, 2), [0.2, 0.2], [400, 400])
    blocks = {**{block.block: 32 for block in sums.blocks}, "mtp": 32}
    data = {"domains": {"d0": {"samples": 10}, "d1": {"samples": 20}}}
    made = decide(Settings(keep=16), sums, Model(LIMITS, "", blocks, None), data)
    block = made.outcome.blocks[0]
    score_E = np.array(block.scores)
    keep = set(np.argsort(-score_E)[:16].tolist())
    assert set(block.keep) == keep == set(made.plan.keep["l0"])
    assert block.worst_kept == min(score_E[list(keep)]) and block.best_removed == max(
        score_E[j] for j in range(32) if j not in keep
    )
    total_DE = sums.blocks[0].values["gate_norm_sum"]
    for d, name in enumerate(sums.domains):
        assert block.coverage[name] == pytest.approx(total_DE[d, list(keep)].sum() / total_DE[d].sum())
    means = {name: np.mean([b.coverage[name] for b in made.outcome.blocks[:-1]]) for name in sums.domains}
    assert list(made.outcome.coverage) == sorted(means, key=means.get)
    assert dict(made.outcome.coverage) == pytest.approx(means)
    text = " ".join(made.sentences())
    assert "16 of 32 experts kept in each of 7" in text and "mtp had no scores" in text
    data = made.to_json()
    assert data["keep"]["mtp"] == list(range(0, 32, 2)) and data["how"]["blend"] == "shares"
    assert data["calibration"]["domains"][0]["samples"] in {10, 20}


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"metric": "full"}, "needs full_sum"),
        ({"metric": "ean_ca", "scoring_mode": "router"}, "needs gram, "),
        ({"protect": "super", "scoring_mode": "router"}, "needs max_abs"),
        ({"weights": "d7=2"}, "no domain 'd7'"),
        ({"keep": 1}, "router chooses 2"),
        ({"engine": "ollama"}, "not known"),
    ],
)
def test_wishes_are_checked_before_scoring(wishes, words):
    model = Model(LIMITS, "", {}, None)
    check_wishes(Settings(), model, ("d0", "d1"))
    with pytest.raises(UsageError, match=words):
        check_wishes(Settings(**wishes), model, ("d0", "d1"))
