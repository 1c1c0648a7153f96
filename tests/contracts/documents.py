"""Every place that repeats the table of settings, made from the table.

`python tests/contracts/documents.py` rewrites them; test_documents.py compares.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for use as a program

from moeprune.settings import FIELDS, STAGES, env_name, flag_name, shown_default  # noqa: E402

COMMAND_LINE = Path(__file__).with_name("command_line.txt")
SCRIPTS = (
    "plan.py",
    "reap.py",
    "preview.py",
    "prune_model.py",
    "test_pruned_model.py",
    "combine.py",
    "serve.py",
    "batch.py",
)

ENV_START = """\
# Copy to .env and take the # away from what you want to change; what is shown is the default.
# One NAME=value in a line, without quotes, spaces, $ or a comment behind it. Flags and the environment beat this file.
"""


def passed_to_steps() -> list[str]:
    """The names that matter inside the container; those of run.sh itself do not."""
    return [env_name(f) for f in FIELDS if f.metadata["stages"] != {"run"}]


def env_example() -> str:
    """The text of .env.example."""
    entries = [f"# {f.metadata['help']}\n#{env_name(f)}={shown_default(f)}\n" for f in FIELDS]
    return "\n".join([ENV_START, *entries])


def compose_names() -> str:
    """The entries under `environment` in docker-compose.yml."""
    return "".join(f"    - {name}\n" for name in passed_to_steps())


def readme_table() -> str:
    """The rows of the README's table of settings."""
    rows = ["| in .env | flag | steps | default | meaning |", "|---|---|---|---|---|"]
    for f in FIELDS:
        steps = ", ".join(stage for stage in STAGES if stage in f.metadata["stages"])
        flag = f"`{flag_name(f)}`" if steps and not f.metadata["secret"] else ""
        default = f"`{shown_default(f)}`" if shown_default(f) else ""
        text = f.metadata["help"].replace("|", "\\|")
        rows.append(f"| `{env_name(f)}` | {flag} | {steps or 'run.sh'} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def command_lines() -> str:
    """What each script really accepts, from its own --help."""
    running = {
        name: subprocess.Popen([sys.executable, name, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in SCRIPTS
        if (ROOT / name).exists()
    }
    parts = []
    for name, process in running.items():
        text, _ = process.communicate()
        flags = sorted(set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)))
        parts.append("\n  ".join([name, *flags]))
    return "\n".join(parts) + "\n"


def between(text: str, start: str, end: str) -> tuple[str, str, str]:
    """The text up to the line with the start mark, the lines between the marks, and the rest."""
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if start in line) + 1
    last = next(i for i, line in enumerate(lines) if end in line)
    return "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])


COMPOSE_MARKS = ("# settings, by name", "# end of settings")
README_MARKS = ("<!-- settings -->", "<!-- end of settings -->")


def main() -> None:
    """Rewrite every document."""
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")
    COMMAND_LINE.write_text(command_lines(), encoding="utf-8")
    for name, marks, content in (
        ("docker-compose.yml", COMPOSE_MARKS, compose_names()),
        ("README.md", README_MARKS, readme_table()),
    ):
        path = ROOT / name
        head, _, tail = between(path.read_text(encoding="utf-8"), *marks)
        path.write_text(head + content + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
