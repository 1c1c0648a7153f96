"""The last lines of `./run.sh demo`: what got smaller, what it cost and where everything lies; from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    yield from _quality(report)
    yield f"verdict  {report['verdict']}: {report['summary'].partition(';')[0]}"
    yield f"model    {pruned['path']}"
    for name, meaning in SHOWN.items():
        if (folder / name).exists():
            yield f"         {folder / name}: {meaning}"


def _quality(report: dict[str, Any]) -> Iterator[str]:
    """Loss and same top token on held-out text; exact answers where there are some."""
    tokens = report.get("fidelity", {}).get("overall")
    if tokens:
        yield (
            f"quality  loss {tokens['parent_loss']:.2f} -> {tokens['loss']:.2f} nats per token; "
            f"{tokens['same_top']:.0%} of the most likely tokens stay the same"
        )
    right = report.get("generation", {}).get("rates", {}).get("correct", {})
    if right.get("parent") and right["parent"]["count"]:
        yield f"         right answers {right['parent']['rate']:.0%} -> {right['pruned']['rate']:.0%}"


if __name__ == "__main__":
    errors.run(main)
