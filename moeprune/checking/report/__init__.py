"""output/report.html: one page that holds everything, made from the JSON files alone; no network, no torch."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from moeprune import metadata
from moeprune.checking.report import after, before
from moeprune.checking.report.markup import Html, join, tag
from moeprune.metadata import sync
from moeprune.results import CUT, FILES, PREVIEW, SCORES, VERDICT

NAME = "report.html"
HERE = Path(__file__).parent


def write(output_path: Path) -> Path | None:
    """Write the page from whatever results lie in the folder; None when there are none."""
    proposed, test, preview = (_read(output_path, kind) for kind in (SCORES, VERDICT, PREVIEW))
    pruned = Path(str(test.get("inputs", {}).get("pruned", {}).get("path", "")))
    cut_from = _read(pruned, SCORES) if test else {}
    if proposed and test and _of_other_scores(proposed, cut_from, test):
        test, cut_from = {}, {}
    recipe = with_cut(cut_from or proposed, _read(pruned, CUT) if test else {})
    if recipe and preview and _model_path(recipe) != _model_path(preview):
        preview = {}
    if not (test or recipe or preview):
        return None
    target = output_path / NAME
    partial = target.with_name(NAME + ".partial")
    partial.write_text(page(recipe, preview, test), encoding="utf-8")
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    sync(output_path)
    return target


def _of_other_scores(proposed: dict[str, Any], cut_from: dict[str, Any], test: dict[str, Any]) -> bool:
    """Whether a verdict in the folder is older than its scores, and about a model that was cut from others."""
    same = cut_from.get("inputs", {}).get("fingerprint") == proposed["inputs"].get("fingerprint")
    return not same and str(proposed.get("created_at")) > str(test.get("created_at"))


def _model_path(result: dict[str, Any]) -> Any:
    return result.get("inputs", {}).get("model", {}).get("path")


def _read(folder: Path, kind: str) -> dict[str, Any]:
    """A result, or nothing: the report shows what is there."""
    path = folder / FILES[kind]
    return metadata.read_result(path, kind) if path.is_file() else {}


def with_cut(recipe: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the plan that was really cut, which need not be the one that stage 1 proposed."""
    plan = recipe.get("plan", {})
    if not recipe or not cut or cut.get("keep") == plan.get("keep"):
        return recipe
    shown = {name: value for name, value in plan.items() if name not in {"coverage", "calibration", "how"}}
    metric = cut.get("settings", {}).get("values", {}).get("metric", "a plan")
    return recipe | {"plan": shown | {"keep": cut["keep"], "kept": cut["kept"], "how": {"metric": metric}}}


def page(recipe: dict[str, Any], preview: dict[str, Any], test: dict[str, Any]) -> str:
    """The whole page as text."""
    sections = [
        before.head(recipe, test),
        before.warnings(recipe, preview, test),
        after.tiles(test),
        after.checks(test),
        after.fidelity(test),
        after.rates(test),
        before.sizes(preview, test),
        before.experts(recipe),
        before.curves(recipe),
        before.coverage(recipe),
        after.generations(test),
        before.provenance(recipe, test),
    ]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "style.css").read_text(encoding="utf-8")
    data = json.dumps(before.heat_data(recipe), separators=(",", ":")).replace("<", "\\u003c")
    # Only this very script may run, so that a text that got through the escaping still could do nothing.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    head = (
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", f"moeprune: {before.model_name(recipe, test)}"),
        Html(f"<style>{style}</style>"),
    )
    body = (
        tag("main", *[part for part in sections if part]),
        Html(f'<script type="application/json" id="data">{data}</script>'),
        Html(f"<script>{script}</script>"),
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{join(head)}</head>\n<body>{join(body)}</body>\n</html>\n'
