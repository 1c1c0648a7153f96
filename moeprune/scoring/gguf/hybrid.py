"""GGUF architectures whose layers are of several kinds: attention in some, a convolution or a state in others."""

from __future__ import annotations

from typing import Any

import torch

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, Facts, rope
from moeprune.scoring.gguf.model import AFTER, LATENT, SHARED_EXPERT, UNGATED, Model, feed_forward, shared_expert
from moeprune.scoring.gguf.plain import GRANITE, GRANITE_SHARED, granite
from moeprune.scoring.gguf.turns import (
    Made,
    decay,
    decay_in_grid,
    decay_of_heads,
    flat,
    kernel,
    less_one,
    logarithm_of_heads,
    one_after_another,
)


def _kinds(facts: Facts, leaf: str, there: str, elsewhere: str) -> list[str]:
    """The kind of each layer, by whether it has this tensor."""
    tensors = facts.checkpoint.tensors
    return [there if f"blk.{layer}.{leaf}" in tensors else elsewhere for layer in range(facts.layers)]


def _mamba(target: str) -> dict[str, str]:
    """A layer with a state: Mamba's names."""
    names = {"in": "in_proj", "conv1d": "conv1d", "dt.bias": "dt_bias", "a": "A_log", "d": "D", "norm": "norm"}
    return {f"ssm_{leaf}": f"{target}.{name}" for leaf, name in (names | {"out": "out_proj"}).items()}


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


def _nemotron(facts: Facts) -> dict[str, Any]:
    heads, groups = facts["ssm.time_step_rank"], facts.get("expert_group_count", 1) or 1
    kinds = (("ssm_a", "linear_attention"), ("attn_q.weight", "full_attention"), ("ffn_gate_inp.weight", "moe"))
    tensors = facts.checkpoint.tensors
    return {
        "layers_block_type": [
            next((kind for leaf, kind in kinds if f"blk.{layer}.{leaf}" in tensors), "mlp")
            for layer in range(facts.layers)
        ],
        "head_dim": facts.head_dim,
        "layer_norm_epsilon": facts["attention.layer_norm_rms_epsilon"],
        "mamba_num_heads": heads,
        "mamba_head_dim": facts["ssm.inner_size"] // heads,
        "ssm_state_size": facts["ssm.state_size"],
        "n_groups": facts["ssm.group_count"],
        "conv_kernel": facts["ssm.conv_kernel"],
        "use_conv_bias": facts.has("ssm_conv1d.bias"),
        "use_bias": facts.has("ssm_in.bias"),
        "n_routed_experts": facts["expert_count"],
        "n_shared_experts": facts["expert_shared_count"],
        "moe_intermediate_size": facts.expert_width,
        "moe_shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "moe_latent_size": next(iter(facts.shape("ffn_latent_down.weight")), None),
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": facts.get("expert_group_used_count", groups) or groups,
    }


def _delta_and_latent(facts: Facts) -> dict[str, Any]:
    rotary, groups = facts["rope.dimension_count"], facts.get("expert_group_count", 1) or 1
    return {
        "num_key_value_heads": facts["attention.head_count"],
        "num_experts": facts["expert_count"],
        "num_shared_experts": facts["expert_shared_count"],
        "moe_intermediate_size": facts.expert_width,
        "mlp_layer_types": ["dense" if layer in facts.dense else "sparse" for layer in range(facts.layers)],
        "layer_types": _kinds(facts, "ssm_a", "linear_attention", "full_attention"),
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


def _granite_hybrid(facts: Facts) -> dict[str, Any]:
    heads, width = facts["ssm.time_step_rank"], facts["ssm.inner_size"]
    return granite(facts) | {
        "shared_intermediate_size": facts["expert_shared_feed_forward_length"],
        "position_embedding_type": "rope" if facts.get("rope.scaling.finetuned", True) else None,
        "layer_types": _kinds(facts, "ssm_a", "linear_attention", "full_attention"),
        "mamba_n_heads": heads,
        "mamba_d_head": width // heads,
        "mamba_n_groups": facts["ssm.group_count"],
        **_mamba_sizes(facts),
    }


def _jamba(facts: Facts) -> dict[str, Any]:
    attends, routes = _every(facts, "attn_q.weight"), _every(facts, "ffn_gate_inp.weight")
    return {
        "num_experts": facts["expert_count"],
        "attn_layer_offset": attends.start,
        "attn_layer_period": attends.step,
        "expert_layer_offset": routes.start,
        "expert_layer_period": routes.step,
        "mamba_dt_rank": facts["ssm.time_step_rank"],
        **_mamba_sizes(facts),
    }


def _mamba_sizes(facts: Facts) -> dict[str, Any]:
    return {
        "mamba_d_state": facts["ssm.state_size"],
        "mamba_d_conv": facts["ssm.conv_kernel"],
        "mamba_expand": facts["ssm.inner_size"] // facts["embedding_length"],
        "mamba_conv_bias": facts.has("ssm_conv1d.bias"),
        "mamba_proj_bias": facts.has("ssm_in.bias"),
    }


def _every(facts: Facts, leaf: str) -> range:
    """The layers that have this tensor, which come at equal distances."""
    layers = [layer for layer in range(facts.layers) if f"blk.{layer}.{leaf}" in facts.checkpoint.tensors]
    step = layers[1] - layers[0] if len(layers) > 1 else facts.layers
    found = range(layers[0] % step if layers else 0, facts.layers, step)
    if list(found) != layers:
        raise InputError(f"{facts.file}: layers with {leaf} come at unequal distances ({layers}); {INSTEAD}")
    return found


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

NEMOTRON = {
    "token_embd.weight": "model.embeddings.weight",
    "output_norm.weight": "model.norm_f.weight",
    "attn_norm": "norm",
    **{f"attn_{x}": f"mixer.{x}_proj" for x in "qkv"},
    "attn_output": "mixer.o_proj",
    **_mamba("mixer"),
    **feed_forward("mixer"),
    **shared_expert("mixer.shared_experts"),
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}
OF_HEADS = {"ssm_a": decay_of_heads, "ssm_d": flat, "ssm_norm.weight": flat}

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
JAMBA = {
    "output_norm.weight": "model.final_layernorm.weight",
    "ffn_norm": "pre_ff_layernorm",
    **feed_forward("feed_forward"),
    "ffn_gate_inp": "feed_forward.router",
    **_mamba("mamba"),
    "ssm_x": "mamba.x_proj",
    "ssm_dt": "mamba.dt_proj",
    "ssm_dt.bias": "mamba.dt_proj.bias",
    **{f"ssm_{x}_norm": f"mamba.{x}_layernorm" for x in ("dt", "b", "c")},
}

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
    "nemotron_h_moe": Model(
        "nemotron_h",
        "NemotronHForCausalLM",
        _nemotron,
        NEMOTRON,
        experts="mixer.experts",
        stacks=UNGATED,
        turns=OF_HEADS,
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
    "granitehybrid": Model(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        _granite_hybrid,
        GRANITE | _mamba("mamba"),
        experts="block_sparse_moe.experts",
        turns=OF_HEADS,
        made={"shared_mlp.input_linear.weight": GRANITE_SHARED},
        permuted=True,
    ),
    "jamba": Model("jamba", "JambaForCausalLM", _jamba, JAMBA, experts="feed_forward.experts", turns={"ssm_a": decay}),
}
