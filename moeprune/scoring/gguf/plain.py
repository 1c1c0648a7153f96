"""GGUF architectures with attention and experts in every layer, and a softmax or sigmoid router of no groups."""

from __future__ import annotations

from typing import Any

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, Facts, rope, rotating_part
from moeprune.scoring.gguf.model import AFTER, SHARED_EXPERT, Model


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
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


def _granite(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "attention_multiplier": facts.get("attention.scale", facts.head_dim**-0.5),
        "embedding_multiplier": facts.get("embedding_scale", 1.0),
        "residual_multiplier": facts.get("residual_scale", 1.0),
        "logits_scaling": facts.get("logit_scale", 1.0),
    }


GRANITE = {"ffn_gate_inp": "block_sparse_moe.router"}
ROUTER = {"ffn_gate_inp": "mlp.router", "attn_sinks.weight": "self_attn.sinks"}
BLOCK_BIAS = {"exp_probs_b.bias": "mlp.e_score_correction_bias"}

TABLE = {
    "qwen2moe": Model("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2, SHARED_EXPERT),
    "qwen3moe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),
    "qwen3vlmoe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),  # for text they are the same
    "llama": Model("mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "gpt-oss": Model("gpt_oss", "GptOssForCausalLM", _gpt_oss, AFTER | ROUTER, columns=True, by_turns=True),
    "minimax-m2": Model("minimax_m2", "MiniMaxM2ForCausalLM", _minimax, BLOCK_BIAS),
    "olmoe": Model("olmoe", "OlmoeForCausalLM", _olmoe),
    "granitemoe": Model(
        "granitemoe", "GraniteMoeForCausalLM", _granite, GRANITE, experts="block_sparse_moe.experts", permuted=True
    ),
}
