"""One calibration sample, and how a row of any data set becomes one: columns are guessed from their names or named."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeprune.errors import InputError, UsageError

Row = Mapping[str, Any]

# What a column can be, and the names it usually has, the surest first.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "chat", "dialogue", "turns"),
    "prompt": ("prompt", "instruction", "question", "query", "user", "input", "problem"),
    "context": ("context", "input"),
    "answer": ("answer", "response", "output", "completion", "assistant", "solution", "reply"),
    "text": ("text", "content", "document", "body", "code", "passage", "article"),
    "tools": ("tools", "functions"),
    "system": ("system", "system_prompt"),
    "image": ("image", "images", "image_path"),
    "regions": ("regions",),
    "domain": ("domain",),
}
CONTENT = ("messages", "prompt", "text", "regions")  # a row needs one of these; the first found is taken
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}
MESSAGE_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")  # what templates read besides
REGIONS_REQUEST = "Find each of these regions in the image and give its bounding box:"


@dataclass(frozen=True)
class Sample:
    """One document: running text, or a chat. `tools` is JSON text, so that no schema is changed on the way."""

    domain: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: str | None = None
    images: tuple[Any, ...] = ()  # paths, or the bytes of an image file
    origin: str = ""  # file and line, for messages to a person
    as_prompt: bool = field(default=False)  # made from prompt and answer: without a chat template they are joined


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,answer=reply` as {"prompt": "question", "answer": "reply"}."""
    named: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        kind, _, column = part.partition("=")
        if kind not in COLUMN_NAMES or not column:
            raise UsageError(f"columns: {part!r}: write kind=column with a kind of {', '.join(COLUMN_NAMES)}")
        named[kind] = column
    return named


def find_columns(row: Row, named: Mapping[str, str], place: str) -> dict[str, str]:
    """Which column of this row plays which part. Named columns must be there; the others are guessed."""
    for kind, column in named.items():
        if column not in row and kind != "domain":
            raise InputError(f"{place}: no column {column!r} for {kind}; there are {_listed(row)}")
    found = guess_columns(row, named)
    if not found:
        raise InputError(
            f"{place}: no usable column among {_listed(row)}; "
            f"name one with --columns, such as text={next(iter(row), 'x')}"
        )
    return found


def guess_columns(row: Row, named: Mapping[str, str]) -> dict[str, str]:
    """Kind -> column, with one kind of content only; empty when no column can be content."""
    lower = {str(key).lower(): str(key) for key in row}
    found = {kind: column for kind, column in named.items() if column in row}
    taken = set(found.values())
    for kind, names in COLUMN_NAMES.items():
        guess = next((lower[name] for name in names if name in lower and lower[name] not in taken), None)
        if kind not in found and guess is not None:
            found[kind] = guess
            taken.add(guess)
    content = [kind for kind in CONTENT if kind in found]
    chosen = next((kind for kind in content if kind in named), next(iter(content), None))
    if chosen is None:
        return {}
    drop = {kind for kind in CONTENT if kind != chosen} | (set() if chosen == "prompt" else {"answer", "context"})
    return {kind: column for kind, column in found.items() if kind not in drop or kind in named}


def _listed(row: Row) -> str:
    return ", ".join(map(repr, list(row)[:12])) or "no columns at all"


def make_sample(row: Row, columns: Mapping[str, str], default_domain: str, place: str) -> Sample | None:
    """The sample in a row, or None when its content is empty."""
    values = {kind: row.get(column) for kind, column in columns.items()}
    domain = str(values.get("domain") or default_domain)
    images = _images(values.get("image"))
    tools = _tools(values.get("tools"), place)
    if values.get("messages"):
        messages, inside = _chat(values["messages"], place)
        chat = _with_system(values, messages)
        return Sample(domain, messages=chat, tools=tools, images=images + inside, origin=place) if messages else None
    if isinstance(values.get("regions"), list) and values["regions"]:
        request = "\n".join([REGIONS_REQUEST, *(f"- {region}" for region in values["regions"])])
        return Sample(domain, messages=({"role": "user", "content": request},), images=images, origin=place)
    if values.get("prompt"):
        return _from_prompt(values, Sample(domain, tools=tools, images=images, origin=place), place)
    if values.get("text"):
        text = _string(values["text"], columns["text"], place)
        if images:
            return Sample(domain, messages=({"role": "user", "content": text},), images=images, origin=place)
        return Sample(domain, text=text, origin=place)
    return None


def _from_prompt(values: Mapping[str, Any], base: Sample, place: str) -> Sample:
    asked = [_string(values[kind], kind, place) for kind in ("prompt", "context") if values.get(kind)]
    messages = [{"role": "user", "content": "\n\n".join(asked)}]
    if values.get("answer") is not None and values["answer"] != "":
        messages.append({"role": "assistant", "content": _string(values["answer"], "answer", place)})
    chat = _with_system(values, tuple(messages))
    return Sample(base.domain, None, chat, base.tools, base.images, base.origin, as_prompt=True)


def _with_system(values: Mapping[str, Any], messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if values.get("system") and messages and messages[0]["role"] != "system":
        return ({"role": "system", "content": str(values["system"])}, *messages)
    return messages


def _unusable(place: str, why: str) -> InputError:
    return InputError(f"{place}: {why}; mend or remove this sample")


def _string(value: Any, column: str, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise _unusable(place, f"{column!r} holds a {type(value).__name__}, not text")


def _tools(value: Any, place: str) -> str | None:
    """Tool schemas as JSON text: a string is kept to the letter, once it is known to parse."""
    if not value:
        return None
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _unusable(place, f"the tools are not valid JSON: {error}") from None
    if not isinstance(parsed, list):
        raise _unusable(place, f"the tools must be a JSON list, not a {type(parsed).__name__}")
    return value if parsed else None


def _chat(value: Any, place: str) -> tuple[tuple[dict[str, Any], ...], tuple[Any, ...]]:
    """Messages with the usual keys, and the images that they hold, in order."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _unusable(place, f"the messages are not valid JSON: {error}") from None
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise _unusable(place, "messages must be a list of objects with role and content")
    images: list[Any] = []
    return tuple(_message(message, images, place) for message in value), tuple(images)


def _message(raw: Mapping[str, Any], images: list[Any], place: str) -> dict[str, Any]:
    message = {str(key): value for key, value in raw.items() if value is not None}  # Arrow fills columns with nulls
    role = message.pop("role", None) or message.pop("from", None)
    if not isinstance(role, str):
        raise _unusable(place, "a message without a role")
    content = message.pop("content", message.pop("value", ""))
    calls = message.pop("tool_calls", None)
    known = {key: message[key] for key in MESSAGE_FIELDS if key in message}
    made = {"role": ROLES.get(role.lower(), role.lower()), "content": _content(content, images, place), **known}
    return made | ({"tool_calls": [_call(call, place) for call in calls]} if calls else {})


def _content(content: Any, images: list[Any], place: str) -> Any:
    """Text, or a list of parts when an image is among them; the images themselves go to `images`."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):  # the result of a tool
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, (list, tuple)):
        raise _unusable(place, "the content of a message must be text or a list of parts")
    parts = [_part(part, images, place) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: Any, images: list[Any], place: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
        url = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) and "url" in url else url
        if url is not None:  # without one, the image stands in the row's image column
            images.extend(_images(url))
        return {"type": "image"}
    raise _unusable(place, "a part of a message is neither text nor an image")


def _call(call: Any, place: str) -> dict[str, Any]:
    """A tool call with its function's arguments as an object, as chat templates expect them."""
    if not isinstance(call, Mapping):
        raise _unusable(place, "a tool call must be an object")
    nested = isinstance(call.get("function"), Mapping)
    function = dict(call["function"]) if nested else {key: call[key] for key in ("name", "arguments") if key in call}
    if not isinstance(function.get("name"), str):
        raise _unusable(place, "a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(json.JSONDecodeError, RecursionError):  # some traces hold broken calls; kept as text
            arguments = json.loads(arguments or "{}")
    made = {"type": "function", "function": {**function, "arguments": arguments}}
    return made | ({"id": call["id"]} if call.get("id") else {})


def _images(value: Any) -> tuple[Any, ...]:
    """Paths or bytes, from a path, a list of them, or the {"bytes", "path"} of image columns in parquet files."""
    if value is None or value == "":
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(image for item in value for image in _images(item))
    if isinstance(value, Mapping):
        return _images(value.get("bytes") or value.get("path"))
    return (value,)
