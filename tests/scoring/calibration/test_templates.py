"""From samples to token ids, for the chat templates of ten families."""

from __future__ import annotations

import json

import pytest

from moeprune.scoring.calibration.samples import Sample
from moeprune.scoring.calibration.templates import Refused, Rules, encode, render
from tests.scoring import byte_tokenizer
from tests.scoring.chat_templates import CHAT, FAMILIES

RULES = Rules(max_seq_len=2048)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
# Two tools whose parameters differ: through Arrow, each would gain the other's as null.
TOOLS = json.dumps(
    [
        {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
        {"type": "function", "function": {"name": "now", "parameters": {"properties": {"zone": {"type": "string"}}}}},
    ]
)


def tokens(sample: Sample, name: str, rules: Rules = RULES) -> str:
    tokenizer = byte_tokenizer.of_family(name)
    return tokenizer.decode(encode(*render(sample, tokenizer, rules), tokenizer), skip_special_tokens=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_becomes_the_family_s_own_text_with_one_begin_token(name):
    assert tokens(Sample("chat", messages=CHAT), name) == FAMILIES[name].expected


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_are_one_token_each(name):
    tokenizer = byte_tokenizer.of_family(name)
    ids = encode(*render(Sample("chat", messages=CHAT), tokenizer, RULES), tokenizer)
    special = [i for i in ids if i < len(FAMILIES[name].special)]
    assert len(special) == sum(FAMILIES[name].expected.count(token) for token in FAMILIES[name].special)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].bos])
@pytest.mark.parametrize("brings_its_own", [False, True])
def test_running_text_gets_one_begin_token(name, brings_its_own):
    begin = FAMILIES[name].special[0]
    text = "Once upon a time"
    assert tokens(Sample("prose", text=begin * brings_its_own + text), name) == begin + text


def test_a_template_without_begin_token_gets_none():
    """The tokenizer would add one to running text; served chats carry only what the template writes."""
    tokenizer = byte_tokenizer.plain(("<s>", "</s>"), bos=True)
    tokenizer.chat_template = FAMILIES["chatml"].template
    ids = encode(*render(Sample("chat", messages=CHAT), tokenizer, RULES), tokenizer)
    assert tokenizer.decode(ids) == FAMILIES["chatml"].expected


@pytest.mark.parametrize(("name", "thinking"), [(n, t) for n, family in FAMILIES.items() for t in family.thinking])
def test_thinking_switch(name, thinking):
    rules = Rules(2048, thinking=thinking)
    assert tokens(Sample("chat", messages=CHAT), name, rules) == FAMILIES[name].thinking[thinking]


def test_system_prompt_is_added_only_where_there_is_none():
    bare = Sample("chat", messages=CHAT[1:])
    rules = Rules(2048, system_prompt="Be brief.")
    assert tokens(bare, "chatml", rules) == FAMILIES["chatml"].expected
    assert (
        tokens(Sample("chat", messages=CHAT), "chatml", Rules(2048, system_prompt="Other."))
        == FAMILIES["chatml"].expected
    )


def test_tools_and_calls_reach_the_template_unchanged():
    messages = (CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]})
    text = tokens(Sample("tools", messages=messages, tools=TOOLS), "qwen3")
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == json.loads(TOOLS)
    assert json.loads(text.split("<tool_call>\n")[1].split("\n</tool_call>")[0]) == {
        "name": "add",
        "arguments": {"a": 2, "b": 2},
    }


def test_templates_that_join_arguments_as_text_get_text():
    messages = (CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]})
    assert '```json\n{"a": 2, "b": 2}\n```' in tokens(Sample("tools", messages=messages), "deepseek")


def test_a_chat_that_the_template_forbids_is_refused_with_its_reason():
    twice = Sample("chat", messages=(CHAT[1], CHAT[1]))
    with pytest.raises(Refused, match="alternate"):
        tokens(twice, "mixtral")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (Sample("d", messages=({"role": "user", "content": "1+1="},), as_prompt=True), "1+1="),
        (Sample("d", messages=(CHAT[1], CHAT[2]), as_prompt=True), "2+2?\n4"),
        (Sample("d", messages=CHAT), "System: Be brief.\n\nUser: 2+2?\n\nAssistant: 4"),
        (
            Sample("d", messages=(CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]})),
            'User: 2+2?\n\nAssistant: {"name": "add", "arguments": {"a": 2, "b": 2}}',
        ),
    ],
)
def test_without_a_template_roles_are_joined_plainly(sample, expected):
    tokenizer = byte_tokenizer.plain(("<s>", "</s>"), bos=True)
    assert tokenizer.decode(encode(*render(sample, tokenizer, RULES), tokenizer)) == "<s>" + expected
