"""Tiny random models as GGUF files, whole and cut, with the logits that stage 1 and 3 get from them.

python tests/engines/gguf_families.py FOLDER   ->   {"mixtral": [[logits of the last token], ...], "mixtral-cut": ...}
"""

import json
import sys
from pathlib import Path

import torch

import prune_model
from moeprune.checking.subject import load_model
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.settings import Settings
from tests import gguf_files, tiny
from tests.gguf_files.families import FAMILIES

PROMPTS = [[(7 * i * i + 31 * start) % 250 + 10 for i in range(20)] for start in range(3)]


def logits(file: Path) -> list[list[float]]:
    """Of the last token of each prompt."""
    model = load_model(file, Settings(device="cpu", dtype="float32"))
    with torch.no_grad():
        return model(input_ids=torch.tensor(PROMPTS)).logits[:, -1].tolist()


def main(folder: Path) -> None:
    """Make, cut, compute."""
    found = {"prompts": PROMPTS}
    for family, way in FAMILIES.items():
        parent, file = folder / family, folder / f"{family}.gguf"
        tiny.make(family, parent, **way.overrides | way.engine)
        gguf_files.tokenizer(parent)
        file.unlink(missing_ok=True)
        gguf_files.convert(parent, file)
        blocks = understand(open_checkpoint(file)).blocks
        keep = {b.name: [0, 1, 3, 4, 6, 7] if i % 2 else [1, 2, 3, 5, 6, 7] for i, b in enumerate(blocks)}
        (folder / "plan.json").write_text(json.dumps({"keep": keep}))
        flags = ["--plan", str(folder / "plan.json"), "--pruned-output-path", str(folder / f"{family}-cut"), "--force"]
        prune_model.main(["--model-path", str(file), *flags])
        child = next((folder / f"{family}-cut").glob("*.gguf")).rename(folder / f"{family}-cut.gguf")
        found |= {family: logits(file), f"{family}-cut": logits(child)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
