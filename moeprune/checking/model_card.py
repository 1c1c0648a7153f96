"""README.md of the pruned folder: base model, licence carried over, recipe, numbers, how to serve."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune import console, metadata
from moeprune.checking.report.before import model_name
from moeprune.results import CUT, FILES, SCORES

NAME, PARENTS = "README.md", "README.parent.md"
MARK = "<!-- made by moeprune -->"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
Json = Mapping[str, Any]


def write(pruned: Path, parent: Path | None, report: Json) -> Path:
    """Write the card; the parent's own card, which was carried along, is kept beside it."""
    card = pruned / NAME
    if card.is_file() and MARK not in _read(card):
        card.replace(pruned / PARENTS)
    source = next((f for f in (pruned / PARENTS, *([parent / NAME] if parent else [])) if f.is_file()), None)
    recipe = {}
    for kind in (SCORES, CUT):
        if (pruned / FILES[kind]).is_file():
            recipe[kind] = metadata.read_result(pruned / FILES[kind], kind)
    partial = card.with_name(NAME + ".partial")
    licences = sorted(path.name for path in pruned.glob("LICEN[SC]E*"))
    inherited = front_matter(_read(source) if source else "")
    gguf = min((path.name for path in pruned.glob("*.gguf")), default="")
    partial.write_text(text(recipe, report, inherited, licences, gguf), encoding="utf-8")
    partial.replace(card)
    return card


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def front_matter(card: str) -> dict[str, list[str]]:
    """The inherited keys of a card's YAML head, each with its lines as they stand."""
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found: dict[str, list[str]] = {}
    key = ""
    for line in head[1].splitlines() if head else []:
        if line and not line.startswith((" ", "-", "#")):
            key = line.partition(":")[0]
        if key in INHERITED:
            found.setdefault(key, []).append(line)
    return found


SERVING = (
    "```\nvllm serve PATH_OF_THIS_FOLDER\n```\n\nor with transformers:\n\n```python\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto", device_map="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")\n```'
)


def text(recipe: Json, report: Json, inherited: Mapping[str, list[str]], licences: list[str], gguf: str = "") -> str:
    """The whole card. `recipe` holds the results SCORES and CUT where they are known; `gguf` names the first file."""
    scores, cut = recipe.get(SCORES, {}), recipe.get(CUT, {})
    name = model_name(dict(scores), dict(report))
    parts = [
        _head(_hub_name(scores), inherited),
        MARK,
        f"# {name}, with {_counts(scores, cut)}",
        f"A pruned copy of `{name}`: the experts that matter least on the calibration data were removed from every "
        "Mixture-of-Experts layer. Nothing was trained; every tensor that stayed is the parent's, byte for byte.",
        _licence(inherited, licences),
        "## What was lost",
        *_numbers(report),
        "## How it was made",
        *_recipe(scores, cut, report),
        "## How to serve it",
        f"```\nllama-server -m {gguf}\n```" if gguf else SERVING,
        "The method is REAP, Router-weighted Expert Activation Pruning (Lasby et al., 2025, arXiv:2510.13999).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _hub_name(scores: Json) -> str:
    """The parent's name on the hub, when it came from there."""
    asked = str(scores.get("settings", {}).get("values", {}).get("model_path", "")).partition("@")[0].partition(":")[0]
    return asked if re.fullmatch(r"[\w.-]+/[\w.-]+", asked) and not Path(asked).exists() else ""


def _head(hub_name: str, inherited: Mapping[str, list[str]]) -> str:
    lines = [line for key in INHERITED for line in inherited.get(key, [])]
    lines += [f"base_model: {hub_name}"] if hub_name else []
    return "\n".join(["---", *lines, "tags:", "- pruned", "- moe", "- reap", "---"])


def _counts(scores: Json, cut: Json) -> str:
    plan = cut or scores.get("plan", {})
    return f"{plan['kept']} of {plan['experts']} experts" if plan.get("kept") else "fewer experts"


def _licence(inherited: Mapping[str, list[str]], licences: list[str]) -> str:
    named = "; ".join(line for key in INHERITED[:3] for line in inherited.get(key, []))
    files = f" Its terms are in {', '.join(licences)}." if licences else ""
    if not named and not files:
        return "The parent's licence was not stated in its folder; it applies to this copy too. Look it up before use."
    return f"The parent's licence applies to this copy too ({named or 'see the file'}).{files}"


def _numbers(report: Json) -> list[str]:
    if not report:
        return ["Not measured."]
    parts = [f"Verdict of the judge: **{report['verdict']}**, {_plain(report['summary'])}."]
    rows: list[tuple[str, ...]] = [("", "parent", "this model")]
    inputs = report["inputs"]
    before = (inputs.get("parent") or {}).get("bytes")
    rows.append(("size", console.size(before) if before else "", console.size(inputs["pruned"]["bytes"])))
    overall = (report.get("fidelity") or {}).get("overall")
    if overall:
        low, high = overall["kl_interval"]
        losses = (f"{overall[key]:.3f}" for key in ("parent_loss", "loss"))
        rows.append(("loss on held-out text, nats per token", *losses))
        kl = f"{overall['kl']:.3f} ({low:.3f} to {high:.3f})"
        rows.append(("KL divergence to the parent, mean (95% interval)", "0", kl))
        rows.append(("same most likely token", "100%", f"{overall['same_top']:.1%}"))
    rows += _rates(report)
    parts.append("\n".join([_line(rows[0]), "|---|---|---|", *(_line(row) for row in rows[1:])]))
    domains = (report.get("fidelity") or {}).get("domains", {})
    worst = sorted(domains, key=lambda domain: -domains[domain]["kl"])[:5]
    if len(worst) > 1:
        parts.append("Most was lost in: " + ", ".join(f"{_plain(d)} (KL {domains[d]['kl']:.3f})" for d in worst) + ".")
    if report["warnings"]:
        parts.append("Warnings:\n\n" + "\n".join(f"- {_plain(warning)}" for warning in report["warnings"]))
    return parts


def _rates(report: Json) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, entry in (report.get("generation") or {}).get("rates", {}).items():
        own, parent = entry["pruned"], entry["parent"]
        if own["count"]:
            low, high = own["interval"]
            shown = f"{own['rate']:.1%} ({low:.1%} to {high:.1%})"
            rows.append((f"texts: {name}, of {own['count']}", f"{parent['rate']:.1%}" if parent else "", shown))
    return rows


def _recipe(scores: Json, cut: Json, report: Json) -> list[str]:
    how, data = scores.get("plan", {}).get("how", {}), scores.get("inputs", {}).get("calibration", {})
    held = report.get("inputs", {}).get("held_out", {}) if report else {}
    tool = (cut or scores).get("tool", {})
    lines = [
        f"- experts ranked by: {how['metric']}, domains blended by {how.get('blend')}" if how.get("metric") else "",
        f"- calibration: {data['source']}, {data['samples']} samples, {data['tokens']} tokens"
        if data.get("tokens")
        else "",
        f"- scores: {scores.get('inputs', {}).get('fingerprint')}" if scores else "",
        f"- judged on: {held.get('source')}, {held.get('samples')} samples" if held else "",
        f"- tool: {tool.get('name')} {tool.get('version')} ({tool.get('git_commit')})" if tool else "",
    ]
    which = [f"`{FILES[kind]}`" for kind, there in ((CUT, cut), (SCORES, scores)) if there]
    listed = "\n".join(_plain(line) for line in lines if line)
    return [listed, f"Everything needed to make it again lies in {' and '.join(which)}." if which else ""]


def _line(row: tuple[str, ...]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in row) + " |"


def _plain(value: str) -> str:
    """Text that can end neither its table cell nor its line."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())
