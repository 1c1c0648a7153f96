"""Hub data sets: each known one on a hand-made row with its real columns; presets and the settings that beat them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from moeprune.errors import InputError, StageError
from moeprune.scoring.calibration import hub
from moeprune.scoring.calibration.presets import PRESETS, plan_for
from moeprune.scoring.calibration.samples import find_columns, make_sample
from moeprune.scoring.calibration.selection import choose, shares
from moeprune.scoring.calibration.sources import Part, Source, parse_sources
from moeprune.settings import Settings
from tests.serving.servers import reserved_port

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PAIR = [USER, ASSISTANT]
XLAM_TOOLS = (
    '[{"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int", "default": 1}}}, '
    '{"name": "now", "description": "Time.", "parameters": {"zone": {"type": "str"}}}]'
)
# What Arrow makes of a chat turn: every field that any turn of the data set has.
WILD_TURN = {
    "language": "English",
    "redacted": False,
    "state": None,
    "timestamp": None,
    "toxic": False,
    "turn_identifier": 7,
}

ROWS = {
    "theblackcat102/evol-codealpaca-v1": ({"instruction": "Q", "output": "A"}, PAIR),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": ({"instruction": "Q", "response": "A"}, PAIR),
    "m-a-p/CodeFeedback-Filtered-Instruction": (
        {"query": "Q", "answer": "A", "resource": "evol", "lang": "python"},
        PAIR,
    ),
    "allenai/c4": ({"text": "Some text.", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}, "Some text."),
    "euclaise/WritingPrompts_curated": (
        {"prompt": "[WP] A door.", "body": "It opened.", "score": 9, "top_comment_score": 3},
        [
            {"role": "user", "content": "Write a creative story for this prompt.\n\n [WP] A door."},
            {"role": "assistant", "content": "It opened."},
        ],
    ),
    "allenai/tulu-3-sft-personas-math": ({"id": "p1", "prompt": "Q", "messages": PAIR, "constraints": None}, PAIR),
    "allenai/tulu-3-sft-mixture": ({"id": "p1", "messages": PAIR, "source": "ai2"}, PAIR),
    "AI-MO/NuminaMath-CoT": ({"source": "olympiads", "problem": "Q", "solution": "A", "messages": PAIR}, PAIR),
    "allenai/WildChat-1M": (
        {"conversation_hash": "h", "model": "m", "conversation": [{**USER, **WILD_TURN}, {**ASSISTANT, **WILD_TURN}]},
        PAIR,
    ),
    "CohereLabs/aya_dataset": ({"inputs": "Q", "targets": "A", "language": "Yoruba", "language_code": "yor"}, PAIR),
    "cais/mmlu": (
        {"question": "Smallest prime?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 1},
        [{"role": "user", "content": "Smallest prime?\nA. 1\nB. 2\nC. 3\nD. 4"}, {"role": "assistant", "content": "B"}],
    ),
    "open-r1/Mixture-of-Thoughts": ({"messages": PAIR, "num_tokens": 9, "source": "s"}, PAIR),
    "Salesforce/xlam-function-calling-60k": (
        {
            "id": 1,
            "query": "Q",
            "answers": '[{"name": "add", "arguments": {"a": 2}}, {"name": "now", "arguments": {}}]',
            "tools": XLAM_TOOLS,
        },
        [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}, "id": "call_0"},
                    {"type": "function", "function": {"name": "now", "arguments": {}}, "id": "call_1"},
                ],
            },
        ],
    ),
    "SWE-bench/SWE-smith-trajectories": (
        {
            "messages": json.dumps(
                [
                    {"role": "system", "content": "S", "agent": "main", "message_type": "system_prompt"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image", "id": 1}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "toolu_8f", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
                        ],
                    },
                ]
            ),
            "instance_id": "i",
            "resolved": True,
            "model": "m",
            "traj_id": "t",
            "patch": "",
        },
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": 'Q\n{"id": 1, "type": "image"}'},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "bash", "arguments": {"command": "ls"}}, "id": "call_0"}
                ],
            },
        ],
    ),
}  # fmt: skip


def as_sample(name: str, row: dict):
    converted = hub.convert(name, row)
    return make_sample(converted, find_columns(converted, {}, name), hub.domain_of(name, None), name)


def test_every_known_data_set_has_a_row_here():
    assert ROWS.keys() == hub.REGISTRY.keys()


@pytest.mark.parametrize("name", ROWS)
def test_known_data_set(name):
    row, expected = ROWS[name]
    sample = as_sample(name, row)
    assert (sample.text if isinstance(expected, str) else list(sample.messages)) == expected
    assert sample.domain == hub.REGISTRY[name].domain


def test_tools_come_through_unchanged():
    assert (
        as_sample("Salesforce/xlam-function-calling-60k", ROWS["Salesforce/xlam-function-calling-60k"][0]).tools
        == XLAM_TOOLS
    )
    agent = json.loads(as_sample("SWE-bench/SWE-smith-trajectories", ROWS["SWE-bench/SWE-smith-trajectories"][0]).tools)
    assert [tool["function"]["name"] for tool in agent] == ["bash", "str_replace_editor", "_state_anthropic", "submit"]
    assert agent[3]["function"]["parameters"] == {"type": "object", "properties": {}, "required": []}


def test_a_row_of_another_shape_names_the_columns_that_are_there():
    with pytest.raises(InputError, match=r"KeyError: 'output'.*\['instruction', 'response'\]"):
        hub.convert("theblackcat102/evol-codealpaca-v1", {"instruction": "Q", "response": "A"})


def test_composite_spec():
    sources = parse_sources("a/b[math](tool):40, allenai/c4:8,open-r1/Mixture-of-Thoughts[code]")
    assert [(s.name, s.limit, s.parts[0].domain) for s in sources] == [
        ("a/b[math](tool)", 40, "math"),
        ("allenai/c4", 8, "web"),
        ("open-r1/Mixture-of-Thoughts[code]", None, "code"),
    ]


@pytest.mark.parametrize("spec", ["a/b:5,", "a/b:x", "a/b(tool):0", "a/b:5,paper-code", "a/b[]:5"])
def test_malformed_composite_is_refused(spec):
    with pytest.raises(StageError, match="calibration data") as caught:
        parse_sources(spec)
    assert caught.value.exit_code in (2, 3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_well_formed_and_add_up(name):
    preset = PRESETS[name]
    sources = parse_sources(preset.spec)
    assert all(part.mapped for source in sources for part in source.parts)
    limits = [source.limit for source in sources]
    assert all(limit is None for limit in limits) or sum(limits) == preset.max_samples
    assert math.log2(preset.max_seq_len).is_integer()


def test_presets_have_the_published_numbers():
    # Samples and lengths of the paper, section 2.4 of its description: 2.1 M tokens packed; 12,228 samples unpacked.
    code, large = plan_for(Settings(calibration_path="paper-code")), plan_for(Settings(calibration_path="paper-large"))
    assert (code.max_samples * code.max_seq_len, code.packing) == (2_097_152, True)
    assert (large.max_samples, large.max_seq_len, large.packing) == (12_228, 16_384, False)
    assert Settings().seed == 42


def test_given_settings_beat_a_preset_and_scale_its_entries():
    given = Settings(
        calibration_path="paper-large", max_samples=30, packing="on", origin={"max_samples": "--max-samples"}
    )
    plan = plan_for(given)
    assert (plan.max_samples, plan.max_seq_len, plan.packing) == (30, 16_384, True)
    assert shares(parse_sources(plan.spec), plan.max_samples, plan.capped) == [10, 10, 10]


# -------------------------------------------------------------------- through `datasets` itself, from a local folder


def make_data_set(folder, name: str, rows: list[dict]):
    path = folder / name
    path.mkdir(parents=True)
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_streaming_a_known_data_set(tmp_path, monkeypatch):
    name = "allenai/WildChat-1M"
    make_data_set(
        tmp_path, name, [ROWS[name][0] | {"conversation": [USER, {**ASSISTANT, "extra": str(i)}]} for i in range(50)]
    )
    monkeypatch.chdir(tmp_path)  # where owner/name is a folder, datasets reads it as if it were on the hub
    first, again, other = ([row for _, row in hub.stream(name, None, None, seed, "")] for seed in (1, 1, 2))
    assert [row["messages"][0] for row in first] == [USER] * 50
    assert first == again
    assert first != other
    assert sorted(map(str, first)) == sorted(map(str, other))


def test_streaming_stops_when_there_is_enough(tmp_path, monkeypatch):
    make_data_set(tmp_path, "some/stories", [{"story": f"number {i}"} for i in range(5000)])
    monkeypatch.chdir(tmp_path)
    rows = partial(hub.stream, "some/stories", None, "train", 0, "")
    source = Source("some/stories", (Part("some/stories", "stories", rows, endless=True),))
    choice = choose(source, 20, 0, {"text": "story"}, 100)
    assert (len(choice.samples), choice.seen) == (20, 20)
    with pytest.raises(InputError, match=r"no usable column among 'story'; name one with --columns"):
        choose(source, 20, 0, {}, 100)


def test_a_split_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    make_data_set(tmp_path, "some/stories", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"some/stories: .*the split in \( \)"):
        next(iter(hub.stream("some/stories", None, "nowhere", 0, "")))


# ------------------------------------------------------------------------------------------ when there is no answer


def asked(name: str, **environment: str) -> list[str]:
    """What a run that wants the data set writes before it ends."""
    program = (
        "import sys; from moeprune.errors import StageError; from moeprune.scoring.calibration import hub\n"
        f"try: next(iter(hub.stream({name!r}, None, None, 0, '')))\n"
        "except StageError as error: sys.exit(f'{type(error).__name__}: {error}')"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=plain | environment)
    assert done.returncode == 1
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, id="offline"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:PORT"}, id="nobody answers"),
        pytest.param({"HF_ENDPOINT": "http://nowhere.invalid"}, id="no such name"),
    ],
)
def test_without_a_network_one_line_says_so_and_what_to_do(environment):
    with reserved_port() as port:
        lines = asked("nobody/nothing", **{name: text.replace("PORT", str(port)) for name, text in environment.items()})
    assert len(lines) == 1, lines
    assert lines[0].startswith("MachineError: nobody/nothing: the hub cannot be reached")
    assert "give a local file" in lines[0]


class Hub(BaseHTTPRequestHandler):
    """A hub without data sets, which remembers what it was asked."""

    status, code = 404, "RepoNotFound"
    questions: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.questions.append(self.path)
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "InputError: nobody/nothing: no such data set on the hub; check the name"),
        (500, "", "MachineError: nobody/nothing: the hub cannot be reached (Server error '500"),
    ],
)
def test_a_hub_that_has_nothing_is_asked_once(status, code, said):
    hub_of_this_test = type("HubOfThisTest", (Hub,), {"status": status, "code": code, "questions": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), hub_of_this_test) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = asked("nobody/nothing", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert len(lines) == 1, lines
    assert lines[0].startswith(said)
    assert [path for path in hub_of_this_test.questions if "nothing" in path] == ["/api/datasets/nobody/nothing"]
