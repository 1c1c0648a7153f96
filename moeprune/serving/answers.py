"""The file of answers: one JSON object in a line, on the disk before the next one counts; a re-run goes on there."""

from __future__ import annotations

import fcntl
import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from moeprune import console
from moeprune.errors import InputError, UsageError


class Answers:
    """Answers by id, appended and synced one at a time. One process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Answers:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another run is writing {self.path}; wait for it or name another --answers-path"
            ) from None
        self._drop_torn_line()
        self.done = read_answers(self.path)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, answer: dict[str, Any]) -> None:
        """Keep one more answer; it is on the disk when this returns."""
        assert self._file is not None, "use Answers in a with statement"
        self._file.write(json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[answer["id"]] = answer

    def _drop_torn_line(self) -> None:
        """A run that was killed while it wrote leaves half a line; that prompt is asked again."""
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by id; of two with the same id, the later one."""
    found = {}
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"no file of answers at {path}") from None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                answer = json.loads(line)
                found[answer["id"]] = answer
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}:{number} is not an answer of a batch; move the file away") from None
    return found


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers side by side</title><style>
:root {{ color-scheme: light dark }} body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 90rem;
padding: 0 1rem }} section {{ border-top: 1px solid #8888; padding: .5rem 0 }} .pair {{ display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)) }} pre {{ white-space: pre-wrap; overflow-wrap: anywhere;
margin: 0 }} small {{ opacity: .7 }}
</style><h1>Answers side by side</h1><p>{summary}</p>{sections}</html>
"""


def write_comparison(path: Path, ours: Mapping[str, dict[str, Any]], others: Mapping[str, dict[str, Any]]) -> str:
    """One page with both answers to each prompt that both files have; returns the summary."""
    both = [(answer, others[name]) for name, answer in ours.items() if name in others]
    same = sum(a["answer"] == b["answer"] for a, b in both)
    means = f"{_mean(both, 1)} -> {_mean(both, 0)}"
    summary = f"{len(both)} prompts in both files, {same} answers are the same; mean tokens {means}"
    sections = "".join(_section(a, b) for a, b in both)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(PAGE.format(summary=html.escape(summary), sections=sections), encoding="utf-8")
    partial.replace(path)
    console.say(summary)
    return summary


def _mean(both: list[tuple[dict[str, Any], dict[str, Any]]], side: int) -> str:
    counts = [pair[side]["completion_tokens"] for pair in both if pair[side].get("completion_tokens") is not None]
    return f"{sum(counts) / len(counts):.1f}" if counts else "unknown"


def _section(ours: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    prompt = "\n\n".join(f"{message['role']}: {message.get('content')}" for message in ours["messages"])
    pair = "".join(
        f"<div><small>{html.escape(str(answer['model']))}, {answer.get('completion_tokens')} tokens, "
        f"{html.escape(str(answer.get('finish_reason')))}</small><pre>{html.escape(answer['answer'])}</pre></div>"
        for answer in (other, ours)
    )
    title = f"<small>{html.escape(ours['id'])}</small><pre><b>{html.escape(prompt)}</b></pre>"
    return f'<section>{title}<div class="pair">{pair}</div></section>'
