"""What repeats a table of the code agrees with it; `python tests/contracts/documents.py` mends a failure."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.contracts import documents
from tests.contracts.documents import ROOT

MEND = "run: .venv/bin/python tests/contracts/documents.py"


def test_env_example_lists_every_setting():
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == documents.env_example(), MEND


@pytest.mark.parametrize("part", documents.PARTS)
def test_generated_part_is_current(part):
    name, marks, make = documents.PARTS[part]
    _, middle, _ = documents.between((ROOT / name).read_text(encoding="utf-8"), *marks)
    assert middle == make(), MEND


def _anchors(text: str) -> set[str]:
    """The places in a page that a link can name, as hubs make them from headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    prose = re.sub(r"`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"))
    links = re.findall(r"(?<!\\)\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose)
    for name, anchor in links:
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert target.is_file(), name
        assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), (name, anchor)


def test_command_line_is_frozen():
    """A flag that appears or vanishes shows in a diff of command_line.txt."""
    assert documents.COMMAND_LINE.read_text(encoding="utf-8") == documents.command_lines(), MEND


def test_compose_passes_each_setting_to_both_services():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    for name in ("reap", "reap-cpu"):
        assert set(documents.passed_to_steps()) <= set(services[name]["environment"]), name
    assert "deploy" in services["reap"]
    assert "deploy" not in services["reap-cpu"]
