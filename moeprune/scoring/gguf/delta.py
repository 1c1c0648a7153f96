"""GGUF architectures with the delta rule in most layers: Qwen's gated one, and Kimi's beside latent attention."""

from __future__ import annotations

from typing import Any

import torch

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, Facts, rope
from moeprune.scoring.gguf.model import AFTER, LATENT, SHARED_EXPERT, Model
from moeprune.scoring.gguf.turns import (
    Made,
    Turn,
    decay,
    decay_in_grid,
    kernel,
    less_one,
    logarithm_of_heads,
    one_after_another,
)


def _qwen(facts: Facts) -> dict[str, Any]:
    value_heads = facts["ssm.time_step_rank"]
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "head_dim": facts.head_dim,
        "attention_bias": facts.has("attn_q.bias"),
        "rope_parameters": rope(facts, partial_rotary_factor=facts["rope.dimension_count"] / facts.head_dim),
        "layer_types": facts.kinds("ssm_a", "linear_attention", "full_attention"),
        "linear_conv_kernel_dim": facts["ssm.conv_kernel"],
        "linear_key_head_dim": facts["ssm.state_size"],
        "linear_value_head_dim": facts["ssm.inner_size"] // value_heads,
        "linear_num_key_heads": facts["ssm.group_count"],
        "linear_num_value_heads": value_heads,
    }


def _qwen3_next(facts: Facts) -> dict[str, Any]:
    return _qwen(facts) | {"norm_topk_prob": True, "mlp_only_layers": facts.dense}  # the first as llama.cpp computes it


def _qwen35(facts: Facts) -> dict[str, Any]:
    found, key = _qwen(facts), "rope.dimension_sections"
    sections = [size for size in facts.each(key) if size] or facts[key]  # which says that it is missing
    if not isinstance(sections, list) or len(sections) != 3:
        raise facts.damaged(f"{key} = {sections}")
    return found | {
        "rope_parameters": found["rope_parameters"] | {"mrope_section": sections, "mrope_interleaved": True}
    }


def _of_each_key_head(facts: Facts, parts: list[torch.Tensor]) -> torch.Tensor:
    """Queries, keys, values and gates of a key head, and then those of the next."""
    projected, gates = parts
    keys = int(facts["ssm.group_count"]) * int(facts["ssm.state_size"])
    of_kinds = [*projected.split([keys, keys, len(gates)]), gates]
    of_heads = [rows.unflatten(0, (int(facts["ssm.group_count"]), -1)) for rows in of_kinds]
    return torch.cat(of_heads, dim=1).flatten(0, 1)


def _grouped(facts: Facts, value: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Value heads of each key head together; they lie tiled: the first of every key head, then the second of each."""
    keys, values = int(facts["ssm.group_count"]), int(facts["ssm.time_step_rank"])
    tiled = value[first:].unflatten(0, (values // keys, keys, -1))
    return torch.cat((value[:first], tiled.transpose(0, 1).flatten(0, 2)))


def _grouped_behind_keys(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    return _grouped(facts, value, 2 * int(facts["ssm.group_count"]) * int(facts["ssm.state_size"]))


def _grouped_columns(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    return _grouped(facts, value.T).T


def _grouped_kernel(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    return _grouped_behind_keys(facts, kernel(facts, value))


def _grouped_decay(facts: Facts, value: torch.Tensor) -> torch.Tensor:
    return _grouped(facts, decay(facts, value))


def _delta_and_latent(facts: Facts) -> dict[str, Any]:
    rotary, groups = facts["rope.dimension_count"], facts.get("expert_group_count", 1) or 1
    return {
        "num_key_value_heads": facts["attention.head_count"],
        "num_experts": facts["expert_count"],
        "num_shared_experts": facts["expert_shared_count"],
        "moe_intermediate_size": facts.expert_width,
        "mlp_layer_types": ["dense" if layer in facts.dense else "sparse" for layer in range(facts.layers)],
        "layer_types": facts.kinds("ssm_a", "linear_attention", "full_attention"),
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "n_group": groups,
        "topk_group": facts.get("expert_group_used_count", groups) or groups,
        "kv_lora_rank": facts["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": facts["attention.key_length_mla"] - rotary,
        "v_head_dim": facts["attention.value_length_mla"],
    }


def _kimi(facts: Facts) -> dict[str, Any]:
    return _delta_and_latent(facts) | {
        "norm_topk_prob": True,  # as llama.cpp computes it
        "q_lora_rank": facts.get("attention.q_lora_rank") or None,
        "linear_head_dim": facts["kda.head_dim"],
        "linear_num_heads": facts["attention.head_count"],
        "linear_conv_kernel_dim": facts["ssm.conv_kernel"],
    }


def _bailing(facts: Facts) -> dict[str, Any]:
    if any(facts.each("swiglu_clamp_exp") + facts.each("swiglu_clamp_shexp")):
        raise InputError(f"{facts.file}: its experts clamp what they compute, which transformers does not; {INSTEAD}")
    return _delta_and_latent(facts) | {
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "first_k_dense_replace": facts.leading_dense,
        "head_dim": facts["kda.head_dim"],
        "short_conv_kernel_size": facts["ssm.conv_kernel"],
        "kda_safe_gate": bool(facts.get("kda.safe_gate", True)),
        "kda_lower_bound": facts["kda.gate_lower_bound"],
        "rope_theta": facts.get("rope.freq_base", 10000.0),
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
SHIFTED: dict[str, Turn] = {f"{norm}.weight": less_one for norm in NORMS}
QWEN35 = DELTA | {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
}
GROUPED: dict[str, Turn] = {
    "attn_qkv.weight": _grouped_behind_keys,
    "attn_gate.weight": _grouped,
    "ssm_alpha.weight": _grouped,
    "ssm_beta.weight": _grouped,
    "ssm_dt.bias": _grouped,
    "ssm_a": _grouped_decay,
    "ssm_conv1d.weight": _grouped_kernel,
    "ssm_out.weight": _grouped_columns,
}

FORGETTING = LATENT | {
    "ssm_a": "self_attn.forget_gate.A_log",
    "ssm_dt.bias": "self_attn.forget_gate.dt_bias",
    **{f"ssm_f_{x}": f"self_attn.forget_gate.f_{x}_proj" for x in "ab"},
    **{f"ssm_g_{x}": f"self_attn.g_{x}_proj" for x in "ab"},
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
}
BAILING = FORGETTING | {
    "ssm_f_a": "self_attn.forget_gate.f_proj",
    "ssm_g_a": "self_attn.g_proj",
    "attn_gate": "self_attn.g_proj",
}
KERNELS = tuple(f"ssm_conv1d_{x}.weight" for x in "qkv")

TABLE = {
    "qwen3next": Model(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        _qwen3_next,
        AFTER | SHARED_EXPERT | DELTA,
        turns=SHIFTED | {"ssm_a": decay},
        made=PROJECTED,
    ),
    "qwen35moe": Model(
        "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", _qwen35, AFTER | SHARED_EXPERT | QWEN35, turns=SHIFTED | GROUPED
    ),
    "kimi-linear": Model(
        "kimi_linear",
        "KimiLinearForCausalLM",
        _kimi,
        FORGETTING,
        turns={"ssm_a": decay_in_grid} | dict.fromkeys(KERNELS, kernel),
        made={"self_attn.conv1d.weight": Made(KERNELS, one_after_another)},
    ),
    "bailingmoe3": Model(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        _bailing,
        BAILING,
        turns={"ssm_a": logarithm_of_heads} | dict.fromkeys(KERNELS, kernel),
        made={"self_attn.conv1d.weight": Made(KERNELS, one_after_another)},
    ),
}
