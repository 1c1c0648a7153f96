"""GGUF architectures after DeepSeek: dense layers first, then experts beside one that every token takes."""

from __future__ import annotations

from typing import Any

from moeprune.errors import InputError
from moeprune.scoring.gguf import deepseek4
from moeprune.scoring.gguf.facts import INSTEAD, SIGMOID, Facts, layer_types, rope, rotating_part, shortest
from moeprune.scoring.gguf.model import AFTER, LATENT, Model, feed_forward, shared_expert
from moeprune.scoring.gguf.turns import Made, less_one, one_after_another, row

UNNORMED = 128  # experts of the one Llama 4 whose queries and keys have no norm; a file says it in no other way


def _routed(facts: Facts) -> dict[str, Any]:
    """What the models after DeepSeek-V3 have in common."""
    groups = facts.get("expert_group_count", 1) or 1
    return {
        "n_routed_experts": facts["expert_count"],
        "n_shared_experts": facts.get("expert_shared_count", 0),
        "moe_intermediate_size": facts.expert_width,
        "first_k_dense_replace": facts.leading_dense,
        "mlp_layer_types": ["dense" if i in facts.dense else "sparse" for i in range(facts.layers)],
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": facts.get("expert_group_used_count", groups) or groups,
        "attention_bias": facts.has("attn_q.bias"),
        "head_dim": facts.head_dim,
    }


def _latent(facts: Facts) -> dict[str, Any]:
    """What models with latent attention have beside."""
    rotary = int(facts["rope.dimension_count"])
    parameters = rope(facts)
    if parameters["rope_type"] == "yarn":  # llama.cpp stores a tenth of the exponent's base
        scale = shortest(float(facts.get("rope.scaling.yarn_log_multiplier", 0.0)) * 10)
        parameters |= {"mscale": scale, "mscale_all_dim": scale}
    return _routed(facts) | {
        "q_lora_rank": facts.get("attention.q_lora_rank") or None,
        "kv_lora_rank": facts["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": int(facts.get("attention.key_length_mla", facts["attention.key_length"])) - rotary,
        "v_head_dim": facts.get("attention.value_length_mla", facts["attention.value_length"]),
        "num_key_value_heads": facts["attention.head_count"],
        "rope_parameters": parameters,
        "head_dim": rotary,
    }


def _mistral4(facts: Facts) -> dict[str, Any]:
    found = _latent(facts)
    found["rope_parameters"]["llama_4_scaling_beta"] = facts.get("attention.temperature_scale", 0.0)
    return found | {"head_dim": found["qk_nope_head_dim"] + found["qk_rope_head_dim"]}


def _deepseek(facts: Facts) -> dict[str, Any]:
    """Its file says by the router whose it is: weights of a softmax are normed by Mistral, not by DeepSeek-V2."""
    if facts.get("expert_gating_func", 1) == SIGMOID:
        return _latent(facts)
    if facts.get("expert_weights_norm", False):
        return _mistral4(facts) | {"model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"]}
    found = _latent(facts)
    method = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    return found | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "topk_method": method}


def _indexed(facts: Facts) -> dict[str, Any]:
    """An indexer chooses the tokens to attend to; a layer without one takes the choice of the layer before."""
    has = [f"blk.{i}.indexer.attn_k.weight" in facts.checkpoint.tensors for i in range(facts.layers)]
    return _latent(facts) | {
        "index_n_heads": facts["attention.indexer.head_count"],
        "index_head_dim": facts["attention.indexer.key_length"],
        "index_topk": facts["attention.indexer.top_k"],
        "indexer_types": ["full" if own else "shared" for own in has],
    }


def _glm4(facts: Facts) -> dict[str, Any]:
    """Solar Open, too, which turns whole heads."""
    part = facts["rope.dimension_count"] / facts.head_dim
    positions = {"rope_parameters": rope(facts, partial_rotary_factor=part)}
    return _routed(facts) | positions | {"use_qk_norm": facts.has("attn_q_norm.weight")}


def _llama4(facts: Facts) -> dict[str, Any]:
    every = 4  # a layer without positions, as llama.cpp has it; it knows the lengths below by heart, too
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "intermediate_size_mlp": facts["feed_forward_length"],
        "head_dim": facts.head_dim,
        "moe_layers": [i for i in range(facts.layers) if i not in facts.dense],
        "interleave_moe_layer_step": facts["interleave_moe_layer_step"],
        "no_rope_layer_interval": every,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": facts["expert_count"] != UNNORMED,
    }


def _ernie(facts: Facts) -> dict[str, Any]:
    return {
        "moe_num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "moe_num_shared_experts": facts.get("expert_shared_count", 0),
        "moe_layer_start_index": facts.leading_dense,
        "moe_layer_interval": facts["interleave_moe_layer_step"],
        "moe_layer_end_index": facts.layers - 1,
        "use_bias": facts.has("attn_q.bias"),
    }


def _hunyuan(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "attention_bias": facts.has("attn_q.bias"),
    }


def _afmoe(facts: Facts) -> dict[str, Any]:
    if not facts.get("expert_weights_norm", False):
        raise InputError(f"{facts.file}: its experts' weights are not normed, which transformers cannot do; {INSTEAD}")
    return {
        "layer_types": layer_types(facts, usual=lambda i: (i + 1) % 4),
        "sliding_window": facts["attention.sliding_window"],
        "num_experts": facts["expert_count"],
        "num_shared_experts": facts["expert_shared_count"],
        "moe_intermediate_size": facts.expert_width,
        "num_dense_layers": facts.leading_dense,
        "route_scale": facts.get("expert_weights_scale", 1.0),
        "head_dim": facts.head_dim,
        "mup_enabled": True,  # as llama.cpp computes it
        "attention_bias": facts.has("attn_q.bias"),
    }


def _hy_v3(facts: Facts) -> dict[str, Any]:
    found = _routed(facts)
    return found | {
        "num_experts": facts["expert_count"],
        "num_shared_experts": int(facts["expert_shared_feed_forward_length"]) // facts.expert_width,
        "router_scaling_factor": found["routed_scaling_factor"],
    }


def _laguna(facts: Facts) -> dict[str, Any]:
    heads, size = facts.by_layer("attention.head_count"), facts.head_dim
    window = facts.get("attention.sliding_window", 0)
    part = facts["rope.dimension_count"] / size
    near = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", facts["rope.freq_base"])}
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "mlp_layer_types": ["dense" if i in facts.dense else "sparse" for i in range(facts.layers)],
        "moe_routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "head_dim": size,
        "num_attention_heads": heads[0],
        "num_attention_heads_per_layer": heads,
        "gating": facts.shape("attn_gate.weight")[0] == heads[0] or "per-element",
        "sliding_window": window,
        "layer_types": layer_types(facts, usual=lambda i: window and i % 4),
        "rope_parameters": {
            "full_attention": rope(facts, partial_rotary_factor=part),
            "sliding_attention": near | {"partial_rotary_factor": facts.get("rope.dimension_count_swa", size) / size},
        },
        "attention_bias": facts.has("attn_q.bias"),
    }


def _minimax_m3(facts: Facts) -> dict[str, Any]:
    has = [f"blk.{i}.indexer.q_proj.weight" in facts.checkpoint.tensors for i in range(facts.layers)]
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "dense_intermediate_size": facts["feed_forward_length"],
        "shared_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "mlp_layer_types": ["dense" if i in facts.dense else "sparse" for i in range(facts.layers)],
        "layer_types": ["minimax_m3_sparse" if own else "full_attention" for own in has],
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "head_dim": facts.head_dim,
        "rotary_dim": facts["rope.dimension_count"],
        "rope_parameters": rotating_part(facts),
        "index_n_heads": facts["attention.indexer.head_count"],
        "index_head_dim": facts["attention.indexer.key_length"],
        "index_topk_blocks": facts["attention.indexer.top_k"],
        "index_block_size": facts["attention.indexer.block_size"],
        "index_local_blocks": facts["attention.indexer.local_blocks"],
    }


def _exaone(facts: Facts) -> dict[str, Any]:
    names = {"num_experts": facts["expert_count"], "num_shared_experts": facts["expert_shared_count"]}
    return (
        _routed(facts)
        | names
        | {
            "layer_types": layer_types(facts),
            "sliding_window": facts["attention.sliding_window"],
        }
    )


INDEXED = LATENT | {
    f"indexer.{leaf}": f"self_attn.indexer.{name}"
    for leaf, name in {"attn_q_b": "wq_b", "attn_k": "wk", "k_norm": "k_norm", "proj": "weights_proj"}.items()
}
LLAMA4 = feed_forward("feed_forward") | shared_expert("feed_forward.shared_expert")
LLAMA4 |= {"ffn_gate_inp": "feed_forward.router"}
ERNIE = {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"}
HUNYUAN = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
HUNYUAN |= {"ffn_gate_inp": "mlp.gate.wg", **shared_expert("mlp.shared_mlp")}
AFMOE = {
    "attn_gate": "self_attn.gate_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_mlp_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_gate_inp": "mlp.router.gate",
    "exp_probs_b.bias": "mlp.expert_bias",
}
M3_NORMS = [f"{x}_norm.weight" for x in ("attn", "ffn", "attn_q", "attn_k", "indexer.q", "indexer.k", "output")]
M3_PAIRS = {"mlp": "ffn_{}.weight", "mlp.shared_experts": "ffn_{}_shexp.weight"}

TABLE = {
    "llama4": Model("llama4_text", "Llama4ForCausalLM", _llama4, LLAMA4, experts="feed_forward.experts", columns=True),
    "deepseek2": Model("deepseek_v3", "DeepseekV3ForCausalLM", _deepseek, LATENT),
    "mistral4": Model("mistral4", "Mistral4ForCausalLM", _mistral4, LATENT),
    "glm-dsa": Model("glm_moe_dsa", "GlmMoeDsaForCausalLM", _indexed, INDEXED),
    "deepseek32": Model("deepseek_v32", "DeepseekV32ForCausalLM", _indexed, INDEXED),
    "hy_v3": Model("hy_v3", "HYV3ForCausalLM", _hy_v3, {"exp_probs_b": "mlp.e_score_correction_bias"}),
    "deepseek4": Model("deepseek_v4", "DeepseekV4ForCausalLM", deepseek4.config, deepseek4.LEAVES),
    "glm4moe": Model("glm4_moe", "Glm4MoeForCausalLM", _glm4, AFTER),
    "ernie4_5-moe": Model("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _ernie, ERNIE, turns={"exp_probs_b.bias": row}),
    "hunyuan-moe": Model("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", _hunyuan, HUNYUAN),
    "afmoe": Model("afmoe", "AfmoeForCausalLM", _afmoe, AFMOE),
    "laguna": Model("laguna", "LagunaForCausalLM", _laguna, {"attn_gate": "self_attn.g_proj"}),
    "minimax-m3": Model(
        "minimax_m3_vl_text",
        "MiniMaxM3VLForCausalLM",
        _minimax_m3,
        {f"indexer.{x}": f"self_attn.indexer.{x}" for x in ("q_proj", "k_proj", "q_norm", "k_norm")},
        turns=dict.fromkeys(M3_NORMS, less_one),
        made={
            f"{target}.gate_up_proj.weight": Made((leaf.format("gate"), leaf.format("up")), one_after_another)
            for target, leaf in M3_PAIRS.items()
        },
    ),
    "exaone-moe": Model("exaone_moe", "ExaoneMoeForCausalLM", _exaone),
    "dots1": Model("dots1", "Dots1ForCausalLM", _routed),
}
