"""Every place that repeats a table of the code, made from the table.

`python tests/contracts/documents.py` rewrites them; test_documents.py compares.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for use as a program

from moeprune.planning.saliency import METRICS  # noqa: E402
from moeprune.scoring.calibration.presets import PRESETS  # noqa: E402
from moeprune.scoring.calibration.samples import COLUMN_NAMES  # noqa: E402
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
        text = f.metadata["help"].replace("|", "\\|").replace("](", "\\](")  # no cell's end, no link
        rows.append(f"| `{env_name(f)}` | {flag} | {steps or 'run.sh'} | {default} | {text} |")
    return "\n".join(rows) + "\n"


def columns_table() -> str:
    """What a column of calibration data can be."""
    rows = ["| what | columns, the surest first |", "|---|---|"]
    rows += [f"| {kind} | {', '.join(f'`{name}`' for name in names)} |" for kind, names in COLUMN_NAMES.items()]
    return "\n".join(rows) + "\n"


def presets_table() -> str:
    """The named recipes."""
    rows = ["| preset | for | data | samples | tokens each |", "|---|---|---|---|---|"]
    for name, preset in PRESETS.items():
        packed = ", packed" if preset.packing else " at most"
        data = preset.spec.replace(",", ", ")
        row = (f"`{name}`", preset.about, data, f"{preset.max_samples:,}", f"{preset.max_seq_len:,}{packed}")
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows) + "\n"


def metrics_table() -> str:
    """How each metric ranks experts."""
    rows = ["| `--metric` | an expert's score |", "|---|---|"]
    rows += [f"| `{name}` | {metric.formula.replace('|', chr(92) + '|')} |" for name, metric in METRICS.items()]
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


# Part of a document: its file, the marks around it, and what makes it.
PARTS: dict[str, tuple[str, tuple[str, str], Callable[[], str]]] = {
    "compose": ("docker-compose.yml", ("# settings, by name", "# end of settings"), compose_names),
    "settings": ("README.md", ("<!-- settings -->", "<!-- end of settings -->"), readme_table),
    "columns": ("docs/calibration.md", ("<!-- columns -->", "<!-- end of columns -->"), columns_table),
    "presets": ("docs/calibration.md", ("<!-- presets -->", "<!-- end of presets -->"), presets_table),
    "metrics": ("docs/calibration.md", ("<!-- metrics -->", "<!-- end of metrics -->"), metrics_table),
}


def main() -> None:
    """Rewrite every document."""
    (ROOT / ".env.example").write_text(env_example(), encoding="utf-8")
    COMMAND_LINE.write_text(command_lines(), encoding="utf-8")
    for name, marks, make in PARTS.values():
        path = ROOT / name
        head, _, tail = between(path.read_text(encoding="utf-8"), *marks)
        path.write_text(head + make() + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
