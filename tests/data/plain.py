"""The tiny model that libraries quantize, and what their makers share."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import transformers

from tests import tiny

SIZES = {
    "vocab_size": 64,
    "num_experts": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
Values = dict[str, torch.Tensor]  # plain name -> what the library makes of it


def base() -> Path:
    """The model that is quantized, with a tokenizer, as some libraries ask for one."""
    folder = Path(tempfile.mkdtemp())
    tiny.make("qwen3_moe", folder, dtype=torch.bfloat16, **SIZES)
    tiny.tokenizer(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    """The model in memory."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def replace(state: Values, name: str, parts: Values) -> None:
    """The weight of a layer gives way to what a library keeps of it."""
    del state[f"{name}.weight"]
    state |= {f"{name}.{part}": tensor.detach().clone() for part, tensor in parts.items()}


def linear_layers(state: Values, *endings: str) -> dict[str, torch.nn.Linear]:
    """Every matrix of such a name (without one: all but routers), as a module of its own."""
    layers = {}
    for name, weight in state.items():
        if name.endswith(endings or "_proj.weight"):
            layers[name.removesuffix(".weight")] = layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight
    return layers


def write_config(out: Path, parent: Path, settings: object) -> None:
    """The parent's config with settings of the quantization."""
    config = tiny.read_config(parent) | {"quantization_config": settings}
    (out / "config.json").write_text(json.dumps(config, indent=2))
