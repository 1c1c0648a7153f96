"""Run with the quantization libraries: JOBS is a file of JSON, [{"parent", "child", "keep", "backend"}, ...].

Prints for each job what the library that wrote the format computes: logits of the parent, of the parent whose router
does not choose the dropped experts, and of the cut. `backend` names one of gptqmodel, else transformers loads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.pruning.test_every_family import masked


def load(folder: str, backend: str | None) -> torch.nn.Module:
    """Every tensor finds its place in the model, and every place its tensor."""
    if backend:
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(folder, device="cpu", backend=BACKEND[backend], dtype=torch.bfloat16).model.eval()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert not any(report.values()), f"{folder}: {report}"
    return model.eval()


def logits(model: torch.nn.Module) -> list[list[float]]:
    """Of the last tokens."""
    tokens = [[(7 * i * i + 31 * start) % 60 + 3 for i in range(20)] for start in range(3)]
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits[:, -1].float().tolist()


def answers(parent: str, child: str, keep: dict[str, list[int]], backend: str | None) -> dict[str, Any]:
    """Of one pair."""
    model = load(parent, backend)
    whole = logits(model)
    with masked(model, Path(parent), Path(child), keep):
        without = logits(model)
    return {"whole": whole, "masked": without, "cut": logits(load(child, backend))}


print(json.dumps([answers(**job) for job in json.loads(Path(sys.argv[1]).read_text())]))
