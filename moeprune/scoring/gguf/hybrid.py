"""GGUF architectures with attention in some layers, and a short convolution or Mamba's state in the others."""

from __future__ import annotations

from typing import Any

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, Facts
from moeprune.scoring.gguf.model import UNGATED, Model, feed_forward, shared_expert
from moeprune.scoring.gguf.plain import GRANITE, GRANITE_SHARED, granite
from moeprune.scoring.gguf.turns import (
    decay,
    decay_of_heads,
    flat,
)


def _mamba(target: str) -> dict[str, str]:
    """A layer with a state: Mamba's names."""
    names = {"in": "in_proj", "conv1d": "conv1d", "dt.bias": "dt_bias", "a": "A_log", "d": "D", "norm": "norm"}
    return {f"ssm_{leaf}": f"{target}.{name}" for leaf, name in (names | {"out": "out_proj"}).items()}


def _lfm2(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "num_dense_layers": facts.leading_dense,
        "layer_types": facts.kinds("attn_q.weight", "full_attention", "conv"),
        "norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "conv_L_cache": facts["shortconv.l_cache"],
        "use_expert_bias": facts.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


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


def _granite_hybrid(facts: Facts) -> dict[str, Any]:
    heads, width = facts["ssm.time_step_rank"], facts["ssm.inner_size"]
    return granite(facts) | {
        "shared_intermediate_size": facts["expert_shared_feed_forward_length"],
        "position_embedding_type": "rope" if facts.get("rope.scaling.finetuned", True) else None,
        "layer_types": facts.kinds("ssm_a", "linear_attention", "full_attention"),
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
    "nemotron_h_moe": Model(
        "nemotron_h",
        "NemotronHForCausalLM",
        _nemotron,
        NEMOTRON,
        experts="mixer.experts",
        stacks=UNGATED,
        turns=OF_HEADS,
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
