"""A repository of GGUF files on a hub: `maker/model:Q4_K_M` fetches one model of it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import plan
from moeprune.checkpoint import hub
from moeprune.checkpoint.folder import locate_model, open_checkpoint
from moeprune.checkpoint.outline import open_outline
from moeprune.errors import InputError, MachineError
from tests.checkpoint import test_gguf
from tests.checkpoint.stand_in import Repository, served

WHOLE = test_gguf.build(test_gguf.ENTRIES, test_gguf.TENSORS)[0]
HALVES = (dict(list(test_gguf.TENSORS.items())[:9]), dict(list(test_gguf.TENSORS.items())[9:]))
FILES = {
    "README.md": b"a model",
    "model-Q4_K_M.gguf": WHOLE,
    "model-q4_k.gguf": WHOLE,
    "model-IQ4_K_M.gguf": WHOLE,
    "mmproj-Q8_0.gguf": b"no model",
    "Q8_0/model-Q8_0-00001-of-00002.gguf": test_gguf.build(test_gguf.ENTRIES, HALVES[0])[0],
    "Q8_0/model-Q8_0-00002-of-00002.gguf": test_gguf.build([test_gguf.number("split.no", 1)], HALVES[1])[0],
}


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repository]:
    """A hub with this one repository."""
    repository = Repository(FILES)
    with served(repository, monkeypatch, tmp_path):
        yield repository


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("maker/model:Q4_K_M", {"model-Q4_K_M.gguf"}),
        ("maker/model:q8_0@main", {name for name in FILES if name.startswith("Q8_0/")}),
    ],
)
def test_one_model_is_fetched(model, names, repository):
    file = locate_model(model)
    assert file.name == min(names).rpartition("/")[2]
    assert set(open_checkpoint(file).tensors) == set(test_gguf.TENSORS)
    assert repository.sent.keys() == names
    repository.sent.clear()
    assert open_outline(model).checkpoint.tensors == open_checkpoint(file).tensors
    assert not repository.sent  # it is in the cache


def test_numbers_that_the_repository_does_not_have(repository):
    for ask in (locate_model, open_outline):
        with pytest.raises(InputError, match=r"maker/model:Q2_K: the repository has no GGUF file with Q2_K"):
            ask("maker/model:Q2_K")
    assert not repository.sent
    with pytest.raises(InputError, match=r"has no config\.json.*name one: maker/model:Q4_K_M"):
        locate_model("maker/model")
    assert repository.sent.keys() == {"README.md"}
    with pytest.raises(InputError, match=r"no safetensors weights.*GGUF file is named.*maker/model:Q4_K_M"):
        open_outline("maker/model")


@pytest.mark.parametrize("model", ["maker/model:Q4_K_M", "maker/model:q8_0@main"])
def test_of_a_model_that_stays_there_only_the_header_is_read(model, repository, monkeypatch, tmp_path):
    """In pieces that are smaller than it, so that it takes several requests."""
    monkeypatch.setattr(hub, "STEP", 64)
    outline = open_outline(model)
    assert outline.measured
    sent, whole = dict(repository.sent), sum(len(FILES[name]) for name in repository.sent)
    here = open_checkpoint(locate_model(model))
    assert outline.checkpoint.config == here.config
    found, wanted = ({n: t._replace(file="") for n, t in c.tensors.items()} for c in (outline.checkpoint, here))
    assert found == wanted
    assert 0 < sum(sent.values()) < whole / 4
    assert max(sent.values()) > 64


def test_it_is_planned(repository, monkeypatch, tmp_path, capsys):
    words = ["--output-path", str(tmp_path), "--read-rate", "1GB", "--compute-rate", "1"]
    plan.main(["--model-path", "maker/model:Q4_K_M", *words])
    distant = json.loads(capsys.readouterr().out)
    assert "model-Q4_K_M.gguf" in repository.sent
    plan.main(["--model-path", str(locate_model("maker/model:Q4_K_M")), *words])
    here = json.loads(capsys.readouterr().out)
    assert distant["cuts"] == here["cuts"]
    assert (distant["model"]["source"], here["model"]["source"]) == ("headers at the hub", "headers on this disk")


def test_a_hub_that_sends_no_parts_is_not_read_in_whole(repository):
    repository.knows_ranges = False
    with pytest.raises(MachineError, match=r"sends no parts of files.*give a GGUF file on this disk"):
        open_outline("maker/model:Q4_K_M")
