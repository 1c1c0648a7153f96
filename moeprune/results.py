"""The results in an output folder: what each kind is called on disk, and which pruned model is the newest.

Nothing but the standard library, so that it works before the set-up too.
"""

from __future__ import annotations

from pathlib import Path

from moeprune.errors import InputError

# The kind that each result says it is, and the name of its file.
SCORES, CUT, PREVIEW, VERDICT = "reap_metadata", "pruned_model", "preview", "test_report"
FILES = {
    SCORES: "reap_metadata.json",
    CUT: "pruning.json",  # in the pruned model's own folder, as is a copy of the scores
    PREVIEW: "preview.json",
    VERDICT: "test_report.json",
}
PARTIAL = ".partial"  # the ending of what is being written


def newest_model(output: Path) -> Path:
    """The pruned model in the output folder that was made last; neither half-written ones nor results alone count."""
    recipes = [path for kind in (CUT, SCORES) for path in output.glob(f"*/{FILES[kind]}")]
    made = [path for path in recipes if path.parent.suffix != PARTIAL and is_model(path.parent)]
    if not made:
        raise InputError(
            f"no pruned model in {output}; run ./run.sh prune first, or name a folder with --pruned-output-path"
        )
    return max(made, key=lambda path: path.stat().st_mtime).parent


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model: a config and its weights, or GGUF files."""
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
