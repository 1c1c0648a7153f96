"""For every test: nothing of the person who runs it, and nothing of the test before."""

import os
from pathlib import Path

import pytest

from moeprune import console

ROOT = Path(__file__).resolve().parents[1]
FOR_THE_IMAGE = {"REAP_BASE_IMAGE", "REAP_TORCH_INDEX"}  # where the container tests may get theirs from


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_tester(tmp_path_factory):
    """Neither their environment nor the .env of the folder that they are in."""
    for name in [name for name in os.environ if name.startswith("REAP_") and name not in FOR_THE_IMAGE]:
        del os.environ[name]
    os.environ["PYTHONPATH"] = str(ROOT)  # for programs that a test starts
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_warnings_yet():
    """A stage is a process of its own, so what one test warned of is nothing to the next."""
    console._warnings.clear()
