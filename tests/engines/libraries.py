"""Checkpoints that quantization libraries wrote, cut: jobs for ask_libraries.py.

python tests/engines/libraries.py FOLDER   ->   [{"parent", "child", "keep", "backend"}, ...]
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from tests import tiny
from tests.data.make import FOLDER
from tests.engines import families, quantize
from tests.pruning import cutting

# What gptqmodel loads it with; None: transformers does. AutoRound replaces classes of transformers, so it comes last.
BACKENDS = {"ct_fp8": None, "ct_nvfp4": None, "ct_mxfp4": None, "awq": "AWQ_TORCH", "gptq": "GPTQ_TORCH"}
BACKENDS |= {"auto_round": None}


def parent_of(form: str, folder: Path) -> Path:
    """What a library wrote; gptqmodel refuses AutoRound's GPTQ, which has zero points, so that one is rounded here."""
    if form == "gptq":
        made = tiny.make("qwen3_moe", folder, dtype=torch.bfloat16, **families.SIZES)
        parent = quantize.quantize(made, form)
    else:
        parent = Path(shutil.copytree(FOLDER / form, folder, ignore=shutil.ignore_patterns("made.json")))
    tiny.tokenizer(parent)  # gptqmodel asks for one
    return parent


def main(folder: Path) -> None:
    """Cut each to three experts, others in each layer."""
    shutil.rmtree(folder, ignore_errors=True)
    jobs = []
    for form, backend in BACKENDS.items():
        parent = parent_of(form, folder / form / "parent")
        keep = cutting.keep_lists(parent, 3, seed=2)
        child = cutting.cut(parent, keep)
        jobs.append({"parent": str(parent), "child": str(child), "keep": keep, "backend": backend})
    print(json.dumps(jobs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
