"""The files of a pruned GGUF model: as many as before, each with its own keys and other counts in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moeprune.checkpoint import gguf, gguf_layout, writer
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.headers import Tensor
from moeprune.pruning import rewrite


def new_files(
    checkpoint: Checkpoint, done: Sequence[rewrite.Action], kept: int, stem: str, without_mtp: bool
) -> list[writer.NewFile]:
    """One new file for each of the parent's; `stem` begins their names."""
    counts = {f"{checkpoint.config['general.architecture']}.expert_count": kept}
    counts["split.tensors.count"] = sum(action.kind != "drop" for action in done)
    count = len(checkpoint.shards)
    files = []
    for number, shard in enumerate(checkpoint.shards, start=1):
        staying = [action for action in done if action.tensor.file == shard and action.kind != "drop"]
        before = gguf.read_header(shard)
        changes = {key: gguf.with_number(before.entries[key], counts[key]) for key in counts if key in before.entries}
        changes |= _shorter(before, checkpoint) if without_mtp else {}
        head, _ = gguf.new_header(before, changes, [_described(action, shard) for action in staying])
        name = f"{stem}.gguf" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.gguf"
        files.append(writer.NewFile(name, head, tuple(map(rewrite.entry, staying)), alignment=before.alignment))
    return files


def _shorter(header: gguf.Header, checkpoint: Checkpoint) -> dict[str, bytes]:
    """The keys of a model without the layers behind its trunk, lists with one number for each layer among them."""
    prefix, trunk = f"{checkpoint.config['general.architecture']}.", gguf_layout.trunk_of(checkpoint.config)
    layers = gguf_layout.counts(checkpoint.config, "block_count")
    new = {f"{prefix}block_count": trunk, f"{prefix}nextn_predict_layers": 0}
    lists = [
        key
        for key, entry in header.entries.items()
        if key.startswith(prefix) and gguf.length(entry) == layers and gguf.numbers(entry)
    ]
    changes = {key: gguf.shortened(header.entries[key], trunk) for key in lists}
    return changes | {key: gguf.with_number(header.entries[key], new[key]) for key in new if key in header.entries}


def _described(action: rewrite.Action, shard: Path) -> Tensor:
    return Tensor(action.name, action.tensor.dtype, action.shape, shard, 0, action.nbytes)
