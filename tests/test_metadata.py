"""Results survive the way to the disk exactly, are there whole or not at all, and damaged ones are refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from moeprune import metadata
from moeprune.errors import InputError
from moeprune.metadata import Sums
from tests.planning.tokens import random_sums


def same(a: Sums, b: Sums) -> bool:
    return (a.mode, a.domains) == (b.mode, b.domains) and all(
        (x.block, x.experts) == (y.block, y.experts)
        and np.array_equal(x.tokens_D, y.tokens_D)
        and np.array_equal(x.gram_EDD, y.gram_EDD)
        and x.values.keys() == y.values.keys()
        and all(np.array_equal(x.values[name], y.values[name]) for name in x.values)
        and x.slices.keys() == y.slices.keys()
        and all(np.array_equal(x.slices[name], y.slices[name]) for name in x.slices)
        for x, y in zip(a.blocks, b.blocks, strict=True)
    )


def test_sums_come_back_to_the_last_bit(tmp_path):
    sums = random_sums(3)
    metadata.write_json(tmp_path / "a.json", {"scores": sums.to_json()})
    back = Sums.from_json(metadata.read_json(tmp_path / "a.json", "scores")["scores"])
    assert same(back, sums)
    assert not same(random_sums(4), sums)


def test_text_is_json_and_short():
    value = {"a": [1.0, 0.1, 1e300, -0.5, 2.0**60, 1e-320], "b": [[1, 2], []], "c": {}, "d": None, "e": 3.0, "f": "ä\n"}
    text = metadata.to_text(value)
    assert json.loads(text) == value
    assert '"a": [1, 0.1, 1e+300, -0.5, 1.152921504606847e+18, 1e-320]' in text
    assert '"e": 3' in text and "ä" in text


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0, math.nan], {"x": [-math.inf]}])
def test_what_is_not_a_number_is_never_written(tmp_path, bad):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        metadata.write_json(path, {"value": bad})
    assert path.read_text() == "old"


def corrupted(change):
    data = copy.deepcopy(random_sums(5).to_json())
    change(data)
    return data


DAMAGE = {
    "no domains": lambda d: d.update(domains=[]),
    "a domain twice": lambda d: d.update(domains=["code", "code"]),
    "an unknown domain": lambda d: d.update(domains=["code", "other"]),
    "no blocks": lambda d: d.update(blocks=[]),
    "a block twice": lambda d: d["blocks"].append(d["blocks"][0]),
    "blocks are not objects": lambda d: d.update(blocks=[1, 2]),
    "no experts": lambda d: d["blocks"][1].pop("experts"),
    "a short row": lambda d: d["blocks"][1]["sums"]["chat"]["count"].pop(),
    "all rows short": lambda d: [d["blocks"][1]["sums"][x]["count"].pop() for x in ("code", "chat")],
    "a statistic for one domain alone": lambda d: d["blocks"][0]["sums"]["chat"].pop("gate_sum"),
    "a statistic for the other domain alone": lambda d: d["blocks"][0]["sums"]["code"].pop("gate_sum"),
    "a word": lambda d: d["blocks"][0]["sums"]["chat"]["count"].__setitem__(0, "many"),
    "null": lambda d: d["blocks"][0]["sums"]["chat"]["count"].__setitem__(0, None),
    "infinity": lambda d: d["blocks"][0]["sums"]["chat"]["count"].__setitem__(0, math.inf),
    "a slice too few": lambda d: d["blocks"][0]["slices"]["chat"]["count"].pop(),
    "slices without rows": lambda d: [d["blocks"][0]["slices"][x].update(count=[]) for x in ("code", "chat")],
    "a square of the wrong size": lambda d: d["blocks"][0]["gram"].pop(),
    "tokens of a domain": lambda d: d["blocks"][0]["tokens"].pop("code"),
    "a list for a mapping": lambda d: d["blocks"][0].update(sums=[1]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_sums_are_refused_in_one_line(kind):
    with pytest.raises(InputError, match=r"the scores are damaged: .*score the model again") as caught:
        Sums.from_json(corrupted(DAMAGE[kind]))
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_result(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    metadata.write_json(path, {"n": 1})

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metadata.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        metadata.write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}


def test_results_are_read_by_kind_and_version(tmp_path):
    path = tmp_path / "a.json"
    metadata.write_json(path, {**metadata.header("reap_metadata"), "inputs": {"fingerprint": "f"}})
    assert metadata.read_result(path, "reap_metadata")["inputs"] == {"fingerprint": "f"}
    assert metadata.is_current(path, "reap_metadata", "f")
    assert not metadata.is_current(path, "reap_metadata", "g")
    assert not metadata.is_current(path, "test_report", "f")
    assert not metadata.is_current(tmp_path / "none.json", "reap_metadata", "f")
    with pytest.raises(InputError, match="not a test_report file"):
        metadata.read_result(path, "test_report")
    metadata.write_json(path, {**metadata.header("reap_metadata"), "schema_version": "2.0"})
    with pytest.raises(InputError, match=r"schema version 2\.0"):
        metadata.read_result(path, "reap_metadata")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, '{"inputs": [1]}'])
def test_files_that_are_no_result_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert not metadata.is_current(path, "reap_metadata", "f")
    with pytest.raises(InputError):
        metadata.read_result(path, "reap_metadata")


def test_inputs_of_a_strange_type_are_just_not_current(tmp_path):
    path = tmp_path / "a.json"
    metadata.write_json(path, {**metadata.header("reap_metadata"), "inputs": ["f"]})
    assert not metadata.is_current(path, "reap_metadata", "f")


def test_digest_depends_on_every_part_and_its_place(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"content")
    digests = {
        metadata.digest(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", b"c"), (file,), ("a", file))
    }
    assert len(digests) == 6
    assert metadata.digest(file) == metadata.digest(b"content") and metadata.digest("a") == metadata.digest(b"a")


def test_header_says_when_and_with_what():
    head = metadata.header("reap_metadata", ("numpy", "no_such_package"))
    assert head["created_at"].endswith("Z") and head["environment"]["numpy"] == np.__version__
    assert "no_such_package" not in head["environment"]
    assert metadata.plain({"a": Path("b"), "c": (1, 2)}) == {"a": "b", "c": [1, 2]}
