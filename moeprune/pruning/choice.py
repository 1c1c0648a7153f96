"""Which experts stay: decided from the scores of stage 1, or read from a plan that was made elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeprune import metadata
from moeprune.checkpoint import families, gguf_layout
from moeprune.checkpoint.families import Block, Layout
from moeprune.checkpoint.folder import Checkpoint
from moeprune.console import warn
from moeprune.errors import InputError
from moeprune.planning import decision
from moeprune.planning.plan import Limits, check_count, make_plan
from moeprune.pruning.rewrite import Keep, check_groups, check_keep, check_runs
from moeprune.results import FILES, SCORES
from moeprune.settings import Settings


@dataclass(frozen=True)
class Choice:
    """The experts that stay in each block, where that came from, and what a person should know about it."""

    keep: Keep
    count: int
    source: Path  # the scores, or the plan
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def gone_tensors(settings: Settings, checkpoint: Checkpoint, layout: Layout) -> frozenset[str]:
    """The tensors that --drop-mtp removes."""
    if not settings.drop_mtp:
        return frozenset()
    gone = families.mtp_tensors(checkpoint, layout)
    if not gone:
        warn("--drop-mtp: the model has no layers that predict further tokens")
    return gone


def without(layout: Layout, gone: Collection[str]) -> Layout:
    """The layout without the blocks that leave as a whole."""
    return replace(layout, blocks=tuple(b for b in layout.blocks if b.parts[0].tensor not in gone))


def choose(settings: Settings, checkpoint: Checkpoint, layout: Layout, gone: Collection[str]) -> Choice:
    """The keep-lists of all blocks; those whose tensors are `gone` are no longer in the layout."""
    blocks = layout.blocks
    if settings.plan:
        choice = _from_plan(settings, layout, Limits.of(layout))
    else:
        leaving = sum(checkpoint.tensors[name].nbytes for name in gone)
        choice = _from_scores(settings, checkpoint, layout, leaving)
    check(choice.keep, blocks, layout)
    return choice


def check(keep: Keep, blocks: Sequence[Block], layout: Layout) -> None:
    """Refuse keep-lists that these blocks of the model cannot be cut to."""
    check_keep(blocks, keep)
    check_groups(blocks, keep, layout.groups)
    check_runs(blocks, keep, layout.run)


def _from_plan(settings: Settings, layout: Layout, limits: Limits) -> Choice:
    """A plan from a file; blocks of further-token layers that it does not name keep evenly spaced experts."""
    path = Path(settings.plan)
    keep = read_plan(path)
    count = len(next(iter(keep.values())))
    check_count(count, limits)
    suits = decision.choose_count(replace(settings, keep=count, target_size=0, origin={}), limits, layout.model_type)
    blind = {block.name: block.experts for block in layout.blocks if block.role != "trunk" and block.name not in keep}
    keep |= make_plan({}, count, limits, unscored=blind).keep
    return Choice(keep, count, path, suits.notes, suits.warnings)


def read_plan(path: Path) -> dict[str, tuple[int, ...]]:
    """Block -> experts that stay, from a file made by hand or a result that holds a plan."""
    data = metadata.read_json(path, "the plan")
    inner = data.get("plan")
    lists = data.get("keep", inner.get("keep") if isinstance(inner, dict) else None)
    if not isinstance(lists, dict) or not all(_are_numbers(ids) for ids in lists.values()) or not lists:
        raise InputError(
            f'{path} must hold {{"keep": {{"model.layers.0": [0, 3, 5], ...}}}}, a list of ids for each block'
        )
    return {block: tuple(ids) for block, ids in lists.items()}


def _are_numbers(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(i) is int for i in ids)


def _from_scores(settings: Settings, checkpoint: Checkpoint, layout: Layout, leaving_bytes: int) -> Choice:
    """The plan that the settings make of the sums of stage 1; `leaving_bytes` go whatever the plan is."""
    blocks = layout.blocks
    path = settings.output_path / FILES[SCORES]
    if not path.exists():
        raise InputError(f"no scores at {path}; run ./run.sh reap first, or give a plan with --plan")
    data = metadata.read_result(path, SCORES)
    _check_same_model(settings, checkpoint, data, path)
    sums = metadata.Sums.from_json(data.get("scores", {}))
    if checkpoint.container == "gguf":
        sums = _by_layer(sums, blocks)
    _check_same_blocks(sums, blocks, path)
    each = sum(bytes_per_expert(checkpoint, block) for block in blocks)
    whole = sum(shard.stat().st_size for shard in checkpoint.shards)  # headers are in it
    fixed = whole - leaving_bytes - each * layout.experts
    calibration = data["inputs"].get("calibration", {})
    model = decision.Model.of(layout)
    decided = decision.decide(settings, sums, model, calibration, fixed_bytes=fixed, bytes_per_expert=each)
    count = decided.choice
    wanted = {block.name for block in blocks}
    keep = {name: ids for name, ids in decided.plan.keep.items() if name in wanted}
    doubts = [] if decided.assessment.enough else decided.assessment.sentences()  # reap has said it all before
    return Choice(keep, count.count, path, (*count.notes, *decided.outcome.sentences(), *doubts), count.warnings)


def _by_layer(sums: metadata.Sums, blocks: Sequence[Block]) -> metadata.Sums:
    """The sums of the original under the names that its layers have in a GGUF file."""
    names = {old: new for new, old in gguf_layout.same_layers(blocks, [b.block for b in sums.blocks]).items()}
    return replace(sums, blocks=tuple(replace(b, block=names[b.block]) for b in sums.blocks if b.block in names))


def _check_same_model(settings: Settings, checkpoint: Checkpoint, data: dict[str, Any], path: Path) -> None:
    """Scores belong to one checkpoint; those of another copy are taken only when that is asked for."""
    scored = data.get("inputs", {}).get("model", {})
    if settings.other_scores or scored.get("fingerprint") == checkpoint.fingerprint:
        return
    if scored.get("path") == str(checkpoint.place):
        raise InputError(f"{checkpoint.place} has changed since it was scored ({path}); run ./run.sh reap on it again")
    raise InputError(
        f"the scores in {path} were made on another model ({scored.get('path', 'unknown')}) than "
        f"{checkpoint.place}; run ./run.sh reap on it, or pass --other-scores when it is a copy in another format"
    )


def _check_same_blocks(sums: metadata.Sums, blocks: Sequence[Block], path: Path) -> None:
    scored = {block.block: block.experts for block in sums.blocks}
    for block in blocks:
        if block.role == "trunk" and block.name not in scored:
            raise InputError(
                f"the scores in {path} lack {block.name}; they are of another model, so run ./run.sh reap on this one"
            )
        if scored.get(block.name, block.experts) != block.experts:
            raise InputError(
                f"the scores in {path} know {scored[block.name]} experts in {block.name}, the model has {block.experts}"
            )


def bytes_per_expert(checkpoint: Checkpoint, block: Block) -> int:
    """What one expert of a block takes, router rows included."""
    total = 0
    for part in block.parts:
        tensor = checkpoint.tensors[part.tensor]
        if part.kind == "expert":
            total += tensor.nbytes
        elif part.kind == "rows":
            total += tensor.nbytes // tensor.shape[part.axis] * part.rows_per_expert * block.experts // part.share
    return total // block.experts
