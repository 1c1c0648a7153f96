"""Runs added up are one run on all the samples; what does not belong together is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import combine
from moeprune.errors import InputError, UsageError
from moeprune.metadata import Sums, header, write_json
from moeprune.planning import saliency
from moeprune.planning.combine import add, total_of
from tests.planning.tokens import add_up, random_sums, random_tokens


def scored(tokens, domains):
    """Sums of one run whose domains are these numbers of the tokens' domains."""
    own = [replace(t, domain=domains.index(t.domain)) for t in tokens if t.domain in domains]
    return Sums("routed", tuple(f"d{d}" for d in domains), (add_up(own, domains=len(domains)),))


def test_the_sum_of_two_runs_is_the_run_on_both():
    for seed in range(5):
        first, second = (random_tokens(2 * seed + i, 90, domains=4) for i in range(2))
        first, second = [t for t in first if t.domain != 3], [t for t in second if t.domain != 0]
        both = add(scored(first, [0, 1, 2]), scored(second, [2, 3, 1]))
        wanted = scored(first + second, [0, 1, 2, 3])
        assert both.domains == wanted.domains
        got, block = both.blocks[0], wanted.blocks[0]
        np.testing.assert_array_equal(got.tokens_D, block.tokens_D)
        for name in block.values:
            np.testing.assert_allclose(got.values[name], block.values[name])
        for name in block.slices:
            np.testing.assert_allclose(got.slices[name], block.slices[name])
        for metric in set(saliency.METRICS) - {"ean_ca"}:
            np.testing.assert_allclose(
                saliency.scores(both, metric, "pooled")["model.layers.0"],
                saliency.scores(wanted, metric, "pooled")["model.layers.0"],
            )
        with pytest.raises(UsageError, match="ean_ca needs gram"):
            saliency.scores(both, "ean_ca")


def test_runs_that_do_not_fit_are_refused():
    sums = random_sums(1)
    with pytest.raises(InputError, match="scoring modes differ: routed and full"):
        add(sums, replace(sums, mode="full"))
    with pytest.raises(InputError, match="not of the same model"):
        add(sums, replace(sums, blocks=sums.blocks[1:]))
    with pytest.raises(InputError, match="not of the same model"):
        add(sums, random_sums(1, experts=6))
    poorer = replace(sums.blocks[0], values={"count": sums.blocks[0].values["count"]})
    with pytest.raises(InputError, match=r"model.layers.0 was measured differently"):
        add(sums, replace(sums, blocks=(poorer, *sums.blocks[1:])))


def test_totals_of_the_calibration():
    a = {"samples": 5, "tokens": 50, "domains": {"code": {"samples": 5, "tokens": 50}}, "fingerprint": "a"}
    b = {"samples": 3, "tokens": 20, "domains": {"code": {"samples": 1, "tokens": 5}, "chat": {"samples": 2}}}
    total = total_of([a, b])
    assert (total["samples"], total["tokens"]) == (8, 70)
    assert total["domains"] == {"code": {"samples": 6, "tokens": 55}, "chat": {"samples": 2}}
    assert total["parts"] == [a, b]
    assert total_of([total, a])["parts"] == [a, b, a]


def result(path, sums, data, model="m1", samples=()):
    """A result of stage 1, as far as combining reads it."""
    facts = {"fingerprint": model, "experts": 8, "top_k": 2, "groups": 1, "top_groups": 1, "model_type": "qwen3_moe"}
    domains = {name: {"samples": 10, "tokens": 100} for name in sums.domains}
    calibration = {"samples": 10 * len(domains), "tokens": 100, "domains": domains, "fingerprint": data}
    calibration["sample_digests"] = list(samples)
    inputs = {"fingerprint": f"run {data}", "model": facts, "calibration": calibration}
    plan = {"keep": {"model.layers.0": [0, 1], "mtp.layers.0": [0, 1]}}
    write_json(path, {**header("reap_metadata"), "inputs": inputs, "scores": sums.to_json(), "plan": plan})
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from any .env
    return tmp_path


def test_script_writes_a_result_like_that_of_scoring(folder, capsys):
    a = result(folder / "a.json", random_sums(1), "x")
    b = result(folder / "b.json", random_sums(2, domains=("chat", "math")), "y")
    combine.main([a, b])
    target = folder / "output" / "reap_metadata.json"
    assert capsys.readouterr().out == "output/reap_metadata.json\n"
    made = json.loads(target.read_text())
    assert made["kind"] == "reap_metadata" and made["inputs"]["model"]["fingerprint"] == "m1"
    assert list(made["inputs"]["calibration"]["domains"]) == ["code", "chat", "math"]
    assert made["inputs"]["calibration"]["domains"]["chat"]["samples"] == 20
    assert Sums.from_json(made["scores"]).domains == ("code", "chat", "math")
    assert len(made["plan"]["keep"]["model.layers.0"]) == 4 == len(made["plan"]["keep"]["mtp.layers.0"])

    before = target.stat().st_mtime_ns
    combine.main([b, a])  # the same runs: current
    assert target.stat().st_mtime_ns == before
    c = result(folder / "c.json", random_sums(3), "z")
    with pytest.raises(UsageError, match="holds other scores"):
        combine.main([a, c])
    combine.main([str(target), c, "--output-path", "all"])
    assert len(json.loads((folder / "all" / "reap_metadata.json").read_text())["inputs"]["calibration"]["parts"]) == 3
    with pytest.raises(InputError, match="hold the same calibration data, which would count twice"):
        combine.main([str(target), a, "--force"])


def test_samples_that_count_twice_are_said(folder, capsys):
    a = result(folder / "a.json", random_sums(1), "x", samples=["s1", "s2", "s3"])
    b = result(folder / "b.json", random_sums(2), "y", samples=["s3", "s4"])
    c = result(folder / "c.json", random_sums(3), "z", samples=["s5"])
    combine.main([a, c])
    assert "count twice" not in capsys.readouterr().err
    combine.main([a, b, c, "--force"])
    assert "1 of 2 samples of b.json are also in a.json; they count twice" in capsys.readouterr().err.replace(
        f"{folder}/", ""
    )


def test_script_refuses_other_models_and_too_few_files(folder):
    a = result(folder / "a.json", random_sums(1), "x")
    b = result(folder / "b.json", random_sums(2), "y", model="m2")
    with pytest.raises(InputError, match=r"b\.json was made on another model than .*a\.json"):
        combine.main([a, b])
    with pytest.raises(UsageError, match="at least two"):
        combine.main([a])
    (folder / "c.json").write_text(json.dumps({"kind": "reap_metadata", "schema_version": "1.0"}))
    with pytest.raises(InputError, match="no scores or inputs"):
        combine.main([a, str(folder / "c.json")])
    assert not (folder / "output").exists()
