"""The masked parent computes what a cut made by hand computes, in every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from moeprune.checking import fidelity, masking, structure, subject
from moeprune.checking.samples import Batch, Sample
from moeprune.checking.streamed import Streamed
from moeprune.checking.subject import Loaded
from moeprune.errors import InputError
from moeprune.settings import Settings
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


UNUSUAL = ("llama4_text", "zaya", "longcat_flash", "ernie4_5_moe", "inkling_text", "dots3_note", "gemma4_text",
           "deepseek_v4", "jetmoe", "switch_transformers", "qwen3_omni_moe_thinker", "minimax_m3_vl_text")  # fmt: skip


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_routers(family, tmp_path):
    """Tails behind the experts, biases elsewhere, routers in several parts, experts in the tower, capped heads, tables
    that choose by token, experts in attention, encoders with decoders, models in parts."""
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
    inputs = {"input_ids": _batch().ids_BT}
    if child.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _batch().ids_BT
    with torch.no_grad():
        expected = child(**inputs, use_cache=False).logits.flatten(0, 1)
    assert torch.allclose(subject.head_logits(child, masked), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["deepseek_v4", "jetmoe", "switch_transformers", "qwen3_moe"])
def test_streamed_preview_tells_the_metrics_of_the_cut(family, tmp_path):
    """All variants side by side, one layer in memory, against the cut model as plain transformers loads it."""
    parent_folder = tiny.make(family, tmp_path / "parent")
    keep, other = (cutting.keep_lists(parent_folder, 6, seed=seed) for seed in (0, 1))
    settings = Settings(device="cpu", dtype="float32", output_path=tmp_path)
    parent, child = Streamed(parent_folder, settings), Loaded(cutting.cut(parent_folder, keep), settings)
    batches, held_out = [_batch()], [Sample(text="", domain=name) for name in "aab"]
    whole, masked, different = parent.variants(batches, [None, keep, other])
    (own,) = child.variants(batches, [None])
    with parent.head() as parents, child.head() as childs:
        told, found, elsewhere = (
            fidelity.summary(fidelity.compare(parents, head, batches, (whole, states), parent.vocabulary), held_out, 0)
            for head, states in ((parents, masked), (childs, own), (parents, different))
        )
    for measure in ("kl", "loss", "same_top", "kl_median", "kl_p95"):
        assert told["overall"][measure] == pytest.approx(found["overall"][measure], rel=1e-3, abs=3e-6), measure
    assert told["overall"]["kl"] > 1e-4
    assert elsewhere["overall"]["kl"] != pytest.approx(told["overall"]["kl"], rel=1e-2)


REFUSED = {
    "nllb-moe": "zeros and ones for expert numbers",
    "diffusion_gemma": "refines a canvas and predicts no next token",
    "openai_privacy_filter": "has no language head",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_masked_or_judged_says_why(family, tmp_path):
    folder = tiny.make(family, tmp_path / "parent")
    model = getattr(transformers, tiny.FAMILIES[family][0]).from_pretrained(folder).eval()
    keep = cutting.keep_lists(folder, 6)
    masked = masking.maskable(masking.routed_blocks(model))
    with pytest.raises(InputError, match=REFUSED[family]), masked, masking.keeping(keep):
        subject.judged_states(model, _batch())


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
