"""What is judged, against what, and whether that has been done already; decided before anything heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune import VERSION, metadata
from moeprune.checking.builtin import BUILTIN
from moeprune.checkpoint import folder as checkpoints
from moeprune.errors import InputError
from moeprune.results import CUT, FILES, SCORES, is_model, newest_model
from moeprune.settings import FIELDS, Settings

RECIPES = (CUT, SCORES)  # results in the pruned folder that know the plan; the strongest first
# Settings that change neither a number nor a verdict, or that are digested by content.
IRRELEVANT = {"model_path", "output_path", "pruned_output_path", "evaluation_path", "force", "hidden_memory"}
IRRELEVANT |= {"hf_token", "endpoint_key", "concurrency", "request_timeout", "attempts"}
SHAPING = [f.name for f in FIELDS if "test" in f.metadata["stages"] and f.name not in IRRELEVANT]


@dataclass(frozen=True)
class Case:
    """The two models and the plan between them."""

    pruned: Path
    parent: Path | None
    keep: dict[str, list[int]] | None
    why_no_parent: str = ""


def find(settings: Settings) -> Case:
    """The pruned folder (named, or the newest in the output folder), its parent and its plan."""
    pruned = Path(settings.pruned_output_path) if settings.pruned_output_path else newest_model(settings.output_path)
    if not is_model(pruned):
        raise InputError(
            f"no pruned model at {pruned}; run ./run.sh prune first, or name a folder with --pruned-output-path"
        )
    checkpoints.check_outside(pruned, settings.output_path)
    recipes = [_recipe(pruned / FILES[kind], kind) for kind in RECIPES]
    keep = next((found for recipe in recipes if (found := plan_of(recipe))), None)
    paths = [recipe.get("inputs", {}).get("model", {}).get("path", "") for recipe in recipes]
    named = settings.model_path or next(filter(None, paths), "")
    if not named:
        return Case(pruned, None, keep, "no parent is known; pass --model-path")
    try:
        parent = checkpoints.locate_model(named, settings.hf_token)
    except InputError as error:
        if settings.model_path:
            raise
        return Case(pruned, None, keep, str(error))
    checkpoints.check_outside(parent, settings.output_path)
    return Case(pruned, parent, keep)


def plan_of(recipe: dict[str, Any]) -> dict[str, list[int]] | None:
    """Block -> experts that stayed, from either kind of recipe."""
    keep = recipe.get("keep") or (recipe.get("plan") or {}).get("keep")
    return keep if isinstance(keep, dict) else None


def _recipe(path: Path, kind: str) -> dict[str, Any]:
    return metadata.read_result(path, kind) if path.is_file() else {}


def fingerprint(case: Case | None, settings: Settings) -> str:
    """Over both models, the held-out data and every setting that can change a number or a verdict."""
    parts: list[str | Path] = [VERSION, *(str(getattr(settings, name)) for name in SHAPING)]
    if case is not None:
        folders = [folder for folder in (case.pruned, case.parent) if folder]
        parts += [checkpoints.open_checkpoint(folder).fingerprint for folder in folders]
        parts.append(json.dumps(case.keep))
    held_out = settings.evaluation_path
    if held_out and not Path(held_out).is_file():
        raise InputError(f"held-out data not found at {held_out}; give a .jsonl file in REAP_EVALUATION_PATH")
    return metadata.digest(*parts, Path(held_out) if held_out else json.dumps(BUILTIN))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files that belong to the checkpoint; copies of it beside them do not count."""
    return sum(shard.stat().st_size for shard in checkpoints.open_checkpoint(folder).shards)
