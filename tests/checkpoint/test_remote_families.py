"""Families whose code is not in transformers but comes with the checkpoint: their layouts, as far as they are known.

The others of this kind are among the cases of hub.py: Motif-3, GroveMoE, SmallThinker, Ling, Pangu Pro, Step-3.5 and
nomic-embed-v2.
"""

from __future__ import annotations

import pytest

from moeprune.checkpoint.families import understand
from tests.checkpoint.hub import FFN, GATE, GATE_FOUND, GATED, GATED_FOUND, SHARED, STACKED, W123, Case, E, layer, write
from tests.checkpoint.test_families import described, number

SPARSE_BLOCK = {f"block_sparse_moe.{name}": shape for name, shape in W123.items()}
SPARSE_FOUND = {f"block_sparse_moe.experts.N.{w}.weight": "expert" for w in ("w1", "w2", "w3")}
SPARSE_GATE = {"block_sparse_moe.gate.weight": [E, 16]}
TOP_2 = {"num_experts_per_tok": 2}
GROK = {f"moe_block.experts.{{e}}.{name}.weight": [4, 16] for name in ("linear", "linear_1", "linear_v")}
LOOSE = {f"moe.{name}_proj.weight": [E, 4, 16] for name in ("gate", "up", "down")}

CASES = {
    "grok-1": Case(
        {"model_type": "grok-1", "num_experts": E} | TOP_2,
        layer("transformer.decoder_layer.0", {"moe_block.gate.weight": [E, 16]}, GROK),
        {"transformer.decoder_layer.0": {"moe_block.gate.weight": "router 0"}
         | {f"moe_block.experts.N.{name}.weight": "expert" for name in ("linear", "linear_1", "linear_v")}},
    ),
    "grok-2, a dense layer beside the experts": Case(
        {"model_type": "git", "num_local_experts": E} | TOP_2,
        layer("model.layers.0", SPARSE_GATE | {"mlp.up_proj.weight": [E, 16]}, SPARSE_BLOCK),
        {"model.layers.0": SPARSE_FOUND | {"block_sparse_moe.gate.weight": "router 0"}},
    ),
    "arctic, dense layers under the same name": Case(
        {"model_type": "arctic", "num_local_experts": E, "num_hidden_layers": 2} | TOP_2,
        layer("model.layers.0", {f"block_sparse_moe.mlp.{w}.weight": [E, 16] for w in ("w1", "w2", "w3")})
        | layer("model.layers.1", SPARSE_GATE | {"residual_mlp.w1.weight": [E, 16]}, SPARSE_BLOCK),
        {"model.layers.1": SPARSE_FOUND | {"block_sparse_moe.gate.weight": "router 0"}},
    ),
    "xverse": Case(
        {"model_type": "xverse", "num_experts": E, "moe_top_k": 2, "num_shared_experts": 2},
        layer("model.layers.0", {"mlp.router.weight": [E, 16], "mlp.shared_experts.up_proj.weight": [E, 16]}, GATED),
        {"model.layers.0": GATED_FOUND | {"mlp.router.weight": "router 0"}},
    ),
    "skywork, counted in a list": Case(
        {"model_type": "skywork", "num_experts": [E]} | TOP_2,
        layer("model.layers.0", GATE, GATED),
        {"model.layers.0": GATED_FOUND | GATE_FOUND},
    ),
    "minimax-text-01": Case(
        {"model_type": "minimax_text_01", "num_local_experts": E} | TOP_2,
        layer("model.layers.0", SPARSE_GATE | {"coefficient.weight": [1, 16]}, SPARSE_BLOCK),
        {"model.layers.0": SPARSE_FOUND | {"block_sparse_moe.gate.weight": "router 0"}},
    ),
    "ling 1": Case(
        {"model_type": "bailing_moe", "num_experts": E} | TOP_2,
        layer("model.layers.0", GATE | {"mlp.shared_experts.up_proj.weight": [E, 16]}, GATED),
        {"model.layers.0": GATED_FOUND | GATE_FOUND},
    ),
    "deepseek-vl2, experts in the images' tower too": Case(
        {"model_type": "deepseek_vl_v2", "language_config": {"n_routed_experts": E} | TOP_2},
        layer("language.model.layers.1", GATE, GATED) | layer("vision.blocks.0", GATE, GATED),
        {"language.model.layers.1": GATED_FOUND | GATE_FOUND},
    ),
    "kimi-vl": Case(
        {"model_type": "kimi_vl", "text_config": {"n_routed_experts": E, "n_group": 1, "topk_group": 1} | TOP_2},
        layer("language_model.model.layers.1", GATE | {"mlp.gate.e_score_correction_bias": [E]}, GATED)
        | {"vision_tower.encoder.blocks.0.mlp.fc0.weight": [E, 16]},
        {"language_model.model.layers.1": GATED_FOUND | GATE_FOUND
         | {"mlp.gate.e_score_correction_bias": "router 0"}},
    ),
    "step-3, experts in the module itself": Case(
        {"model_type": "step3_vl", "text_config": {"moe_num_experts": E, "moe_top_k": 2}},
        layer("model.layers.4", LOOSE | {"moe.gate.weight": [E, 16], "share_expert.up_proj.weight": [E, 16]}),
        {"model.layers.4": dict.fromkeys(LOOSE, "rows 0") | {"moe.gate.weight": "router 0"}},
    ),
    "a family that nobody has seen": Case(
        {"model_type": "fresh", "num_experts": E, "moe_router_topk": 2},
        layer("decoder.blocks.3", {"ffn.router.classifier.weight": [E, 16]} | SHARED, FFN),
        {"decoder.blocks.3": {f"ffn.experts.N.{w}.weight": "expert" for w in ("w1", "w2", "w3")}
         | {"ffn.router.classifier.weight": "router 0"}},
    ),
    "the same, stacked": Case(
        {"model_type": "fresh", "num_experts": E, "num_selected_experts": 2},
        layer("decoder.blocks.3", {"mlp.router.weight": [E, 16]} | STACKED),
        {"decoder.blocks.3": dict.fromkeys(STACKED, "rows 0") | {"mlp.router.weight": "router 0"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_family_with_code_of_its_own(tmp_path, name):
    case = CASES[name]
    layout = understand(write(tmp_path, case))
    found = {
        block.name: {number(part.tensor[len(block.name) + 1 :]): described(part) for part in block.parts}
        for block in layout.blocks
    }
    assert found == case.blocks
    assert (layout.experts, layout.top_k) == (E, 2)
