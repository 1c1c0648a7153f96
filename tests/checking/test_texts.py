"""What is broken about a text is seen, and what only looks odd is not."""

from __future__ import annotations

import pytest

from moeprune.checking import generation, texts
from moeprune.checking.generation import Text
from moeprune.checking.samples import Sample


@pytest.mark.parametrize("text", ["a a a a a", "the cat cat cat cat cat cat", "!" * 30, "0 0 0 0 0 0 0 0 0"])
def test_one_word_again_and_again(text):
    assert "loop" in texts.flaws(text, ())


@pytest.mark.parametrize("ids", [[7] * 24, [1, 2, 3] + [4, 5] * 12, list(range(10)) + list(range(20, 60)) * 4])
def test_loops_of_any_unit(ids):
    assert texts.loops(ids)


@pytest.mark.parametrize("ids", [[], [7] * 10, list(range(200)), [4, 5] * 6, list(range(30)) * 2])
def test_no_loop(ids):
    assert not texts.loops(ids)


@pytest.mark.parametrize("text", ["4", "1 1 2 3 5", "ha ha ha", "北京", '{"a": [0, 0, 0]}', "a b\n" * 3, "naïve café"])
def test_sound_texts(text):
    assert texts.flaws(text, ()) == []


def test_empty_and_broken_bytes():
    assert texts.flaws(" \n", ()) == ["empty"]
    assert texts.flaws("ab\ufffdcd", ()) == ["broken characters"]
    assert texts.flaws("cut in half by the limit \ufffd", ()) == []


def test_scripts():
    assert [texts.script(t) for t in ("Привет x", "hello", "北京市", "12 + 3", "こんにちは")] == [
        "CYRILLIC", "LATIN", "CJK", "", "JAPANESE",
    ]  # fmt: skip


def test_json_may_be_fenced():
    assert texts.json_object('```json\n{"a": 1}\n```') == {"a": 1}
    assert texts.json_object("[1]") is None
    assert texts.json_object('{"a": 1') is None
    assert texts.json_object("[" * 100_000) is None


def test_answers():
    assert texts.right(" 12\n", "12", exactly=True)
    assert not texts.right("12 or 13", "12", exactly=True)
    assert texts.right("It is 12.", "12", exactly=False)
    assert not texts.right("It is 120.", "12", exactly=False)


def test_rates_stand_beside_the_parents():
    prompts = [Sample("x", prompt=str(i), answer='{"a": 1}') for i in range(4)]
    good = Text('{"a": 1}', 5, True, False)
    bad = [good, Text("a a a a a a", 90, False, True), Text("", 0, True, False), Text('{"b": 1}', 5, True, False)]
    found = generation.judge(prompts, [good] * 4, bad, exact=True)
    rates = {name: (entry["pruned"]["hits"], entry["parent"]["hits"]) for name, entry in found["rates"].items()}
    assert rates == {
        "broken": (2, 0), "loop": (1, 0), "empty": (1, 0), "broken characters": (0, 0), "not ended": (1, 0),
        "correct": (1, 4), "valid JSON": (2, 4), "right JSON keys": (1, 4),
    }  # fmt: skip
    assert not found["enough_prompts"]
    assert found["needed_prompts"] > 700
