"""Prompts from a file or a folder: txt and md (a file is a prompt), json (one, or a list of them), jsonl (one a line).

A prompt is a text, {"prompt": ...} or {"messages": [...]}; "id" names it, "images" lists files beside it.
"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import InputError

TEXTS, ENDINGS = {".txt", ".md"}, {".txt", ".md", ".json", ".jsonl"}


@dataclass(frozen=True)
class Prompt:
    """One thing to ask."""

    id: str
    messages: tuple[dict[str, Any], ...]  # as the chat protocol has them; images are paths in "images"
    images: tuple[Path, ...] = ()

    @property
    def text(self) -> str | None:
        """The text alone, where the prompt is one user message without images."""
        if self.images or len(self.messages) != 1 or self.messages[0]["role"] != "user":
            return None
        content = self.messages[0]["content"]
        return content if isinstance(content, str) else None

    def chat(self) -> list[dict[str, Any]]:
        """Messages for the server, the images inside the last one."""
        messages = [dict(message) for message in self.messages]
        if self.images:
            parts = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in self.images]
            content = messages[-1]["content"]
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            messages[-1]["content"] = parts + texts
        return messages


def load_prompts(path: Path) -> list[Prompt]:
    """Every prompt of a file or of the files in a folder, in order of name."""
    if not path.exists():
        raise InputError(f"no prompts at {path}; name a file or a folder with --prompts-path")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in ENDINGS and f.is_file())
    prompts = [prompt for file in files for prompt in _of_file(file, path.parent if path.is_file() else path)]
    if not prompts:
        raise InputError(f"{path} holds no prompts; it takes {', '.join(sorted(ENDINGS))}")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise InputError(f'{path}: two prompts have the id "{prompt.id}"; ids tell answers apart')
        seen.add(prompt.id)
    return prompts


def _of_file(file: Path, root: Path) -> Iterator[Prompt]:
    name = file.relative_to(root).as_posix()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text") from None
    if file.suffix in TEXTS:
        if text.strip():
            yield _prompt(text, name, file, name)
    elif file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _prompt(_json(line, f"{file}:{number}"), f"{name}:{number}", file, f"{file}:{number}")
    else:
        data = _json(text, str(file))
        entries = data if isinstance(data, list) else [data]
        for number, entry in enumerate(entries, start=1):
            yield _prompt(
                entry, f"{name}:{number}" if isinstance(data, list) else name, file, f"{file}: entry {number}"
            )


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _prompt(entry: Any, name: str, file: Path, where: str) -> Prompt:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise InputError(f'{where}: a prompt is a text, {{"prompt": ...}} or {{"messages": [...]}}')
    messages = entry.get("messages", [{"role": "user", "content": entry.get("prompt")}])
    _check_messages(messages, where)
    images = tuple(file.parent / image for image in entry.get("images", ()))
    for image in images:
        if not image.is_file():
            raise InputError(f"{where}: image {image} is not there")
    return Prompt(str(entry.get("id", name)), tuple(messages), images)


def _check_messages(messages: Any, where: str) -> None:
    sound = isinstance(messages, list) and messages
    if not sound or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise InputError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    if not isinstance(messages[-1].get("content"), str | list):
        raise InputError(f'{where}: the last message has no content; a prompt is a text, "prompt" or "messages"')


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
