"""GGUF architectures whose layers are of several kinds: attention in some, a convolution or a state in others."""

from __future__ import annotations

from typing import Any

from moeprune.scoring.gguf.facts import Facts
from moeprune.scoring.gguf.model import Model


def _lfm2(facts: Facts) -> dict[str, Any]:
    attends = facts.each("attention.head_count_kv")
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "num_dense_layers": facts.leading_dense,
        "layer_types": ["full_attention" if heads else "conv" for heads in attends],
        "norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "conv_L_cache": facts["shortconv.l_cache"],
        "use_expert_bias": facts.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


SHORT_CONVOLUTION = {
    "attn_norm": "operator_norm",
    "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj",
    **{f"attn_{x}_norm": f"self_attn.{x}_layernorm" for x in "qk"},
    **{f"shortconv.{x}": f"conv.{x}" for x in ("in_proj", "out_proj", "conv")},
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b.bias": "feed_forward.expert_bias",
}

TABLE = {
    "lfm2moe": Model("lfm2_moe", "Lfm2MoeForCausalLM", _lfm2, SHORT_CONVOLUTION, experts="feed_forward.experts"),
}
