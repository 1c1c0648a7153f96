"""For every configuration of tests/tiny.py: cut, load with no key astray, and compute what the masked parent computes.

The oracle is the uncut model whose dropped experts get a router logit of minus infinity before anything else happens
to it. Routers are found in memory by the values of the tensors that hold them on disk, so no class or name is known
here. Every block keeps other experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from moeprune.checkpoint import families, folder
from tests import tiny
from tests.pruning import cutting

COUNT = 6  # of 8
TOLERANCE = 1e-5
PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.einsum,
}


class Masked(TorchFunctionMode):
    """Products with a router's matrix get minus infinity in the columns of the dropped experts."""

    def __init__(self, dropped: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self.dropped = dropped  # address of the router's matrix -> its rows that must not be chosen
        self.seen: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in PRODUCTS:
            return result
        for operand in [*args, *(kwargs or {}).values()]:
            address = operand.untyped_storage().data_ptr() if isinstance(operand, torch.Tensor) else None
            if address in self.dropped:
                self.seen.add(address)
                return result.masked_fill(self.dropped[address], -math.inf)
        return result


@contextmanager
def masked(model: torch.nn.Module, parent: Path, keep: Mapping[str, list[int]]) -> Iterator[None]:
    """Within this, the model's routers cannot choose the experts that `keep` does not name."""
    disk = {name: tensor for file in parent.glob("*.safetensors") for name, tensor in load_file(file).items()}
    memory = [*model.parameters(), *model.buffers()]
    dropped = {}
    biases = []
    for block in families.understand(folder.open_checkpoint(parent)).blocks:
        gone = sorted(set(range(block.experts)) - set(keep[block.name]))
        for part in block.parts:
            if not part.router or part.kind != "rows" or "scale" in part.tensor:
                continue
            found = _in_memory(disk[part.tensor], memory, part.axis)
            rows = torch.zeros(block.experts + part.tail, dtype=torch.bool)
            rows[gone] = True
            if found.ndim > 1 and not part.blocks:
                dropped[found.untyped_storage().data_ptr()] = rows
            else:
                biases.append((found, keep, part, rows))
    before = [bias.detach().clone() for bias, *_ in biases]
    for bias, _, part, rows in biases:
        _mask_bias(bias, keep, part, rows)
    try:
        with Masked(dropped) as mode:
            yield
        assert mode.seen == dropped.keys(), "some router was not seen at work"
    finally:
        for (bias, *_), values in zip(biases, before, strict=True):
            bias.data.copy_(values)


def _in_memory(tensor: torch.Tensor, memory: list[torch.Tensor], axis: int) -> torch.Tensor:
    """The parameter or buffer that holds these values."""
    for candidate in memory:
        for view in (tensor, tensor.mT if tensor.ndim == 2 else tensor):
            if candidate.numel() == tensor.numel() and torch.equal(candidate.reshape(view.shape), view):
                return candidate
    raise AssertionError("a router's tensor was not found in the loaded model")


def _mask_bias(bias: torch.Tensor, keep: Mapping[str, list[int]], part: families.Part, rows: torch.Tensor) -> None:
    if not part.blocks:
        bias.data.reshape(-1)[rows] = -math.inf
    for row, block in enumerate(part.blocks):
        gone = sorted(set(range(bias.shape[-1])) - set(keep[block]))
        bias.data[row, gone] = -math.inf


def forward(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head, on fixed tokens."""
    ids = torch.randint(8, 200, (2, 12), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        result = model(**inputs, use_cache=False)
    return result.logits if "logits" in result else result.last_hidden_state


def load(family: str, path: Path) -> torch.nn.Module:
    """The model, which must find every one of its tensors, in its size, and no other."""
    kind = getattr(transformers, tiny.FAMILIES[family][0])
    model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    wrong = {what: names for what, names in info.items() if names}
    assert not wrong, wrong
    return model.eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cut_equals_masked_parent(family: str, tmp_path: Path) -> None:
    parent = tiny.make(family, tmp_path / "parent")
    keep = cutting.keep_lists(parent, COUNT)
    child = cutting.cut(parent, keep)
    model = load(family, parent)
    whole = forward(model)
    with masked(model, parent, keep):
        expected = forward(model)
    difference = (forward(load(family, child)) - expected).abs().max().item()
    assert difference < TOLERANCE, f"{family}: {difference}"
    assert (whole - expected).abs().max() > 1e-3, "the mask changed nothing, so this proves nothing"
