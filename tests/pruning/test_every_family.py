"""For every configuration of tests/tiny.py: cut, load with no key astray, and compute what the masked parent computes.

The oracle is the uncut model whose dropped experts get a router logit of minus infinity before anything else happens
to it. Routers are found in memory by the values of the tensors that hold them on disk, so no class or name is known
here. Every block keeps other experts. The mask of the preview must show the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from moeprune.checking import masking
from moeprune.checkpoint import families, folder
from tests import tiny
from tests.pruning import cutting

COUNT = 6  # of 8
TOLERANCE = 1e-5  # in fp32, for logits up to 1; of the largest logit beyond that
# transformers 5.23 reads the router's 0/1 mask of NLLB-MoE as expert numbers, so that only experts 0 and 1 ever run.
ALWAYS = {"nllb-moe": (0, 1)}
PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.einsum,
}
# The judge and the preview say why they do not show what a cut of these would compute.
NOT_PREVIEWED = ("nllb-moe", "diffusion_gemma")


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
def masked(model: torch.nn.Module, parent: Path, child: Path, keep: Mapping[str, list[int]]) -> Iterator[None]:
    """Within this, the model's routers cannot choose the experts that `keep` does not name."""
    disk, cut_disk = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (parent, child)
    )
    memory = [*model.parameters(), *model.buffers()]
    dropped: dict[int, torch.Tensor] = {}
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensor in memory, what it holds within this
    for block in families.understand(folder.open_checkpoint(parent)).blocks:
        for part in block.parts:
            if part.kind == "ids":  # no logit decides here: the table says in old numbers what the new one says
                table = torch.tensor(keep[block.name])[cut_disk[part.tensor]]
                changed.append((_in_memory(disk[part.tensor], memory, len(table)), table))
            if not part.router or part.kind != "rows" or "scale" in part.tensor:
                continue
            values = disk[part.tensor]
            lists = zip(part.blocks, values, strict=True) if part.blocks else [(block.name, values)]
            for name, tensor in lists:
                rows = torch.ones(block.experts + part.tail, dtype=torch.bool)
                rows[keep[name]] = False
                rows[block.experts :] = False
                found = _in_memory(tensor, memory, block.experts)
                if found.numel() == rows.numel():
                    changed.append((found, found.detach().masked_fill(rows.view_as(found), -math.inf)))
                else:
                    dropped[found.untyped_storage().data_ptr()] = rows
    before = [tensor.detach().clone() for tensor, _ in changed]
    for tensor, values in changed:
        tensor.data.copy_(values)
    try:
        with Masked(dropped) as mode:
            yield
        assert mode.seen == dropped.keys(), "some router was not seen at work"
    finally:
        for (tensor, _), values in zip(changed, before, strict=True):
            tensor.data.copy_(values)


def _in_memory(tensor: torch.Tensor, memory: list[torch.Tensor], rows: int) -> torch.Tensor:
    """The parameter or buffer that holds these values in its first rows; none is found twice."""
    for place, candidate in enumerate(memory):
        for view in (tensor, tensor.mT if tensor.ndim == 2 else tensor):
            if candidate.numel() == tensor.numel() and torch.equal(candidate.reshape(view.shape)[:rows], view[:rows]):
                return memory.pop(place)
    raise AssertionError(f"a router's tensor of shape {list(tensor.shape)} was not found in the loaded model")


def forward(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head, on fixed tokens."""
    model = getattr(model, "thinker", model)  # Qwen3-Omni: the part that writes text
    ids = torch.randint(8, 200, (2, 12), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    if "moe_mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["moe_mm_token_type_ids"] = ids % 2  # text experts for some tokens, image experts for the others
    torch.manual_seed(0)  # a diffusion model starts from noise
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
    keep = cutting.keep_lists(parent, COUNT, always=ALWAYS.get(family, ()))
    child = cutting.cut(parent, keep)
    model = load(family, parent)
    whole = forward(model)
    with masked(model, parent, child, keep):
        expected = forward(model)
    result = forward(load(family, child))
    scale = max(1, expected.abs().max().item())
    difference = (result - expected).abs().max().item() / scale
    assert difference < TOLERANCE, f"{family}: {difference}"
    if family not in NOT_PREVIEWED:
        with masking.maskable(masking.routed_blocks(model)), masking.keeping(keep):
            preview = forward(model)
        assert (preview - result).abs().max().item() / scale < TOLERANCE, f"{family}: the preview shows something else"
    assert (whole - expected).abs().max() > 1e-3, "the mask changed nothing, so this proves nothing"
