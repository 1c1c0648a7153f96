"""Layouts as they lie on the hub, written by hand: names, shapes, and what of them belongs to experts.

What transformers itself writes is in tests/tiny.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moeprune.checkpoint.folder import Checkpoint, open_checkpoint
from tests import handmade

E = 8
ATTENTION = {"self_attn.q_proj.weight": [16, 16], "self_attn.sinks": [E], "input_layernorm.weight": [16]}


@dataclass
class Case:
    config: dict
    tensors: dict  # name -> shape, or (dtype, shape)
    blocks: dict  # block -> {name without block and expert number: description}
    role: dict = field(default_factory=dict)  # block -> role, where it is not trunk


def layer(name, tensors, per_expert=None, experts=range(E)):
    """The tensors of one layer; those of `per_expert` once for each expert, {e} standing for its number."""
    every = {f"{name}.{key}": shape for key, shape in (ATTENTION | tensors).items()}
    for key, shape in (per_expert or {}).items():
        every |= {f"{name}.{key.replace('{e}', str(e))}": shape for e in experts}
    return every


GATED = {f"mlp.experts.{{e}}.{p}_proj.weight": [4, 16] for p in ("gate", "up", "down")}
GATED_FOUND = {f"mlp.experts.N.{p}_proj.weight": "expert" for p in ("gate", "up", "down")}
STACKED = {"mlp.experts.gate_up_proj": [E, 8, 16], "mlp.experts.down_proj": [E, 16, 4]}
STACKED_FOUND = dict.fromkeys(STACKED, "rows 0")
GATE, GATE_FOUND = {"mlp.gate.weight": [E, 16]}, {"mlp.gate.weight": "router 0"}
SHARED = {"mlp.shared_expert.up_proj.weight": [E, 16], "mlp.shared_expert_gate.weight": [1, 16]}
W123 = {f"experts.{{e}}.{w}.weight": [4, 16] for w in ("w1", "w2", "w3")}
FFN = {f"ffn.{name}": shape for name, shape in W123.items()}
CT = {
    "weight_packed": ("I32", [4, 2]),
    "weight_scale": [4, 1],
    "weight_shape": ("I64", [2]),
    "weight_zero_point": ("I32", [1, 1]),
    "weight_g_idx": ("I32", [16]),
}
FP4 = {
    "weight_packed": ("U8", [4, 8]),
    "weight": ("U8", [4, 8]),
    "weight_scale": ("F8_E4M3", [4, 1]),
    "weight_global_scale": ("F32", [1]),
    "weight_scale_2": ("F32", []),
    "input_global_scale": ("F32", [1]),
    "input_scale": ("F32", []),
    "pre_quant_scale": [16],
}
NVFP4 = {key: FP4[key] for key in ("weight", "weight_scale", "weight_scale_2", "input_scale")}
INT4 = {
    "weight": ("U8", [2, 16]),
    "weight_scale": [4, 1],
    "weight_scale_2": ("F32", []),
    "pre_quant_scale": [16],
    "svdquant_lora_a": [1, 16],
    "svdquant_lora_b": [4, 1],
}
MODELOPT = {
    "": ("U8", [E, 16, 4]),
    "_weight_scale": ("F8_E4M3", [E, 16, 1]),
    "_weight_scale_2": ("F32", [E, 2]),
    "_input_scale": ("F32", []),
}
TOP_2 = {"num_experts_per_tok": 2}
TORCHAO = {"qdata": 16, "scale": 1, "zero_point": 1}
INT = {"weight": ("U8", [E, 4]), "weight_scale": ("F32", [E, 1]), "input_activation_scale": ("F32", [])}
# What other libraries keep of one matrix [E, 16]; sizes of E mean nothing in them.
WHOLE = {
    "W_q": ("U8", [E, 8]), "scale": ("F32", [E, 1]), "zero": ("F32", [E, 1]), "shape": ("I64", [2]),
    "nbits": ("I32", []), "packing": ("U8", [E]), "weight._data": ("I8", [E, 16]), "weight._scale": [E, 1],
    "weight._data._data": ("U8", [4, 16]), "weight._shift": [E, 1], "input_scale": [], "codes": ("I8", [E, 2, 1]),
    "codebooks": ("F16", [1, E, 1, 8]), "scales": ("F16", [E, 1, 1, 1]), "indices": ("I32", [1, 1, E]),
    "centroids.weight": ("F16", [1, 64]), "perm": ("I32", [16]), "dense_weights": ("I64", [E, 2]),
    "row_offsets": ("I32", [E]), "tables2": ("F16", [16, 16, 2]), "qweight": ("U8", [E, 8]),
    "forward_hadamard_matrix": [E, E], "weight": ("I8", [16, E]), "weight_scales": ("F16", [E]),
    "weight_scale": [1], "quantized_weight_values": ("U8", [E, 8]),
}  # fmt: skip

CASES = {
    "gpt-oss mxfp4": Case(
        {"model_type": "gpt_oss", "num_local_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1},
        layer(
            "model.layers.0",
            {f"mlp.experts.{p}_{kind}": shape for p in ("gate_up_proj", "down_proj") for kind, shape in
             {"blocks": ("U8", [E, 16, 2, 16]), "scales": ("U8", [E, 16, 2]), "bias": [E, 16]}.items()}
            | {"mlp.router.weight": [E, 16], "mlp.router.bias": [E]},
        ),
        {"model.layers.0": {f"mlp.experts.{p}_{kind}": "rows 0" for p in ("gate_up_proj", "down_proj")
                            for kind in ("blocks", "scales", "bias")}
         | {"mlp.router.weight": "router 0", "mlp.router.bias": "router 0"}},
    ),
    "qwen3.5, stacked trunk with an MTP layer per expert": Case(
        {"model_type": "qwen3_5_moe", "text_config": {"num_experts": E, "num_hidden_layers": 1} | TOP_2},
        layer("model.language_model.layers.0", STACKED | GATE | SHARED)
        | layer("mtp.layers.0", GATE | SHARED, GATED)
        | {"mtp.fc.weight": [16, 32], "model.visual.blocks.0.mlp.experts.0.up_proj.weight": [4, 4]},
        {"model.language_model.layers.0": STACKED_FOUND | GATE_FOUND, "mtp.layers.0": GATED_FOUND | GATE_FOUND},
        {"mtp.layers.0": "mtp"},
    ),
    "glm-4.5, MTP as one more layer": Case(
        {"model_type": "glm4_moe", "n_routed_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        | {"num_nextn_predict_layers": 1, "n_group": 1, "topk_group": 1},
        {"model.layers.0.mlp.up_proj.weight": [E, 16]}
        | layer("model.layers.1", GATE | {"mlp.gate.e_score_correction_bias": [E]}, GATED)
        | layer("model.layers.2", GATE | {"mlp.gate.e_score_correction_bias": [E], "eh_proj.weight": [16, 32]}, GATED),
        dict.fromkeys(
            ("model.layers.1", "model.layers.2"),
            GATED_FOUND | GATE_FOUND | {"mlp.gate.e_score_correction_bias": "router 0"},
        ),
        {"model.layers.2": "mtp"},
    ),
    "deepseek v4": Case(
        {"model_type": "deepseek_v4", "n_routed_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 2},
        layer("layers.0",
              {"ffn.gate.weight": [E, 16], "ffn.gate.tid2eid": ("I64", [20, 2]), "attn.wgate.weight": [E, 16]},
              FFN | {f"ffn.{k[:-7]}.scale": ("F8_E8M0", [4, 1]) for k in W123})
        | layer("layers.1", {"ffn.gate.weight": [E, 16], "ffn.gate.bias": [E]}, FFN)
        | layer("mtp.0", {"ffn.gate.weight": [E, 16], "ffn.gate.bias": [E]}, FFN),
        {
            "layers.0": {f"ffn.experts.N.{w}.{k}": "expert" for w in ("w1", "w2", "w3") for k in ("weight", "scale")}
            | {"ffn.gate.weight": "router 0", "ffn.gate.tid2eid": "ids"},
        } | dict.fromkeys(("layers.1", "mtp.0"), {f"ffn.experts.N.{w}.weight": "expert" for w in ("w1", "w2", "w3")}
            | {"ffn.gate.weight": "router 0", "ffn.gate.bias": "router 0"}),
        {"mtp.0": "mtp"},
    ),
    "motif 3, with vectors per expert": Case(
        {"model_type": "motif", "num_experts": E, "experts_top_k": 2, "num_hidden_layers": 1},
        layer("model.layers.0", {
            "moe.experts.gate_up_proj": ("U8", [E, 8, 8]), "moe.experts.gate_up_proj_weight_scale": [E, 8, 1],
            "moe.experts.gate_up_proj_weight_scale_2": [E], "moe.experts.down_proj": ("U8", [E, 16, 2]),
            "moe.experts.act_fn.weight": [E, 3], "moe.experts.act_fn.bias": [E, 1], "moe.experts.a13_gscale": [E],
            "moe.router.gate.weight": [E, 16], "moe.expert_bias": [E]}),
        {"model.layers.0": {f"moe.experts.{name}": "rows 0" for name in (
            "gate_up_proj", "gate_up_proj_weight_scale", "gate_up_proj_weight_scale_2", "down_proj", "act_fn.weight",
            "act_fn.bias", "a13_gscale")} | {"moe.router.gate.weight": "router 0", "moe.expert_bias": "router 0"}},
    ),
    "grove moe, pairs": Case(
        {"model_type": "grove_moe", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1},
        layer("model.layers.0", GATE, GATED)
        | layer("model.layers.0", {}, {"mlp.chunk_experts.{e}.up_proj.weight": [4, 16]}, range(E // 2)),
        {"model.layers.0": GATED_FOUND | GATE_FOUND | {"mlp.chunk_experts.N.up_proj.weight": "expert of 2"}},
    ),
    "smallthinker": Case(
        {"model_type": "smallthinker", "moe_num_primary_experts": E, "moe_num_active_primary_experts": 2},
        layer("model.layers.0", {"block_sparse_moe.primary_router.weight": [E, 16]},
              {"block_sparse_moe.experts.{e}.up.weight": [4, 16]}),
        {"model.layers.0": {"block_sparse_moe.primary_router.weight": "router 0",
                            "block_sparse_moe.experts.N.up.weight": "expert"}},
    ),
    "ling, bias in the router": Case(
        {"model_type": "bailing_moe_v2", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1},
        layer("model.layers.0", GATE | {"mlp.gate.expert_bias": [E]}, GATED),
        {"model.layers.0": GATED_FOUND | GATE_FOUND | {"mlp.gate.expert_bias": "router 0"}},
    ),
    "pangu pro, one expert from each group": Case(
        {"model_type": "PanguProMoE", "num_experts": E, "num_experts_per_tok": 2, "num_hidden_layers": 1},
        layer("model.layers.0", GATE | SHARED | {"mlp.router_scale": [1, E]}, GATED),
        {"model.layers.0": GATED_FOUND | GATE_FOUND | {"mlp.router_scale": "router 1"}},
    ),
    "step 3.5, three axes in the module itself": Case(
        {"model_type": "step3p5", "moe_num_experts": E, "moe_top_k": 2, "num_hidden_layers": 2},
        {"model.layers.0.mlp.gate_proj.weight": [E, 16]}
        | layer("model.layers.1", {f"moe.{p}_proj.weight": ("F8_E4M3", [E, 4, 16]) for p in ("gate", "up", "down")}
                | {f"moe.{p}_proj.weight_scale_inv": [E, 1, 1] for p in ("gate", "up", "down")}
                | {"moe.gate.weight": [E, 16], "moe.router_bias": [E], "share_expert.up_proj.weight": [E, 16]}),
        {"model.layers.1": {f"moe.{p}_proj.{k}": "rows 0" for p in ("gate", "up", "down")
                            for k in ("weight", "weight_scale_inv")}
         | {"moe.gate.weight": "router 0", "moe.router_bias": "router 0"}},
    ),
    "llama 4 in FP8, one input scale for all": Case(
        {"model_type": "llama4", "text_config": {"num_local_experts": E, "num_experts_per_tok": 1}},
        layer("language_model.model.layers.0", {
            "feed_forward.experts.gate_up_proj": ("F8_E4M3", [E, 16, 8]), "feed_forward.router.weight": [E, 16],
            "feed_forward.experts.gate_up_proj_weight_scale": [E, 1, 8],
            "feed_forward.experts.gate_up_proj_input_scale": [],
            "feed_forward.shared_expert.up_proj.weight": [E, 16]}),
        {"language_model.model.layers.0": {"feed_forward.experts.gate_up_proj": "rows 0",
         "feed_forward.experts.gate_up_proj_weight_scale": "rows 0", "feed_forward.router.weight": "router 0"}},
    ),
    "gemma 4 in NVFP4, no module around": Case(
        {"model_type": "gemma4", "text_config": {"num_experts": E, "top_k_experts": 2, "hidden_size": 16}},
        layer("model.language_model.layers.0", {"router.proj.weight": [E, 16], "router.per_expert_scale": [E],
              "router.scale": [16], "router.global_scale": [1], "mlp.up_proj.weight": [E, 16], "layer_scalar": [1]},
              {"experts.{e}.up_proj.weight": ("U8", [4, 8]), "experts.{e}.up_proj.weight_scale_2": []}),
        {"model.language_model.layers.0": {
         "experts.N.up_proj.weight": "expert", "experts.N.up_proj.weight_scale_2": "expert",
         "router.proj.weight": "router 0", "router.per_expert_scale": "router 0"}},
    ),
    "zaya on the hub": Case(
        {"model_type": "zaya", "num_experts": E},
        layer("model.layers.1", {"zaya_block.router.router_mlp.4.weight": [E + 1, 16],
              "zaya_block.router.balancing_biases": [E + 1], "zaya_block.router.router_mlp.0.weight": [16, 16]},
              {"zaya_block.experts.local_experts.{e}.linear_fc1.weight": [8, 16]}),
        {"model.layers.1": {"zaya_block.experts.local_experts.N.linear_fc1.weight": "expert",
         "zaya_block.router.router_mlp.4.weight": "router 0 + 1",
         "zaya_block.router.balancing_biases": "router 0 + 1"}},
    ),
    "nomic, flat as megablocks keeps it": Case(
        {"model_type": "nomic_bert", "num_experts": E, "moe_top_k": 2},
        layer("encoder.layers.1", {"mlp.experts.mlp.w1": [E * 4, 16], "mlp.experts.mlp.w2": [E * 4, 16],
              "mlp.experts.bias": [16], "mlp.router.layer.weight": [E, 16]}),
        {"encoder.layers.1": {"mlp.experts.mlp.w1": "rows 0 x 4", "mlp.experts.mlp.w2": "rows 0 x 4",
                              "mlp.router.layer.weight": "router 0"}},
    ),
    "MLX with a quantized router": Case(
        {"model_type": "qwen3_moe", "num_experts": E, "quantization": {"bits": 4, "group_size": 64}} | TOP_2,
        layer("model.layers.0", {f"mlp.switch_mlp.up_proj.{k}": s for k, s in
              {"weight": ("U32", [E, 4, 2]), "scales": [E, 4, 1], "biases": [E, 4, 1]}.items()}
              | {"mlp.gate.weight": ("U32", [E, 4]), "mlp.gate.scales": [E, 1], "mlp.gate.biases": [E, 1]}),
        {"model.layers.0": {f"mlp.switch_mlp.up_proj.{k}": "rows 0" for k in ("weight", "scales", "biases")}
         | {f"mlp.gate.{k}": "router 0" for k in ("weight", "scales", "biases")}},
    ),
    "gpt-oss in bitsandbytes 4-bit": Case(
        {"model_type": "gpt_oss", "num_local_experts": E} | TOP_2,
        layer("model.layers.0", {"mlp.router.weight": [E, 16], "mlp.router.bias": [E]},
              {f"mlp.experts.{p}s.{{e}}.{k}": s for p in ("gate_up_proj", "down_proj") for k, s in
               {"weight": ("U8", [32, 1]), "weight.absmax": ("U8", [1]), "weight.quant_state.bitsandbytes__nf4":
                ("U8", [70]), "bias": [4]}.items()}),
        {"model.layers.0": {f"mlp.experts.{p}s.N.{k}": "expert" for p in ("gate_up_proj", "down_proj") for k in
         ("weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "bias")}
         | {"mlp.router.weight": "router 0", "mlp.router.bias": "router 0"}},
    ),
    "GPTQ and AWQ": Case(
        {"model_type": "qwen3_moe", "num_experts": E} | TOP_2,
        layer("model.layers.0", GATE, {f"mlp.experts.{{e}}.up_proj.{k}": ("I32", [2, 8]) for k in ("qweight", "qzeros")}
              | {"mlp.experts.{e}.up_proj.scales": ("F16", [1, 8]), "mlp.experts.{e}.up_proj.g_idx": ("I32", [16])}),
        {"model.layers.0": {f"mlp.experts.N.up_proj.{k}": "expert" for k in ("qweight", "qzeros", "scales", "g_idx")}
         | GATE_FOUND},
    ),
    "compressed-tensors INT4, NVFP4 and modelopt per expert": Case(
        {"model_type": "qwen3_moe", "num_experts": E} | TOP_2,
        layer("model.layers.0", GATE, {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in CT.items()})
        | layer("model.layers.1", GATE, {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in FP4.items()}),
        {"model.layers.0": {f"mlp.experts.N.up_proj.{k}": "expert" for k in CT} | GATE_FOUND,
         "model.layers.1": {f"mlp.experts.N.up_proj.{k}": "expert" for k in FP4} | GATE_FOUND},
    ),
    "modelopt NVFP4, stacked": Case(
        {"model_type": "llama4", "text_config": {"num_local_experts": E} | TOP_2},
        layer("model.layers.0", {f"feed_forward.experts.gate_up_proj{k}": v for k, v in MODELOPT.items()}
              | {"feed_forward.router.weight": [E, 16]}),
        {"model.layers.0": {f"feed_forward.experts.gate_up_proj{k}": "rows 0" for k in MODELOPT if k != "_input_scale"}
         | {"feed_forward.router.weight": "router 0"}},
    ),
    "modelopt INT4 with smoothed inputs and a low-rank part": Case(
        {"model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": 2,
         "quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}},
        layer("model.layers.0", GATE, {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in INT4.items()}),
        {"model.layers.0": {f"mlp.experts.N.up_proj.{k}": "expert" for k in INT4} | GATE_FOUND},
    ),
    "torchao": Case(
        {"model_type": "qwen3_moe", "num_experts": E, "quantization_config": {"quant_method": "torchao"}} | TOP_2,
        layer("model.layers.0", GATE | {f"mlp.experts._down_proj_{k}": ("I8", [E, 4, n]) for k, n in TORCHAO.items()}),
        {"model.layers.0": {f"mlp.experts._down_proj_{k}": "rows 0" for k in TORCHAO} | GATE_FOUND},
    ),
    "HQQ, Quanto, AQLM, VPTQ, SpQR, HIGGS, FP-Quant, EETQ, BitNet and Four Over Six, a module for each expert": Case(
        {"model_type": "qwen3_moe", "num_experts": E, "quantization_config": {"quant_method": "vptq"}} | TOP_2,
        layer("model.layers.0", GATE, {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in WHOLE.items()}),
        {"model.layers.0": {f"mlp.experts.N.up_proj.{k}": "expert" for k in WHOLE} | GATE_FOUND},
    ),
    "Gemma's own, with a quantized router": Case(
        {"model_type": "qwen3_moe", "num_experts": E, "quantization_config": {"quant_method": "gemma"}} | TOP_2,
        layer("model.layers.0", {f"mlp.gate.{k}": v for k, v in INT.items()},
              {f"mlp.experts.{{e}}.up_proj.{k}": v for k, v in INT.items()}),
        {"model.layers.0": {f"mlp.experts.N.up_proj.{k}": "expert" for k in INT}
         | {"mlp.gate.weight": "router 0", "mlp.gate.weight_scale": "router 0"}},
    ),
    "a model that is as wide as it has experts": Case(
        {"model_type": "mixtral", "num_local_experts": E, "hidden_size": E} | TOP_2,
        layer("model.layers.0", {"block_sparse_moe.gate.weight": [E, E], "block_sparse_moe.norm.weight": [E]},
              {f"block_sparse_moe.{k}": [E, E] for k in W123}),
        {"model.layers.0": {f"block_sparse_moe.experts.N.{w}.weight": "expert" for w in ("w1", "w2", "w3")}
         | {"block_sparse_moe.gate.weight": "router 0"}},
    ),
}  # fmt: skip


def typed(tensors):
    """Shapes alone are those of bf16."""
    return {name: value if isinstance(value, tuple) else ("BF16", value) for name, value in tensors.items()}


def write(folder: Path, case: Case) -> Checkpoint:
    return open_checkpoint(handmade.checkpoint(folder, case.config, typed(case.tensors)))
