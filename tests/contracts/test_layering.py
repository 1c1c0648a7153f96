"""The shape of the house: imports point downwards, and what works on bytes starts without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from tests.contracts.documents import ROOT

PACKAGE = ROOT / "moeprune"
LEVELS = {
    "arrays": 0,
    "errors": 0,
    "values": 0,
    "console": 1,
    "envfile": 1,
    "results": 1,
    "metadata": 1,
    "settings": 2,
    "checkpoint": 3,
    "planning": 4,
    "serving": 4,
    "pruning": 5,
    "scoring": 5,
    "checking": 6,
    "doctor": 6,
    "summary": 6,
}
WITHOUT_TORCH = {room for room in LEVELS if room not in {"scoring", "checking", "doctor", "summary"}}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def room(path) -> str:
    """The wing, or the module of the ground floor, that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = room(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top == "moeprune" and other in LEVELS and other != here:
            assert LEVELS[other] < LEVELS[here], f"{here} must not import {other}"
        if here in WITHOUT_TORCH:
            assert top not in {"torch", "transformers"}, f"{here} must do without {top}"


def test_every_room_has_its_level():
    assert {room(path) for path in MODULES} == set(LEVELS)


def test_verification_shares_no_code_with_what_it_checks():
    shared = {"pruning.rewrite", "checkpoint.writer", "checkpoint.families", "checkpoint.formats", "checkpoint.folder"}
    for name in imports(PACKAGE / "pruning" / "verify.py"):
        assert not any(name.startswith(f"moeprune.{other}") for other in shared), name
        assert name not in {f"moeprune.{other}" for other in shared}


@pytest.mark.parametrize("script", ["prune_model.py", "reap.py", "test_pruned_model.py"])
def test_a_script_answers_before_torch_is_loaded(script):
    command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert not loaded & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("reap.py", ["--metric", "foo"]),
        ("reap.py", ["--weights", "code"]),
        ("preview.py", ["--metrics", "reap,foo"]),
        ("preview.py", ["--ratios", "0.5,2"]),
        ("prune_model.py", ["--weights", "code=x"]),
        ("plan.py", ["--engine", "ollama"]),
        ("combine.py", ["a.json", "b.json"]),
    ],
)
def test_words_that_mean_nothing_are_refused_first(script, words):
    """Before the model or the scores are looked for, and before torch is loaded."""
    environ = {**os.environ, "REAP_METRIC": "foo"} if script == "combine.py" else os.environ
    command = [sys.executable, "-X", "importtime", ROOT / script, "--output-path", "/nowhere", *words]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    *imported, last = done.stderr.splitlines()
    assert done.returncode == 2, last
    assert any(word in last for word in ("foo", "code", "--ratios", "ollama")), last
    assert not {line.rsplit("|", 1)[-1].strip() for line in imported} & {"torch", "transformers"}
