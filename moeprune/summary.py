"""The last lines of `./run.sh demo`: what got smaller, what it cost and where everything lies; from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moeprune import console, errors, metadata
from moeprune.errors import UsageError
from moeprune.results import FILES, SCORES, VERDICT

SHOWN = {
    FILES[SCORES]: "the scores of all experts",
    FILES[VERDICT]: "every number of the judge",
    "report.html": "the same for reading, with pictures",
}


def main(argv: list[str]) -> None:
    """Print the summary of the output folder that is named."""
    if len(argv) != 1:
        raise UsageError("name one output folder")
    for line in lines(Path(argv[0])):
        console.say(line)


def lines(folder: Path) -> Iterator[str]:
    """The summary, line by line."""
    report = metadata.read_result(folder / FILES[VERDICT], VERDICT)
    pruned, parent = report["inputs"]["pruned"], report["inputs"]["parent"]
    yield ""
    yield f"size     {console.size(parent['bytes'])} -> {console.size(pruned['bytes'])}"
    losses, _, counts = report["summary"].rpartition("; ")
    yield f"verdict  {report['verdict']}, {losses or counts}"
    if losses:
        yield f"         {counts}"
    yield f"model    {pruned['path']}"
    for name, meaning in SHOWN.items():
        if (folder / name).exists():
            yield f"         {folder / name}: {meaning}"


if __name__ == "__main__":
    errors.run(main)
