"""For every test: a stage is a process of its own, so what one test warned of is nothing to the next."""

import pytest

from moeprune import console


@pytest.fixture(autouse=True)
def no_warnings_yet():
    console._warnings.clear()
