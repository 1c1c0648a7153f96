"""GGUF architectures whose layers are of several kinds: attention in some, a convolution or a state in others."""

from __future__ import annotations

from typing import Any

import torch

from moeprune.scoring.gguf.facts import Facts, rope
from moeprune.scoring.gguf.model import AFTER, SHARED_EXPERT, Model
from moeprune.scoring.gguf.turns import Made, decay, less_one


def _kinds(facts: Facts, leaf: str, there: str, elsewhere: str) -> list[str]:
    """The kind of each layer, by whether it has this tensor."""
    tensors = facts.checkpoint.tensors
    return [there if f"blk.{layer}.{leaf}" in tensors else elsewhere for layer in range(facts.layers)]


def _lfm2(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "num_dense_layers": facts.leading_dense,
        "layer_types": _kinds(facts, "attn_q.weight", "full_attention", "conv"),
        "norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "conv_L_cache": facts["shortconv.l_cache"],
        "use_expert_bias": facts.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


def _qwen3_next(facts: Facts) -> dict[str, Any]:
    rotating = facts.get("rope.dimension_count", facts.head_dim) / facts.head_dim
    value_heads = facts["ssm.time_step_rank"]
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "norm_topk_prob": True,  # as llama.cpp computes it
        "mlp_only_layers": facts.dense,
        "head_dim": facts.head_dim,
        "attention_bias": facts.has("attn_q.bias"),
        "rope_parameters": rope(facts, partial_rotary_factor=rotating),
        "layer_types": _kinds(facts, "ssm_a", "linear_attention", "full_attention"),
        "linear_conv_kernel_dim": facts["ssm.conv_kernel"],
        "linear_key_head_dim": facts["ssm.state_size"],
        "linear_value_head_dim": facts["ssm.inner_size"] // value_heads,
        "linear_num_key_heads": facts["ssm.group_count"],
        "linear_num_value_heads": value_heads,
    }


def _of_each_key_head(facts: Facts, parts: list[torch.Tensor]) -> torch.Tensor:
    """Queries, keys, values and gates of a key head, and then those of the next."""
    projected, gates = parts
    keys = int(facts["ssm.group_count"]) * int(facts["ssm.state_size"])
    of_kinds = [*projected.split([keys, keys, len(gates)]), gates]
    of_heads = [rows.unflatten(0, (int(facts["ssm.group_count"]), -1)) for rows in of_kinds]
    return torch.cat(of_heads, dim=1).flatten(0, 1)


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
DELTA = {
    f"ssm_{leaf}": f"linear_attn.{name}"
    for leaf, name in {
        "in": "in_proj_qkvz",  # files of 2025
        "ba": "in_proj_ba",
        "conv1d": "conv1d",
        "dt.bias": "dt_bias",
        "a": "A_log",
        "norm": "norm",
        "out": "out_proj",
    }.items()
}
PROJECTED = {"linear_attn.in_proj_qkvz.weight": Made(("attn_qkv.weight", "attn_gate.weight"), _of_each_key_head)}
NORMS = ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm")

TABLE = {
    "lfm2moe": Model("lfm2_moe", "Lfm2MoeForCausalLM", _lfm2, SHORT_CONVOLUTION, experts="feed_forward.experts"),
    "qwen3next": Model(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        _qwen3_next,
        AFTER | SHARED_EXPERT | DELTA,
        turns={f"{norm}.weight": less_one for norm in NORMS} | {"ssm_a": decay},
        made=PROJECTED,
    ),
}
