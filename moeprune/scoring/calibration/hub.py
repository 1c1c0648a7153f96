"""Data sets of the Hugging Face hub, streamed: known ones are mapped to prompt, answer, messages, tools or text.

TABLE REGISTRY: name -> domain, default subset and split, and the mapping of one row. Others work if their columns can
be guessed or are named. Tools stay the JSON text that they are: as Arrow structs, each would gain the fields of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from moeprune.errors import InputError, MachineError
from moeprune.scoring.calibration.readers import Rows, without_nulls

Row = Mapping[str, Any]

ANSWER_S = 20  # seconds that the hub has to answer the first question
SHUFFLE_BUFFER = 1_000  # rows held while streaming; the draw is random within this window and over the shards
STORY_REQUEST = "Write a creative story for this prompt."
CHOICES = "ABCDEFGHIJ"


def _pair(prompt: str, answer: str) -> Callable[[Row], Row]:
    return lambda row: {"prompt": row[prompt], "answer": row[answer]}


def _messages(column: str = "messages") -> Callable[[Row], Row]:
    return lambda row: {"messages": row[column]}


def _text(row: Row) -> Row:
    return {"text": row["text"]}


def _story(row: Row) -> Row:
    return {"prompt": f"{STORY_REQUEST}\n\n {row['prompt']}", "answer": row["body"]}


def _multiple_choice(row: Row) -> Row:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(CHOICES, row["choices"], strict=False))
    return {"prompt": f"{row['question']}\n{choices}", "answer": CHOICES[row["answer"]]}


def _function_calls(row: Row) -> Row:
    answers = json.loads(row["answers"]) if isinstance(row["answers"], str) else row["answers"]
    calls = [_numbered_call(number, call["name"], call["arguments"]) for number, call in enumerate(answers)]
    asked = {"role": "user", "content": row["query"]}
    return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": row["tools"]}


def _numbered_call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    """A call whose id is its number: random ids would enter the prompt of templates that print them."""
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def _trajectory(row: Row) -> Row:
    raw = json.loads(row["messages"]) if isinstance(row["messages"], str) else row["messages"]
    messages: list[dict[str, Any]] = []
    calls = 0
    for message in raw:
        made = {"role": message["role"], "content": _flat_content(message.get("content"))}
        if message.get("tool_calls"):
            functions = [call["function"] for call in message["tool_calls"]]
            made["tool_calls"] = [
                _numbered_call(calls + i, function["name"], function["arguments"])
                for i, function in enumerate(functions)
            ]
            calls += len(functions)
        messages.append(made)
    return {"messages": messages, "tools": AGENT_TOOLS}


def _flat_content(content: Any) -> str:
    """Text of a message: nothing is "", text parts are kept, other parts are written as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    return "\n".join(
        str(part["text"]) if isinstance(part, Mapping) and "text" in part else json.dumps(part, sort_keys=True)
        for part in parts
    )


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# The tools that the agents of the trajectories had.
AGENT_TOOLS = json.dumps(
    [
        _tool(
            "bash",
            "Run a command in a shell.",
            {"command": {"type": "string", "description": "The command."}},
            ["command"],
        ),
        _tool(
            "str_replace_editor",
            "View, create and edit files.",
            {
                "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert", "undo_edit"]},
                "path": {"type": "string", "description": "Absolute path of the file or folder."},
                "file_text": {"type": "string", "description": "Content of the file to create."},
                "old_str": {"type": "string", "description": "Text to replace; it must occur once."},
                "new_str": {"type": "string", "description": "The new text."},
                "insert_line": {"type": "integer", "description": "Line after which the new text goes."},
                "view_range": {
                    "type": "array",
                    "items": {"type": "integer"},
                    "description": "First and last line to show.",
                },
            },
            ["command", "path"],
        ),
        _tool("_state_anthropic", "Report the state of the environment.", {}, []),
        _tool("submit", "Submit the changes and end the task.", {}, []),
    ]
)


@dataclass(frozen=True)
class DataSet:
    """How one data set is read."""

    domain: str
    convert: Callable[[Row], Row] | None
    subset: str | None = None
    split: str = "train"
    files: str | None = None  # only this file of the data set


REGISTRY: dict[str, DataSet] = {
    "theblackcat102/evol-codealpaca-v1": DataSet("code", _pair("instruction", "output")),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": DataSet("code", _pair("instruction", "response")),
    "m-a-p/CodeFeedback-Filtered-Instruction": DataSet("code", _pair("query", "answer")),
    "allenai/c4": DataSet("web", _text, files="en/c4-train.00000-of-01024.json.gz"),
    "euclaise/WritingPrompts_curated": DataSet("writing", _story),
    "allenai/tulu-3-sft-personas-math": DataSet("maths", _messages()),
    "allenai/tulu-3-sft-mixture": DataSet("chat", _messages()),
    "AI-MO/NuminaMath-CoT": DataSet("maths", _messages()),
    "allenai/WildChat-1M": DataSet("chat", _messages("conversation")),
    "CohereLabs/aya_dataset": DataSet("languages", _pair("inputs", "targets")),
    "cais/mmlu": DataSet("knowledge", _multiple_choice, subset="all", split="auxiliary_train"),
    "open-r1/Mixture-of-Thoughts": DataSet("reasoning", _messages(), subset="all"),
    "Salesforce/xlam-function-calling-60k": DataSet("tools", _function_calls),
    "SWE-bench/SWE-smith-trajectories": DataSet("agent", _trajectory, split="tool"),
}


def domain_of(name: str, subset: str | None) -> str:
    """The domain of a data set's samples: a subset that was asked for names it more closely."""
    known = REGISTRY.get(name)
    return subset or (known.domain if known else name.split("/")[-1])


def stream(name: str, subset: str | None, split: str | None, seed: int, token: str) -> Rows:
    """Rows of a data set in the columns of this project, without downloading the whole of it."""
    try:
        import datasets
    except ImportError:
        raise MachineError(f"{name}: data sets of the hub need the package datasets; install it") from None
    _ask_once(name, token)
    known = REGISTRY.get(name, DataSet(name, None))
    try:
        rows = datasets.load_dataset(
            name,
            subset or known.subset,
            data_files=known.files if subset is None else None,
            split=split or known.split,
            streaming=True,
            token=token or None,
        )
        for index, row in enumerate(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)):
            yield f"{name}[{index}]", convert(name, row)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"{name}: {error}; check the name, and HF_TOKEN if the data set is gated") from None
    except ConnectionError as error:
        raise _unreachable(name, error) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {error}; the subset goes in [ ], the split in ( )") from None


def _ask_once(name: str, token: str) -> None:
    """Whether the hub answers and knows the data set: `datasets` would ask for a minute where nobody answers."""
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or Path(name).is_dir():  # `datasets` then looks into its cache, or into the folder
        return
    # The library lets errors of its HTTP client through, which is another package in each of its releases.
    transport = import_module(type(get_session()).__module__.partition(".")[0])
    try:
        HfApi(token=token or None).dataset_info(name, timeout=ANSWER_S)
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: no such data set on the hub; check the name, set HF_TOKEN if it is private, or give a local file"
        ) from None
    except (HfHubHTTPError, transport.HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> MachineError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MachineError(
        f"{name}: the hub cannot be reached ({reason}); give a local file, or nothing for the built-in set"
    )


def convert(name: str, row: Row) -> Row:
    """One row in the columns of this project; the nulls that Arrow filled in are taken out."""
    clean = {key: without_nulls(value) for key, value in row.items()}
    known = REGISTRY.get(name)
    if known is None or known.convert is None:
        return clean
    try:
        return known.convert(clean)
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{name}: a row is not as expected ({type(error).__name__}: {error}); its columns: {list(row)}"
        ) from None
