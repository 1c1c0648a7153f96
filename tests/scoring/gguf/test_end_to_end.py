"""A user who has nothing but a GGUF file: reap, prune, test; and the tokenizer that the file describes."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import transformers

import prune_model
import reap
import test_pruned_model
from moeprune.errors import InputError, ResultError
from moeprune.metadata import Sums
from moeprune.scoring.gguf import tokenizer
from tests import gguf_files, tiny

TEXTS = ("The other theory: 12 hens\n", "<|user|>hey<|end|>", "\u00e9\u4e2d  \u0000", "<|endoftext|> there")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that merges a pair."""
    folder = tiny.make("qwen3_moe", tmp_path_factory.mktemp("gguf") / "original", norm_topk_prob=True)
    gguf_files.tokenizer(folder)
    return folder


@pytest.fixture
def file(original: Path, tmp_path: Path) -> Path:
    gguf_files.convert(original, tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def scores(path: Path) -> Sums:
    return Sums.from_json(json.loads((path / "reap_metadata.json").read_text())["scores"])


def test_from_the_file_alone(original: Path, file: Path, tmp_path: Path) -> None:
    """The scores of the original, a cut by them, and a verdict on it; no other file is needed."""
    data = tmp_path / "data.jsonl"
    rows = [{"domain": "ab"[i % 2], "text": f"{i} the words there {i * 7} "} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--device", "cpu", "--dtype", "float32"]
    for model in (original, file):
        output = tmp_path / model.stem
        reap.main(["--model-path", str(model), "--output-path", str(output), "--calibration-path", str(data), *asked])
    found, expected = scores(tmp_path / "model"), scores(tmp_path / "original")
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        assert a.block.rpartition(".")[2] == b.block.rpartition(".")[2]
        for name in a.values:
            np.testing.assert_allclose(a.values[name], b.values[name], rtol=1e-9)
    output = ["--output-path", str(tmp_path / "model")]
    prune_model.main(["--model-path", str(file), "--keep", "6", *output])
    small = ["--evaluation-samples", "4", "--generations", "2", "--max-new-tokens", "2"]
    with suppress(ResultError):  # whether a cut of random weights is good enough is not the question
        test_pruned_model.main([*output, *asked, *small])
    report = json.loads((tmp_path / "model" / "test_report.json").read_text())
    assert report["inputs"]["parent"]["path"] == str(file)
    assert report["structure"]["status"] == "pass", report["structure"]["reason"]
    assert not report["not_tested"], "generated, too"
    assert "llama-server -m model-reap-6of8.gguf" in (tmp_path / "model/model-reap-6of8/README.md").read_text()


def test_the_tokens_of_the_original(original: Path, file: Path) -> None:
    """Also none behind the last that the file lists, for which the model would have no row."""
    right = transformers.AutoTokenizer.from_pretrained(original)
    found = tokenizer.load(file)
    for text in TEXTS:
        assert found(text)["input_ids"] == right(text)["input_ids"]
    messages = [{"role": "user", "content": "hey"}]
    assert found.apply_chat_template(messages, tokenize=False) == right.apply_chat_template(messages, tokenize=False)
    assert (found.eos_token, found.pad_token) == (right.eos_token, right.pad_token)
    assert len(found) == 272


def test_the_original_tokenizer_beside_the_file_is_taken(original: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.other"))
    with pytest.raises(InputError, match=r"describes no tokenizer.*put tokenizer\.json"):
        tokenizer.load(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (file.parent / name).write_bytes((original / name).read_bytes())
    assert tokenizer.load(file)("the")["input_ids"] == [91, 264]


def test_a_split_that_transformers_does_not_know_is_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known, other = (struct.pack("<Q", 5) + word for word in (b"qwen2", b"glm-x"))
    file.write_bytes(file.read_bytes().replace(known, other))
    tokenizer.load(file)
    assert "splits text as glm-x does" in capsys.readouterr().err
