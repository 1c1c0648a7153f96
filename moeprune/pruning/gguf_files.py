"""The files of a pruned GGUF model: as many as before, each with its own keys and a new count of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeprune.checkpoint import gguf, writer
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.headers import Tensor
from moeprune.pruning import rewrite


def new_files(checkpoint: Checkpoint, done: Sequence[rewrite.Action], kept: int, stem: str) -> list[writer.NewFile]:
    """One new file for each of the parent's; `stem` begins their names."""
    changes = {f"{checkpoint.config['general.architecture']}.expert_count": kept}
    changes["split.tensors.count"] = sum(action.kind != "drop" for action in done)
    count = len(checkpoint.shards)
    files = []
    for number, shard in enumerate(checkpoint.shards, start=1):
        staying = [action for action in done if action.tensor.file == shard and action.kind != "drop"]
        head, _ = gguf.new_header(before := gguf.read_header(shard), changes, [_described(a, shard) for a in staying])
        name = f"{stem}.gguf" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.gguf"
        files.append(writer.NewFile(name, head, tuple(map(rewrite.entry, staying)), alignment=before.alignment))
    return files


def _described(action: rewrite.Action, shard: Path) -> Tensor:
    return Tensor(action.name, action.tensor.dtype, action.shape, shard, 0, action.nbytes)
