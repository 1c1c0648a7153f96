"""What is tracked: small, and free of the machine that it was made on."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.contracts.documents import ROOT

LIMIT, DEMO_LIMIT, TOTAL_LIMIT = 1_000_000, 10_000_000, 20_000_000
PRIVATE = re.compile(rb"/work/|/root/|/opt/(?:wheels|pypi)|/tmp/contracts|pypi\.org|pythonhosted|download\.pytorch")


@pytest.fixture(scope="module")
def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_files_are_small(tracked):
    sizes = {path: path.stat().st_size for path in tracked}
    demo = {path for path in tracked if path.is_relative_to(ROOT / "demo" / "model")}
    assert {path: size for path, size in sizes.items() if size > LIMIT and path not in demo} == {}
    assert sum(sizes[path] for path in demo) <= DEMO_LIMIT
    assert sum(sizes.values()) <= TOTAL_LIMIT


def test_nothing_names_the_machine_it_was_made_on(tracked):
    assert [path for path in tracked if path.name != "test_tree.py" and PRIVATE.search(path.read_bytes())] == []


def test_no_secret_and_no_result_is_tracked(tracked):
    assert [path for path in tracked if path.name == ".env" or path.parent == ROOT / "output"] == [
        ROOT / "output" / ".gitkeep"
    ]
