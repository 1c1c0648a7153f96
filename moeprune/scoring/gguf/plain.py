"""GGUF architectures with attention in every layer, and a softmax or sigmoid router of no groups."""

from __future__ import annotations

import math
from typing import Any

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, SIGMOID, Facts, layer_types, rope, rotating_part
from moeprune.scoring.gguf.model import AFTER, SHARED_EXPERT, Model
from moeprune.scoring.gguf.turns import Made, columns_of_all, one_after_another, rows_of_all


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.rows("ffn_up_shexp.weight"),
        "norm_topk_prob": False,  # as llama.cpp computes it, and as all models of this family do
        "mlp_only_layers": facts.dense,
        "qkv_bias": facts.has("attn_q.bias"),
    }


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "norm_topk_prob": True,  # as llama.cpp computes it
        "mlp_only_layers": facts.dense,
        "attention_bias": facts.has("attn_q.bias"),
    }


def _mixtral(facts: Facts) -> dict[str, Any]:
    if facts.has("rope_freqs.weight") or facts.dense:
        raise InputError(f"{facts.file} is no Mixtral, though of the architecture llama; {INSTEAD}")
    return {"num_local_experts": facts["expert_count"], "head_dim": facts.get("rope.dimension_count", facts.head_dim)}


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "sliding_window": facts["attention.sliding_window"],
        "rope_parameters": rope(facts, truncate=False),
    }


def _minimax(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "rope_parameters": rotating_part(facts),
    }


def _olmoe(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "norm_topk_prob": False,  # as llama.cpp computes it
        "clip_qkv": facts.get("attention.clamp_kqv") or None,
    }


def granite(facts: Facts) -> dict[str, Any]:
    """What all of this maker's models with experts have."""
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "attention_multiplier": facts.get("attention.scale", facts.head_dim**-0.5),
        "embedding_multiplier": facts.get("embedding_scale", 1.0),
        "residual_multiplier": facts.get("residual_scale", 1.0),
        "logits_scaling": facts.get("logit_scale", 1.0),
    }


def _granite(facts: Facts) -> dict[str, Any]:
    if not facts.get("rope.scaling.finetuned", True):
        raise InputError(
            f"{facts.file}: its layers know no positions, which this class of transformers does; {INSTEAD}"
        )
    if not (shared := facts.shape("ffn_up_shexp.weight")):
        return granite(facts)
    shared_type = {"model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"]}
    return granite(facts) | shared_type | {"shared_intermediate_size": shared[0]}


def _dbrx(facts: Facts) -> dict[str, Any]:
    theta = facts["rope.freq_base"]
    heads, width = facts["attention.head_count_kv"], facts.expert_width
    return {
        "d_model": facts["embedding_length"],  # its configuration looks at no other name while it is made
        "attn_config": {"rope_theta": theta, "kv_n_heads": heads, "clip_qkv": facts["attention.clamp_kqv"] or math.inf},
        "ffn_config": {"ffn_hidden_size": width, "moe_num_experts": facts["expert_count"]}
        | {"moe_top_k": facts["expert_used_count"]},
    }


def _granite_swa(facts: Facts) -> dict[str, Any]:
    """Gate and up of the shared expert lie in one matrix; some layers know no positions."""
    theta, turned = facts.get("rope.freq_base", 10000.0), facts.each("attention.rope_pattern")
    return _granite(facts) | {
        "model_type": "granitemoe_swa",
        "architectures": ["GraniteMoeSWAForCausalLM"],
        "shared_intermediate_size": next(iter(facts.shape("ffn_up_shexp.weight")), 0) // 2,
        "layer_types": layer_types(facts),
        "sliding_window": facts["attention.sliding_window"],
        "layer_rope_theta": [theta if not turned or turned[i] else 0 for i in range(facts.layers)],
    }


def _mimo2(facts: Facts) -> dict[str, Any]:
    kinds, heads = layer_types(facts), facts.by_layer("attention.head_count_kv")
    few = dict(zip(kinds, heads, strict=True)).get("full_attention", heads[0])
    if heads != [few if kind == "full_attention" else few * 2 for kind in kinds]:
        raise InputError(f"{facts.file}: layers with a window have not twice the heads of others; {INSTEAD}")
    part = facts.get("rope.dimension_count", facts.head_dim) / facts.head_dim
    theta = {"sliding_attention": facts.get("rope.freq_base_swa", 10000.0), "full_attention": facts["rope.freq_base"]}
    return {
        "n_routed_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": True,  # as llama.cpp computes it
        "mlp_layer_types": ["dense" if i in facts.dense else "sparse" for i in range(facts.layers)],
        "layer_types": kinds,
        "num_key_value_heads": few,
        "head_dim": facts.head_dim,
        "v_head_dim": facts["attention.value_length"],
        "attention_value_scale": facts.get("attention.value_scale"),
        "attention_bias": facts.has("attn_q.bias"),
        "sliding_window": facts["attention.sliding_window"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": part}
            for kind, base in theta.items()
        },
    }


def _cohere2(facts: Facts) -> dict[str, Any]:
    """Dense layers in front turn queries and keys whether they have a window or not."""
    sigmoid = facts.get("expert_gating_func", SIGMOID) == SIGMOID
    normed = bool(facts.get("expert_weights_norm", False))
    if not (sigmoid or normed) or facts.get("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise InputError(f"{facts.file}: its router weighs experts as transformers does not; {INSTEAD}")
    return {
        "num_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "prefix_dense_intermediate_size": next(iter(facts.shape("ffn_up.weight")), None),
        "mlp_layer_types": ["sparse" if i >= facts.leading_dense else "dense" for i in range(facts.layers)],
        "layer_types": layer_types(facts),
        "head_dim": facts.head_dim,
        "sliding_window": facts["attention.sliding_window"],
        "num_shared_experts": facts.get("expert_shared_count", 0),
        "expert_selection_fn": "sigmoid" if sigmoid else "softmax",
        "norm_topk_prob": normed,
        "logit_scale": facts["logit_scale"],
        "layer_norm_eps": facts.get("attention.layer_norm_epsilon"),
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon"),
        "attention_bias": facts.has("attn_q.bias"),
    }


def _mellum(facts: Facts) -> dict[str, Any]:
    theta = facts["rope.freq_base"]
    if facts.get("rope.freq_base_swa", theta) != theta:
        raise InputError(f"{facts.file}: rotations of two bases, of which llama.cpp computes one only; {INSTEAD}")
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "norm_topk_prob": True,  # as llama.cpp computes it
        "layer_types": layer_types(facts),
        "sliding_window": facts["attention.sliding_window"],
        "attention_bias": facts.has("attn_q.bias"),
        "rope_parameters": {
            "full_attention": rope(facts),
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
    }


def _gemma4(facts: Facts) -> dict[str, Any]:
    """Keys and values of the last layers are those of earlier ones; full attention has heads of its own size."""
    kinds, heads = layer_types(facts), facts.by_layer("attention.head_count_kv")
    if kinds[-1] != "full_attention":
        raise InputError(
            f"{facts.file}: its last layer attends within a window, which transformers cannot do; {INSTEAD}"
        )
    full = [i for i in range(facts.layers) if kinds[i] == "full_attention"]
    few = dict(zip(kinds, heads, strict=True)).get("sliding_attention", heads[0])
    inputs = "per_layer_token_embd.weight"
    widths, shared = facts.by_layer("feed_forward_length"), int(facts.get("attention.shared_kv_layers", 0))
    named = facts.checkpoint.tensors
    return {
        "num_experts": facts["expert_count"],
        "top_k_experts": facts["expert_used_count"],
        "moe_intermediate_size": facts.expert_width,
        "enable_moe_block": True,
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "head_dim": facts.get("attention.key_length_swa", facts.head_dim),
        "num_key_value_heads": few,
        "per_layer_config": {
            i: {"head_dim": facts.head_dim, **({"num_key_value_heads": heads[i]} if heads[i] != few else {})}
            for i in full
        },
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in named for i in full if i < facts.layers - shared),
        "num_kv_shared_layers": shared,
        "layer_types": kinds,
        "sliding_window": facts["attention.sliding_window"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)},
            "full_attention": {"rope_type": "proportional", "rope_theta": facts["rope.freq_base"]}
            | {"partial_rotary_factor": _turned(facts)},
        },
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "hidden_size_per_layer_input": facts.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": facts.rows(inputs if facts.has(inputs) else "token_embd.weight"),
    }


def _turned(facts: Facts) -> float:
    """The part of a head that full attention turns; the frequencies of the rest are divided until they are zero."""
    if len(divisors := facts.values("rope_freqs.weight")) != facts.head_dim // 2:
        raise InputError(f"{facts.file}: rope_freqs.weight is not there or of another size; fetch the file again")
    return sum(divisor < ZERO for divisor in divisors) / len(divisors)


DBRX = {
    "token_embd.weight": "transformer.wte.weight",
    "output_norm.weight": "transformer.norm_f.weight",
    "attn_norm": "norm_attn_norm.norm_1",
    "attn_qkv": "norm_attn_norm.attn.Wqkv",
    "attn_output": "norm_attn_norm.attn.out_proj",
    "attn_output_norm": "norm_attn_norm.norm_2",
    "ffn_gate_inp": "ffn.router.layer",
    **{
        f"ffn_{x}_exps.weight": f"ffn.experts.mlp.{name}"
        for x, name in {"gate": "w1", "up": "v1", "down": "w2"}.items()
    },
}
ZERO = 1e20  # a frequency divided by more turns nothing
GEMMA4 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    **{f"post_ffw_norm{x}": f"post_feedforward_layernorm{x}" for x in ("", "_1", "_2")},
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    "post_norm": "post_per_layer_input_norm",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}
GRANITE = {"ffn_gate_inp": "block_sparse_moe.router", "ffn_down_shexp": "shared_mlp.output_linear"}
GRANITE_SHARED = Made(("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), one_after_another)
SINKS = {"attn_sinks.weight": "self_attn.sinks"}
ROUTER = {"ffn_gate_inp": "mlp.router"}
BLOCK_BIAS = {"exp_probs_b.bias": "mlp.e_score_correction_bias"}

TABLE = {
    "qwen2moe": Model("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2, SHARED_EXPERT),
    "qwen3moe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),
    "qwen3vlmoe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),  # for text they are the same
    "llama": Model("mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "gpt-oss": Model("gpt_oss", "GptOssForCausalLM", _gpt_oss, AFTER | ROUTER | SINKS, columns=True, by_turns=True),
    "minimax-m2": Model("minimax_m2", "MiniMaxM2ForCausalLM", _minimax, BLOCK_BIAS),
    "olmoe": Model("olmoe", "OlmoeForCausalLM", _olmoe),
    "granitemoe": Model(
        "granitemoe",
        "GraniteMoeForCausalLM",
        _granite,
        GRANITE,
        experts="block_sparse_moe.experts",
        made={"shared_mlp.input_linear.weight": GRANITE_SHARED},
        permuted=True,
    ),
    "dbrx": Model(
        "dbrx",
        "DbrxForCausalLM",
        _dbrx,
        DBRX,
        layers="transformer.blocks",
        experts="",
        turns={f"ffn_{x}_exps.weight": rows_of_all for x in ("gate", "up")} | {"ffn_down_exps.weight": columns_of_all},
    ),
    "mimo2": Model("mimo_v2_flash", "MiMoV2FlashForCausalLM", _mimo2, SINKS),
    "cohere2moe": Model("cohere2_moe", "Cohere2MoeForCausalLM", _cohere2),
    "mellum": Model("mellum", "MellumForCausalLM", _mellum),
    "granite_swa": Model(
        "granitemoe_swa",
        "GraniteMoeSWAForCausalLM",
        _granite_swa,
        GRANITE | SINKS | {"ffn_up_shexp": "shared_mlp.input_linear"},
        experts="block_sparse_moe.experts",
        permuted=True,
    ),
    "gemma4": Model("gemma4_text", "Gemma4ForCausalLM", _gemma4, GEMMA4, experts="experts"),
}
