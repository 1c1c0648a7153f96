"""The batch against servers in processes of their own, with faults on the way: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moeprune.errors import InputError
from moeprune.serving.prompts import load_prompts
from tests.serving.faults import FAULTS, SILENT, Proxy
from tests.serving.servers import PATIENCE_S, ROOT, echo_server, reserved_port, transformers_serve

FEW = ("--concurrency", "4")


@pytest.fixture(scope="module")
def echo():
    with reserved_port() as port, echo_server(port):
        yield port


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {n} of many"}) + "\n" for n in range(count)))
    return path


def start(folder: Path, url: str, *words: str, **environ: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "batch.py", "--endpoint", url, "--answers-path", folder / "a.jsonl", *words]
    env = {"PATH": os.environ["PATH"], **environ}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_answers(folder: Path, count: int, process: subprocess.Popen) -> None:
    """The server holds what comes behind these, so the run stays as it is then."""
    path = folder / "a.jsonl"
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None
        time.sleep(0.02)


def batch(folder: Path, url: str, *words: str, **environ: str) -> subprocess.CompletedProcess:
    process = start(folder, url, *words, **environ)
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def assert_complete(folder: Path, count: int, model: str = "echo") -> None:
    found = answers(folder)
    assert sorted(entry["id"] for entry in found) == sorted(f"p.jsonl:{n + 1}" for n in range(count))
    for entry in found:
        assert entry["answer"] == f"{entry['messages'][-1]['content'][::-1]} by {model}"


def test_every_fault_is_survived(echo, tmp_path):
    proxy = Proxy(echo)
    count = 2 * len(FAULTS)
    prompts = write_prompts(tmp_path / "p.jsonl", count)
    done = batch(tmp_path, proxy.url, "--prompts-path", str(prompts), *FEW)
    assert done.returncode == 0, done.stderr
    assert set(proxy.met) == set(FAULTS)
    assert_complete(tmp_path, count)
    assert {entry["attempts"] for entry in answers(tmp_path)} == {2}
    assert all(entry["completion_tokens"] == len(entry["answer"]) for entry in answers(tmp_path))  # by /tokenize
    assert done.stdout.strip() == str(tmp_path / "a.jsonl")


def test_a_question_that_is_not_answered_in_time_is_asked_again(echo, tmp_path):
    proxy = Proxy(echo, (SILENT,))
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    done = batch(tmp_path, proxy.url, "--prompts-path", str(prompts), "--request-timeout", "1")
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path, 2)
    assert min(entry["attempts"] for entry in answers(tmp_path)) >= 2


def test_a_second_run_asks_nothing_and_a_changed_question_is_asked_again(echo, tmp_path):
    proxy = Proxy(echo, faults=())
    prompts = write_prompts(tmp_path / "p.jsonl", 6)
    words = ("--prompts-path", str(prompts), *FEW)
    assert batch(tmp_path, proxy.url, *words).returncode == 0
    assert batch(tmp_path, proxy.url, *words).returncode == 0
    assert sum(proxy.forwarded.values()) == 6
    assert batch(tmp_path, proxy.url, *words, "--max-new-tokens", "7").returncode == 0
    assert sum(proxy.forwarded.values()) == 12


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_goes_on_where_it_was(echo, tmp_path, blow):
    words = ("--prompts-path", str(write_prompts(tmp_path / "p.jsonl", 20)), *FEW)
    with reserved_port() as port, echo_server(port, answers=8):
        first = start(tmp_path, f"http://127.0.0.1:{port}/v1", *words)
        wait_for_answers(tmp_path, 8, first)
        first.send_signal(blow)
        _, err = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[blow], err
    assert "Traceback" not in err
    assert len(answers(tmp_path)) == 8
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"id": "p.jsonl:20", "answer": "half a li')  # what a crash in the middle of a write leaves
    proxy = Proxy(echo, faults=())
    done = batch(tmp_path, proxy.url, *words)
    assert done.returncode == 0, done.stderr
    assert "8 of 20 prompts have their answer already" in done.stderr
    assert_complete(tmp_path, 20)
    assert sum(proxy.forwarded.values()) == 12


def test_a_server_that_is_killed_and_started_again_costs_nothing(tmp_path):
    words = ("--prompts-path", str(write_prompts(tmp_path / "p.jsonl", 12)), *FEW, "--served-model", "echo")
    with reserved_port() as port:
        with echo_server(port, answers=1) as server:
            process = start(tmp_path, f"http://127.0.0.1:{port}/v1", *words)
            wait_for_answers(tmp_path, 1, process)
            assert server.stdout.readline() == "holding\n"  # this question loses its server
        with echo_server(port):
            _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert_complete(tmp_path, 12)
    assert max(entry["attempts"] for entry in answers(tmp_path)) > 1


def test_no_server_at_all_ends_in_one_line(tmp_path):
    words = ("--prompts-path", str(write_prompts(tmp_path / "p.jsonl", 30)), *FEW, "--attempts", "1")
    with reserved_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        done = batch(tmp_path, url, *words)
        assert (done.returncode, "no answer from" in done.stderr.splitlines()[-1]) == (4, True)
        done = batch(tmp_path, url, *words, "--served-model", "x")
        assert (done.returncode, "the last 12 prompts failed" in done.stderr.splitlines()[-1]) == (4, True)


def test_a_prompt_that_is_refused_does_not_stop_the_others(echo, tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n"refuse me"\n"b"\n')
    words = ("--prompts-path", "p.jsonl", "--api", "completions")
    done = batch(tmp_path, f"http://127.0.0.1:{echo}/v1", *words)
    assert done.returncode == 4
    assert "p.jsonl:2: HTTP 400" in done.stderr
    assert [entry["answer"] for entry in sorted(answers(tmp_path), key=lambda e: e["id"])] == ["a by echo", "b by echo"]


def test_two_answers_side_by_side_and_hostile_text_stays_text(echo, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "x", "prompt": ">tpircs<<b>"}\n')
    url = f"http://127.0.0.1:{echo}/v1"
    other = tmp_path / "parent.jsonl"
    parent = ("--prompts-path", "p.jsonl", "--served-model", "parent", "--answers-path", str(other))
    assert batch(tmp_path, url, *parent).returncode == 0
    done = batch(tmp_path, url, "--prompts-path", "p.jsonl", "--served-model", "pruned", "--compare", str(other))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "a.html").read_text()
    assert "by parent" in page and "by pruned" in page
    assert "<script" not in page and "<b>" not in page.split("<pre><b>")[1].split("</b></pre>")[0]
    assert "1 prompts in both files, 0 answers are the same" in done.stderr


def test_answers_to_compare_with_must_be_there(tmp_path):
    write_prompts(tmp_path / "p.jsonl", 1)
    done = batch(tmp_path, "http://127.0.0.1:9/v1", "--prompts-path", "p.jsonl", "--compare", "nowhere.jsonl")
    assert done.returncode == 3 and "no file of answers at nowhere.jsonl" in done.stderr


def test_the_key_is_sent_and_never_kept(echo, tmp_path):
    write_prompts(tmp_path / "p.jsonl", 2)
    done = batch(tmp_path, f"http://127.0.0.1:{echo}/v1", "--prompts-path", "p.jsonl", REAP_ENDPOINT_KEY="key_canary")
    assert done.returncode == 0, done.stderr
    assert "key_canary" not in (tmp_path / "a.jsonl").read_text() + done.stderr + done.stdout


def test_one_run_at_a_time_writes_a_file(echo, tmp_path):
    words = ("--prompts-path", str(write_prompts(tmp_path / "p.jsonl", 4)))
    with reserved_port() as port, echo_server(port, answers=1):
        first = start(tmp_path, f"http://127.0.0.1:{port}/v1", *words)
        wait_for_answers(tmp_path, 1, first)
        second = batch(tmp_path, f"http://127.0.0.1:{echo}/v1", *words)
        assert (second.returncode, "another run is writing" in second.stderr) == (2, True)
        first.kill()
        first.communicate(timeout=PATIENCE_S)
    assert batch(tmp_path, f"http://127.0.0.1:{echo}/v1", *words).returncode == 0
    assert_complete(tmp_path, 4)


def test_prompts_from_every_kind_of_file(tmp_path):
    folder = tmp_path / "prompts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("whole file\nas it is\n")
    (folder / "b.json").write_text('["one", {"id": "two", "messages": [{"role": "system", "content": "s"}, '
                                   '{"role": "user", "content": "u"}]}]')  # fmt: skip
    (folder / "deep" / "c.jsonl").write_text('{"prompt": "see", "images": ["dot.png"]}\n\n"text"\n')
    (folder / "deep" / "dot.png").write_bytes(b"\x89PNG")
    (folder / "ignored.csv").write_text("x")
    found = {prompt.id: prompt for prompt in load_prompts(folder)}
    assert list(found) == ["a.txt", "b.json:1", "two", "deep/c.jsonl:1", "deep/c.jsonl:3"]
    assert found["a.txt"].text == "whole file\nas it is\n"
    assert found["two"].text is None and len(found["two"].chat()) == 2
    (message,) = found["deep/c.jsonl:1"].chat()
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "text", "text": "see"},
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('"a"\n{"prompt": \n', "p.jsonl:2: not valid JSON"),
        ("3\n", "p.jsonl:1: a prompt is a text"),
        ('{"messages": []}\n', "p.jsonl:1: messages must be a list"),
        ('{"text": "x"}\n', "p.jsonl:1: the last message has no content"),
        ('{"prompt": "x", "images": ["gone.png"]}\n', "gone.png is not there"),
        ('{"prompt": "x", "id": "1"}\n{"prompt": "y", "id": "1"}\n', 'two prompts have the id "1"'),
        ("\n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, content, line):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        load_prompts(tmp_path / "p.jsonl")
    assert line in str(error.value)


def test_a_model_behind_transformers_serve_with_faults(tmp_path):
    """The demo model really answers; the counts of tokens are the server's."""
    (tmp_path / "p.jsonl").write_text("".join(f'"2 + {n} ="\n' for n in range(8)))
    words = ("--prompts-path", "p.jsonl", "--served-model", "demo/model", "--api", "completions", "--concurrency", "2")
    with transformers_serve("demo/model", tmp_path / "log") as port:
        done = batch(tmp_path, Proxy(port, ("500", "reset", "", "429")).url, *words)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()[-2000:]
    found = {entry["id"]: entry for entry in answers(tmp_path)}
    assert len(found) == 8
    assert found["p.jsonl:3"]["answer"].strip() == "4"
    assert all(entry["completion_tokens"] > 0 and entry["prompt_tokens"] > 0 for entry in found.values())
