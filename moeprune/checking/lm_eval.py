"""Tasks of lm-eval on parent and pruned model, through that package's own command. Its numbers are kept, not judged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeprune.checking.case import Case
from moeprune.console import say
from moeprune.errors import MachineError, UsageError
from moeprune.settings import Settings


def check(settings: Settings) -> None:
    """Refuse before the long judging what could not be run after it."""
    if not settings.lm_eval:
        return
    if settings.endpoint:
        raise UsageError("--lm-eval runs on local models; with --endpoint, point lm_eval itself at the server")
    if find_spec("lm_eval") is None:
        raise MachineError(
            f"--lm-eval {settings.lm_eval}: lm-eval is not installed; pip install lm-eval, or leave it out"
        )


def run(case: Case, settings: Settings) -> dict[str, Any]:
    """The results of all tasks: pruned, and parent where there is one."""
    models = {"pruned": case.pruned, "parent": case.parent}
    found = {name: _one(folder, settings) for name, folder in models.items() if folder}
    return {"tasks": settings.lm_eval, **found}


def _one(model: Path, settings: Settings) -> dict[str, Any]:
    """What lm-eval reports of one model: task -> metric -> number."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(model, settings, Path(folder))
        say(f"lm-eval on {model.name}: {settings.lm_eval}")
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        files = sorted(Path(folder).rglob("results*.json"))
        if done.returncode or not files:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MachineError(f"lm-eval {settings.lm_eval} ended with {done.returncode} on {model}: {last}")
        data = json.loads(files[-1].read_text(encoding="utf-8"))
    return {
        "version": str(data.get("lm_eval_version", "")),
        "results": {t: dict(_numbers(r)) for t, r in data["results"].items()},
    }


def command(model: Path, settings: Settings, output: Path) -> list[str]:
    """lm-eval as a module of this interpreter, so that it finds the same packages."""
    dtype = "" if settings.dtype == "auto" else f",dtype={settings.dtype}"
    trust = ",trust_remote_code=True" if settings.trust_remote_code else ""
    device = [] if settings.device == "auto" else ["--device", settings.device]
    return [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}{dtype}{trust}"),
        *("--tasks", settings.lm_eval, "--batch_size", str(settings.batch_size), "--output_path", str(output)),
        *("--seed", str(settings.seed), *device),
    ]


def _numbers(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of one task; lm-eval writes N/A where it has no standard error."""
    for name, value in results.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len":
            yield name, float(value)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Every metric of every task with the parent's beside it, for a person."""
    parent = found.get("parent", {}).get("results", {})
    for task, metrics in found.get("pruned", {}).get("results", {}).items():
        for name, value in metrics.items():
            if "stderr" not in name:
                before = parent.get(task, {}).get(name)
                beside = "" if before is None else f", parent {before:.4g}"
                yield f"   lm-eval  {task} {name.removesuffix(',none')}: {value:.4g}{beside}"
