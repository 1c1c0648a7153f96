"""Where a setting comes from, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moeprune.envfile import read_dotenv
from moeprune.errors import UsageError
from moeprune.settings import FIELDS, Settings, resolve
from moeprune.values import amount


@pytest.fixture
def dotenv(tmp_path):
    return tmp_path / ".env"


def test_flag_beats_environment_beats_dotenv_beats_default(dotenv):
    dotenv.write_text("REAP_SEED=1\nREAP_BATCH_SIZE=2\nREAP_MAX_SAMPLES=3\n")
    environ = {"REAP_SEED": "10", "REAP_BATCH_SIZE": "20"}
    found = resolve("reap", ["--seed", "100"], environ, dotenv)
    assert (found.seed, found.batch_size, found.max_samples, found.max_seq_len) == (100, 20, 3, 2048)
    assert found.origin["seed"] == "--seed"
    assert found.origin["batch_size"] == "environment REAP_BATCH_SIZE"
    assert found.origin["max_samples"].endswith(".env REAP_MAX_SAMPLES")
    assert "max_seq_len" not in found.origin


def test_empty_means_unset(dotenv):
    dotenv.write_text("REAP_SEED=\n")
    assert resolve("reap", [], {"REAP_SEED": ""}, dotenv).seed == 42


def test_false_and_zero_can_be_said(dotenv):
    dotenv.write_text("REAP_FORCE=true\nREAP_PRUNE_RATIO=0.25\n")
    found = resolve("prune", ["--force", "false", "--prune-ratio", "0"], {}, dotenv)
    assert (found.force, found.prune_ratio) == (False, 0)


@pytest.mark.parametrize(
    "line", ["REAP_SEED = 1", 'REAP_SEED="1"', "REAP_SEED=1 # one", "export REAP_SEED=1", "REAP_SEED=$X", "REAP_SEED"]
)
def test_a_line_that_programs_read_differently_is_refused(dotenv, line):
    dotenv.write_text(f"# a comment\n\n{line}\n")
    with pytest.raises(UsageError, match=r"\.env:3"):
        read_dotenv(dotenv)


def test_dotenv_is_read_the_same_before_the_set_up(dotenv, monkeypatch):
    dotenv.write_text("# REAP_SEED=1\n\nREAP_MODEL_PATH=/a/b=c\nREAP_SEED=\nREAP_SEED=3\nHF_TOKEN=hf_x\nREAP_KEEP=\n")
    with_library = read_dotenv(dotenv)
    monkeypatch.setitem(sys.modules, "dotenv", None)
    assert read_dotenv(dotenv) == with_library == {"REAP_MODEL_PATH": "/a/b=c", "REAP_SEED": "3", "HF_TOKEN": "hf_x"}


@pytest.mark.parametrize("content", [b"REAP_SEED=\xff\n", b"\xef\xbb\xbfREAP_SEED=1\n"])
def test_a_dotenv_that_is_no_plain_utf8_is_refused(dotenv, content):
    dotenv.write_bytes(content)
    with pytest.raises(UsageError, match="UTF-8"):
        read_dotenv(dotenv)


def test_a_dotenv_that_is_a_folder_is_refused(dotenv):
    dotenv.mkdir()
    with pytest.raises(UsageError, match="directory"):
        read_dotenv(dotenv)


def test_a_dotenv_from_windows_is_read(dotenv):
    dotenv.write_bytes(b"REAP_SEED=7\r\nREAP_BATCH_SIZE=2\r\n")
    assert read_dotenv(dotenv) == {"REAP_SEED": "7", "REAP_BATCH_SIZE": "2"}


def test_a_misspelt_flag_ends_in_one_line_with_a_suggestion(dotenv):
    with pytest.raises(UsageError, match=r"--prune-ratoi=1; did you mean --prune-ratio\?"):
        resolve("prune", ["--prune-ratoi=1"], {}, dotenv)
    with pytest.raises(UsageError, match="--help lists the flags"):
        resolve("prune", ["--seed"], {}, dotenv)


@pytest.mark.parametrize(
    ("name", "text"), [("REAP_SEED", "1.5"), ("REAP_MAX_KL", "x"), ("REAP_MAX_KL", "nan"), ("REAP_PRUNE_RATIO", "nan")]
)
def test_numbers_are_numbers(dotenv, name, text):
    with pytest.raises(UsageError, match=rf"{name}: '{text}': write a (whole )?number"):
        resolve("test", [], {name: text}, dotenv)


def test_a_negative_count_is_refused(dotenv):
    with pytest.raises(UsageError, match=r"--keep: '-1': must be 0 or more"):
        resolve("prune", ["--keep", "-1"], {}, dotenv)


@pytest.mark.parametrize("place", ["environment", "dotenv"])
def test_a_misspelt_name_is_refused_with_a_suggestion(dotenv, place):
    name = "REAP_PRUNE_RATOI"
    dotenv.write_text(f"{name}=0.3\n" if place == "dotenv" else "")
    with pytest.raises(UsageError, match=r"did you mean REAP_PRUNE_RATIO\?"):
        resolve("reap", [], {name: "0.3"} if place == "environment" else {}, dotenv)


def test_a_wrong_value_names_where_it_stands(dotenv):
    dotenv.write_text("REAP_PRUNE_RATIO=1.5\n")
    with pytest.raises(UsageError, match=r"\.env REAP_PRUNE_RATIO: '1.5': must be at least 0 and below 1"):
        resolve("prune", [], {}, dotenv)


def test_secrets_stay_out_of_results_and_command_lines(dotenv):
    found = resolve("reap", [], {"HF_TOKEN": "hf_canary"}, dotenv)
    assert found.hf_token == "hf_canary"
    assert "hf_canary" not in json.dumps(found.public())
    with pytest.raises(UsageError, match="unrecognized"):  # a flag would show in the list of processes
        resolve("reap", ["--hf-token", "x"], {}, dotenv)


def test_every_setting_has_a_stage_and_a_default_that_its_parser_would_give():
    for f in FIELDS:
        assert f.metadata["stages"] and f.metadata["help"], f.name
        if f.default not in ("", 0):
            assert f.metadata["parse"](str(f.default)) == f.default, f.name
    assert Settings().public()["origin"]["seed"] == "default"


@pytest.mark.parametrize(("text", "count"), [("24GB", 24e9), ("16GiB", 2**34), ("1.5k", 1500), ("7", 7), ("2 MB", 2e6)])
def test_amounts_of_bytes(text, count):
    assert amount(text) == count


ENDS = {
    "raise errors.InputError('no such model')": (3, "error: no such model"),
    "raise errors.ResultError('broken\\ntext')": (5, "error: broken text"),
    "raise KeyboardInterrupt": (130, "error: interrupted"),
    "os.kill(os.getpid(), 15)": (143, "error: stopped by SIGTERM"),
    "raise OSError(28, 'full', '/x')": (4, "error: no space left on the disk at /x"),
    "raise OSError(30, 'Read-only file system', '/x')": (4, "error: Read-only file system: /x; name another place"),
    "raise MemoryError('hidden states')": (4, "error: out of memory"),
    "1 / 0": (1, "error: ZeroDivisionError"),
    "pass": (0, ""),
    "sys.stdout = None; print(1)": (0, ""),
}


def test_each_end_of_a_stage_has_its_code_and_one_line():
    program = "import os, sys\nfrom moeprune import errors\ndef stage(argv):\n    {}\nerrors.run(stage)"
    started = {
        body: subprocess.Popen([sys.executable, "-c", program.format(body)], stderr=subprocess.PIPE, text=True)
        for body in ENDS
    }
    for body, process in started.items():
        _, text = process.communicate()
        code, line = ENDS[body]
        assert process.returncode == code, (body, text)
        assert text.splitlines()[-1].startswith(line) if line else not text, body
        assert len(text.splitlines()) <= 1 or code == 1, text
