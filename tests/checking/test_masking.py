"""The masked parent computes what a cut made by hand computes, in every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moeprune.checking import masking, structure, subject
from moeprune.checking.samples import Batch
from tests import tiny
from tests.checking import pairs
from tests.pruning import cutting

KEEP = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6), 2: (0, 2, 4, 5)}


def _batch() -> Batch:
    ids = torch.randint(8, 200, (3, 24), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool), (0, 1, 2))


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_masked_parent_equals_the_cut(family, tmp_path):
    keep = {layer: ids for layer, ids in KEEP.items() if layer or "first_k_dense_replace" not in pairs.FAMILIES[family]}
    pairs.cut(pairs.parent(tmp_path / "parent", family), tmp_path / "child", keep)
    parent = AutoModelForCausalLM.from_pretrained(tmp_path / "parent").eval()
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "child").eval()
    named = {f"model.layers.{layer}": ids for layer, ids in keep.items()}
    whole = subject.judged_states(parent, _batch())
    with masking.maskable(masking.routed_blocks(parent)), masking.keeping(named):
        masked = subject.judged_states(parent, _batch())
    difference = (masked - subject.judged_states(child, _batch())).abs().max()
    assert difference < 1e-5
    assert (masked - whole).abs().max() > 1e-2  # the mask did something
    assert torch.equal(subject.judged_states(parent, _batch()), whole)  # and it is gone again


def test_chunked_head_equals_the_whole_forward(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pairs.parent(tmp_path)).eval()
    with torch.no_grad():
        expected = model(input_ids=_batch().ids_BT).logits.flatten(0, 1)
    states = subject.judged_states(model, _batch())
    assert torch.allclose(
        torch.cat([subject.head_logits(model, part) for part in states.split(7)]), expected, atol=1e-5
    )


UNUSUAL = ("llama4_text", "zaya", "longcat_flash", "ernie4_5_moe", "inkling_text", "dots3_note", "gemma4_text")


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_routers(family, tmp_path):
    """Tails behind the experts, biases elsewhere, routers in several parts, experts in the tower, capped heads."""
    parent_folder = tiny.make(family, tmp_path / "parent")
    keep = cutting.keep_lists(parent_folder, 6)
    child_folder = cutting.cut(parent_folder, keep)
    kind = getattr(transformers, tiny.FAMILIES[family][0])
    parent, child = (kind.from_pretrained(f, dtype=torch.float32).eval() for f in (parent_folder, child_folder))
    found = structure.examine(parent, child, keep, [_batch()])
    assert found["status"] == "pass", found
    with masking.maskable(masking.routed_blocks(parent)), masking.keeping(keep):
        masked = subject.judged_states(parent, _batch())
    assert torch.allclose(masked, subject.judged_states(child, _batch()), atol=1e-4)
    with torch.no_grad():
        expected = child(input_ids=_batch().ids_BT, use_cache=False).logits.flatten(0, 1)
    assert torch.allclose(subject.head_logits(child, masked), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["jetmoe", "deepseek_v4"])
def test_what_cannot_be_masked_says_so(family, tmp_path):
    folder = tiny.make(family, tmp_path / "parent")
    model = getattr(transformers, tiny.FAMILIES[family][0]).from_pretrained(folder).eval()
    keep = cutting.keep_lists(folder, 6)
    with pytest.raises(masking.CannotMask), masking.maskable(masking.routed_blocks(model)), masking.keeping(keep):
        subject.judged_states(model, _batch())
    assert structure.examine(model, model, keep, [_batch()])["status"] == "not tested"


def test_a_router_that_is_passed_over_is_not_taken_for_masked(tmp_path):
    """As kernels do that compute the router's product themselves."""
    model = AutoModelForCausalLM.from_pretrained(pairs.parent(tmp_path)).eval()
    block = model.model.layers[1].mlp
    block.forward = lambda x: x + torch.nn.functional.linear(x, block.gate.weight).sum()
    keep = {f"model.layers.{layer}": ids for layer, ids in KEEP.items()}
    masked = masking.maskable(masking.routed_blocks(model))
    with pytest.raises(masking.CannotMask, match="does not call its router"), masked, masking.keeping(keep):
        subject.judged_states(model, _batch())
    assert structure.examine(model, model, keep, [_batch()])["status"] == "not tested"
