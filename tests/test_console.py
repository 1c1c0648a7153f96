"""What a person sees, on terminals and in locales of every kind."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = """
from moeprune import console
bar = console.Progress("pruned model writes", 3)
for detail in ("a detail that is longer than the line", "short", "the last line is shown as long as it is"):
    bar.last = float("-inf")  # shown though the one before was a moment ago
    bar.step(detail)
"""


def test_a_progress_line_is_no_wider_than_the_terminal():
    terminal, ours = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    process = subprocess.run([sys.executable, "-c", PROGRESS], stderr=ours, stdout=subprocess.DEVNULL)
    os.close(ours)
    first, second, last = os.read(terminal, 10_000).decode().removeprefix("\r\x1b[K").split("\r\x1b[K")
    os.close(terminal)
    assert process.returncode == 0
    assert (len(first), len(second)) == (39, 39)
    assert first.endswith("…") and first.startswith("pruned model writes 1/3, a detail")
    assert "shown as long as it is" in last


STAGE = """
import pathlib, sys
from moeprune import console, errors
def stage(argv):
    pathlib.Path(argv[0]).mkdir()
    console.say(argv[0])
    print(argv[0])
errors.run(stage)
"""
LOCALES = {
    "utf-8": {"PYTHONUTF8": "1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii output": {"PYTHONUTF8": "1", "PYTHONIOENCODING": "ascii"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_beyond_ascii_work_in_any_locale(tmp_path, locale):
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **LOCALES[locale]}
    command = [sys.executable, "-c", STAGE, "größe".encode()]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(os.fsencode(tmp_path)) == ["größe".encode()]  # noqa: PTH208 - as bytes
    shown = rb"gr\xf6\xdfe" if locale == "ascii output" else "größe".encode()
    assert (done.stdout, done.stderr) == (shown + b"\n", shown + b"\n")


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path):
    command = [sys.executable, "-c", STAGE, b"gr\xf6\xdfe"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: 'gr\\udcf6\\udcdfe' is not UTF-8; rename the file or folder\n"
    assert not list(tmp_path.iterdir())
