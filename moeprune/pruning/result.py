"""The result as a whole: its name, its files, what is printed before it is made, and the small files in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune import VERSION, metadata
from moeprune.checkpoint import families, formats, writer
from moeprune.checkpoint.families import Layout
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.renumber import Renumbering
from moeprune.console import say, size, warn, warnings
from moeprune.errors import UsageError
from moeprune.pruning import gguf_files, rewrite
from moeprune.pruning.choice import Choice
from moeprune.pruning.verify import Verification
from moeprune.pruning.verify_gguf import GgufVerification
from moeprune.results import CUT, FILES, SCORES
from moeprune.settings import Settings

MANIFEST = FILES[CUT]  # in the result: what it was made from, and how
OUR_FILES = {MANIFEST, FILES[SCORES], writer.INDEX}
BASE_MEMORY = 60_000_000  # bytes; the interpreter, numpy and one buffer
MEMORY_PER_TENSOR = 2_700  # bytes; measured on 90,000 tensors: headers, actions and their proof


@dataclass(frozen=True)
class Result:
    """Everything about the folder that is to be made, before a byte of it is written."""

    settings: Settings
    checkpoint: Checkpoint
    layout: Layout
    choice: Choice
    gone: frozenset[str]
    actions: tuple[rewrite.Action, ...]
    files: tuple[writer.NewFile, ...]
    edited: Mapping[str, Mapping[str, Any]]  # new contents of JSON files, by relative path
    target: Path
    fingerprint: str

    @property
    def bytes_before(self) -> int:
        """The weight files of the parent."""
        return sum(shard.stat().st_size for shard in self.checkpoint.shards)

    @property
    def bytes_after(self) -> int:
        """The weight files of the result."""
        return sum(file.nbytes for file in self.files)

    @property
    def bytes_beside(self) -> int:
        """What is carried along."""
        return sum((self.checkpoint.folder / path).stat().st_size for path in self.checkpoint.side_files)

    def is_current(self) -> bool:
        """Whether the folder is there, made from exactly these inputs, with weights of the right size."""
        same = metadata.is_current(self.target / MANIFEST, CUT, self.fingerprint)
        return same and all(_size(self.target / file.name) == file.nbytes for file in self.files)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def plan(settings: Settings, checkpoint: Checkpoint, layout: Layout, choice: Choice, gone: frozenset[str]) -> Result:
    """Work out the whole result; nothing is written. Blocks that are `gone` are no longer in the layout."""
    done = rewrite.actions(checkpoint, layout, choice.keep, gone)
    target = target_of(settings, checkpoint, layout, choice.count)
    files: Sequence[writer.NewFile]
    edited: dict[str, dict[str, Any]] = {}
    if checkpoint.container == "gguf":
        files = gguf_files.new_files(checkpoint, done, choice.count, target.name, bool(gone))
    else:
        files, edited = _safetensors(checkpoint, layout, choice, done, gone)
    keep = json.dumps({block: choice.keep[block] for block in sorted(choice.keep)})
    return Result(
        settings=settings,
        checkpoint=checkpoint,
        layout=layout,
        choice=choice,
        gone=gone,
        actions=done,
        files=tuple(files),
        edited=edited,
        target=target,
        fingerprint=metadata.digest(VERSION, checkpoint.fingerprint, keep, json.dumps(sorted(gone)), choice.source),
    )


def _safetensors(
    checkpoint: Checkpoint, layout: Layout, choice: Choice, done: tuple[rewrite.Action, ...], gone: frozenset[str]
) -> tuple[Sequence[writer.NewFile], dict[str, dict[str, Any]]]:
    """The weight files, and the JSON files whose counts and names of experts have to follow."""
    renumbering = Renumbering(checkpoint, layout, choice.keep)
    metadata_of = {shard: renumbering.metadata(about) for shard, about in checkpoint.shard_metadata.items()}
    config = renumbering.config(families.updated_config(checkpoint, layout, choice.count))
    config = families.config_without_mtp(config) if gone else config
    return rewrite.new_files(checkpoint, done, metadata_of), renumbering.side_files() | {"config.json": config}


def proof(planned: Result, folder: Path) -> Verification:
    """The comparison of what is written to `folder` with the parent."""
    keep = dict(planned.choice.keep)
    if planned.checkpoint.container == "gguf":
        return GgufVerification(planned.checkpoint.shards, folder, keep, planned.gone)
    return Verification(planned.checkpoint.folder, folder, keep, planned.gone)


def target_of(settings: Settings, checkpoint: Checkpoint, layout: Layout, kept: int) -> Path:
    """The folder of the result: as asked, else named after the model and the counts."""
    if settings.pruned_output_path:
        return Path(settings.pruned_output_path).expanduser()
    return settings.output_path / f"{_name_of_model(settings, checkpoint)}-reap-{kept}of{layout.experts}"


def _name_of_model(settings: Settings, checkpoint: Checkpoint) -> str:
    """The last part of a hub id, the stem of a GGUF file, or the folder's name; a hub cache names folders by hash."""
    folder = checkpoint.folder
    if checkpoint.container == "gguf":
        return checkpoint.shards[0].stem.partition("-00001-of-")[0]
    if not Path(settings.model_path).expanduser().exists():
        return settings.model_path.partition("@")[0].split("/")[-1]
    return folder.parent.parent.name.split("--")[-1] if folder.parent.name == "snapshots" else folder.name


def check_place(planned: Result) -> None:
    """Refuse a target that holds the model, or lies in it."""
    target, parent = planned.target.resolve(), planned.checkpoint.folder
    inside = parent in target.parents and planned.checkpoint.container == "safetensors"
    if inside or target == parent or target in parent.parents:
        raise UsageError(f"{planned.target} is the model itself, or one lies inside the other; choose another folder")


def check_target(planned: Result, force: bool) -> None:
    """Refuse a target that is in use for something else, or a disk that is too small."""
    target = planned.target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        ours = (target / MANIFEST).is_file()
        if not ours:
            raise UsageError(
                f"{planned.target} exists and was not made by this tool; choose another folder or remove it"
            )
        if not force:
            raise UsageError(
                f"{planned.target} holds another result; pass --force to replace it, or choose another folder"
            )
    writer.check_room(target, planned.bytes_after + planned.bytes_beside)


def needs(planned: Result) -> dict[str, int]:
    """What the cut takes of the machine, in bytes."""
    memory = BASE_MEMORY + MEMORY_PER_TENSOR * len(planned.actions)
    return {"disk_bytes": planned.bytes_after + planned.bytes_beside, "memory_bytes": memory}


def prediction(planned: Result) -> dict[str, Any]:
    """What a dry run prints for programs."""
    return {
        "target": str(planned.target),
        "experts": planned.layout.experts,
        "kept": planned.choice.count,
        "before_bytes": planned.bytes_before,
        "after_bytes": planned.bytes_after,
        "actions": rewrite.counts(planned.actions),
        **needs(planned),
    }


def describe(planned: Result) -> None:
    """What is going to happen, for a person."""
    before, after, needed = planned.bytes_before, planned.bytes_after, needs(planned)
    for note in planned.choice.notes:
        say(note)
    for text in planned.choice.warnings:
        warn(text)
    counts = rewrite.counts(planned.actions)
    checkpoint = planned.checkpoint
    say(f"model    {checkpoint.place} ({planned.layout.model_type}, {formats.format_of(checkpoint)})")
    say(
        f"plan     {planned.choice.count} of {planned.layout.experts} experts kept in {len(planned.choice.keep)} layers"
    )
    say(f"size     {size(before)} -> {size(after)} ({after / before:.1%})")
    if planned.choice.count == planned.layout.experts:
        warn("no expert is removed: the result is a copy; --prune-ratio, --keep or --target-size says how much smaller")
    say(f"tensors  {', '.join(f'{kind} {n}' for kind, n in counts.items())}; {len(planned.actions)} in all")
    say(f"needs    {size(needed['disk_bytes'])} of disk, about {size(needed['memory_bytes'])} of memory")
    say(f"result   {planned.target}")


def write_small_files(planned: Result, folder: Path) -> None:
    """Everything but the weights, synced: edited where it counts or names experts, else carried along as it is."""
    checkpoint, edited = planned.checkpoint, planned.edited
    for path in checkpoint.side_files:
        if path.as_posix() not in OUR_FILES and path.as_posix() not in edited:
            writer.copy_side_file(checkpoint.folder / path, folder / path)
    for name, data in edited.items():
        original = (checkpoint.folder / name).read_text(encoding="utf-8")
        writer.write_text(folder / name, json_like(original, data))
    if checkpoint.index is not None:
        elements = sum(math.prod(action.tensor.shape) for action in planned.actions)
        writer.write_text(folder / writer.INDEX, writer.index_text(planned.files, checkpoint.index, elements))
    if planned.choice.source.name == FILES[SCORES]:
        writer.copy_side_file(planned.choice.source, folder / FILES[SCORES])
    with writer.explained(folder / MANIFEST):
        metadata.write_json(folder / MANIFEST, manifest(planned))


def json_like(original: str, data: Mapping[str, Any]) -> str:
    """JSON written as the original is: its indentation, its way with letters beyond ASCII, its last line break."""
    second = original.split("\n", 2)[1] if "\n" in original else ""
    indent = len(second) - len(second.lstrip(" ")) or None
    text = json.dumps(data, indent=indent, ensure_ascii=original.isascii())
    return text + ("\n" if original.endswith("\n") else "")


def manifest(planned: Result) -> dict[str, Any]:
    """What the result was made from and how; its `keep` is a plan that --plan takes."""
    return metadata.header(CUT) | {
        "settings": planned.settings.public(),
        "inputs": {
            "fingerprint": planned.fingerprint,
            "model": {"path": str(planned.checkpoint.place), "fingerprint": planned.checkpoint.fingerprint},
            "plan": {"path": str(planned.choice.source), "sha256": metadata.digest(planned.choice.source)},
        },
        "model_type": planned.layout.model_type,
        "format": formats.format_of(planned.checkpoint),
        "experts": planned.layout.experts,
        "kept": planned.choice.count,
        "actions": rewrite.counts(planned.actions),
        "before_bytes": planned.bytes_before,
        "after_bytes": planned.bytes_after,
        "keep": {block: list(ids) for block, ids in planned.choice.keep.items()},
        "warnings": warnings(),
    }
