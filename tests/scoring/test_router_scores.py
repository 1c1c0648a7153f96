"""What a router puts out becomes probabilities by the function that its own gate values follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeprune.scoring.observer import SCORING, Slots, scoring_function
from tests import tiny
from tests.scoring import streamed


def slots(gate_TE: torch.Tensor, count: int, renormalised: bool) -> Slots:
    """The largest `count` of each token, by expert."""
    gate_TK, index_TK = gate_TE.topk(count)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True) if renormalised else gate_TK * 2.5
    expert_S, order_S = index_TK.reshape(-1).sort()
    token_S = order_S // count
    return Slots(expert_S, token_S, token_S, gate_TK.reshape(-1)[order_S])


# One gate, divided by itself, is always one and tells nothing.
@pytest.mark.parametrize(("count", "renormalised"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sqrt of softplus"])
def test_gates_tell_the_function(name, count, renormalised):
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score_TE = SCORING[name](logits_TE)
    assert scoring_function(logits_TE, slots(score_TE, count, renormalised)) == name


def test_one_gate_that_is_always_one_is_taken_for_a_softmax():
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert scoring_function(logits_TE, slots(logits_TE.softmax(-1), 1, True)) == "softmax"


def test_a_token_that_skips_the_experts_is_routed_to_none(tmp_path):
    """Zaya's router says so with expert 0 and a gate of zero."""
    model = tiny.build("zaya")
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer[-1] = 0.05
    model.save_pretrained(tmp_path / "model")
    folder, data = tmp_path / "model", streamed.batches()
    skipped = dict.fromkeys(range(3), 0)
    for number, layer in enumerate(model.model.layers):

        def count(_module, _args, output, number=number):
            counts = current.domain_BT.reshape(-1) >= 0
            skipped[number] += int((output[1].reshape(-1)[counts] == 0).sum())

        next(m for m in layer.modules() if type(m).__name__ == "ZayaRouter").register_forward_hook(count)
    with torch.no_grad():
        for current in data:
            model(**current.inputs, use_cache=False)
    assert sum(skipped.values()) > 0
    for number, block in enumerate(streamed.score(folder, data, tmp_path).blocks):
        assert block.values["count"].sum() == block.tokens_D.sum() - skipped[number]
        np.testing.assert_array_equal(block.values["norm_sum"] > 0, block.values["count"] > 0)
