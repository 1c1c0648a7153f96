"""The built-in set: what it holds, that it is made anew to the byte, and that it runs through every template."""

from __future__ import annotations

import json
import unicodedata

import pytest
import transformers

from moeprune.scoring.calibration.builtin import generate
from moeprune.scoring.calibration.load import load_calibration
from moeprune.scoring.calibration.sources import BUILTIN
from moeprune.settings import Settings
from tests.scoring import byte_tokenizer

DOMAINS = ("chat", "code", "data", "languages", "maths", "prose", "reasoning", "tools")


def rows(domain: str) -> list[dict]:
    return [json.loads(line) for line in (BUILTIN / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_generated_half_is_made_anew_to_the_byte(tmp_path):
    generate.main(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["data.jsonl", "maths.jsonl", "reasoning.jsonl", "tools.jsonl"]
    assert all((tmp_path / name).read_bytes() == (BUILTIN / name).read_bytes() for name in made)


def test_a_few_hundred_kilobytes_in_eight_domains_and_many_scripts():
    assert tuple(sorted(path.stem for path in BUILTIN.glob("*.jsonl"))) == DOMAINS
    assert 200_000 < sum(path.stat().st_size for path in BUILTIN.glob("*.jsonl")) < 600_000
    texts = [row["text"] for row in rows("languages")]
    scripts = {unicodedata.name(c).split()[0] for text in texts for c in text if c.isalpha()}
    expected = {
        "LATIN",
        "CYRILLIC",
        "CJK",
        "HIRAGANA",
        "HANGUL",
        "ARABIC",
        "HEBREW",
        "DEVANAGARI",
        "GREEK",
        "THAI",
        "BENGALI",
    }
    assert scripts >= expected


def test_no_sample_is_there_twice():
    for domain in DOMAINS:
        lines = (BUILTIN / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)), domain


def test_calls_fit_the_schemas_that_are_offered():
    for row in rows("tools"):
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in json.loads(row["tools"])}
        calls = [call["function"] for message in row["messages"] for call in message.get("tool_calls", ())]
        assert calls
        for call in calls:
            assert sorted(call["arguments"]) == sorted(offered[call["name"]]["required"])


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "gemma"])
def test_every_sample_runs_through_the_template(name):
    config = transformers.Qwen3MoeConfig(vocab_size=300)
    summary = load_calibration(Settings(), byte_tokenizer.of_family(name), config).summary
    assert summary["skipped"] == {}
    assert tuple(summary["domains"]) == DOMAINS
