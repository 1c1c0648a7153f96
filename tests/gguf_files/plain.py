"""Families whose layers all attend and whose routers have no groups, beside those that need no file of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Config, Family, Written, block, rotated, sigmoid


def _gemma4_keys(config: Config) -> Config:
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    wide = next(iter(config["per_layer_config"].values()))
    rope = config["rope_parameters"]
    return {
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "attention.head_count_kv": [
            config["num_key_value_heads"] if s else wide["num_key_value_heads"] for s in sliding
        ],
        "attention.key_length": wide["head_dim"],
        "attention.value_length": wide["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "feed_forward_length": [config["intermediate_size"] * (1 if i < own else 2) for i in range(len(sliding))],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "expert_used_count": config["top_k_experts"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "rope.dimension_count": wide["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
    }


def _gemma4(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Names without an ending get one, and full attention's frequencies are divided by those of another tensor."""
    places = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
    for ending, place in places.items():
        if name.endswith(ending):
            yield f"{block(name)}.{place}", array, lambda value: {name: value}
    if name == "model.norm.weight":
        yield stored_as, array, lambda value: {name: value}
        half = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
        turned = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        divisors = np.array([1.0] * turned + [1e30] * (half - turned), dtype=np.float32)
        yield "rope_freqs.weight", divisors, lambda _: {}


def _mimo2_keys(config: Config) -> Config:
    rope = config["rope_parameters"]
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    return sigmoid(config) | {
        "attention.sliding_window_pattern": sliding,
        "attention.head_count_kv": [config["num_key_value_heads"] * (2 if slides else 1) for slides in sliding],
        "attention.value_length": config["v_head_dim"],
        "attention.value_scale": config["attention_value_scale"],
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * rope["full_attention"]["partial_rotary_factor"]),
    }


def _cohere2_keys(config: Config) -> Config:
    return sigmoid(config) | {
        "feed_forward_length": config["prefix_dense_intermediate_size"],
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "expert_shared_count": config["num_shared_experts"],
        "expert_shared_feed_forward_length": config["intermediate_size"] * config["num_shared_experts"],
        "logit_scale": config["logit_scale"],
    }


def _mellum_keys(config: Config) -> Config:
    rope = config["rope_parameters"]
    return {
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "rope.freq_base": rope["full_attention"]["rope_theta"],
        "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": YARN["factor"],
        "rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
    }


def _granite_swa_keys(config: Config) -> Config:
    return {
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        "attention.rope_pattern": [theta > 0 for theta in config["layer_rope_theta"]],
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
    }


def _granite_swa(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Gate and up lie in one."""
    places = {
        "router.weight": "ffn_gate_inp.weight",
        "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        "shared_mlp.input_linear.weight": "ffn_up_shexp.weight",
        "sinks": "attn_sinks.weight",
    }
    for ending, place in places.items():
        if name.endswith(ending):
            yield f"{block(name)}.{place}", array, lambda value: {name: value}
    yield from rotated(config, stored_as, name, array)


def _dbrx_keys(config: Config) -> Config:
    attention, experts = config["attn_config"], config["ffn_config"]
    return {
        "feed_forward_length": experts["ffn_hidden_size"],
        "attention.head_count_kv": attention["kv_n_heads"],
        "attention.clamp_kqv": attention["clip_qkv"],
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": attention["rope_theta"],
        "expert_count": experts["moe_num_experts"],
        "expert_used_count": experts["moe_top_k"],
    }


def _dbrx(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Experts apart, their last matrix turned."""
    if ".experts." not in name:
        return
    each = array.reshape(config["ffn_config"]["moe_num_experts"], -1, array.shape[-1])
    if name.endswith("w2"):
        turned = each.swapaxes(1, 2)
        yield stored_as, turned, lambda value: {name: value.swapaxes(1, 2).reshape(array.shape)}
    else:
        yield stored_as, each, lambda value: {name: value.reshape(array.shape)}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
PLAIN = {
    "dbrx": Family("dbrx", keys=_dbrx_keys, turned=_dbrx),
    "mimo_v2_flash": Family(
        "mimo2",
        overrides={
            "v_head_dim": 8,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
                for kind, theta in {"full_attention": 50000.0, "sliding_attention": 10000.0}.items()
            },
        },
        keys=_mimo2_keys,
    ),
    "cohere2_moe": Family(
        "cohere2moe",
        overrides={
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "prefix_dense_intermediate_size": 96,
            "expert_selection_fn": "sigmoid",
        },
        keys=_cohere2_keys,
        named_as="deepseek2",
    ),
    "mellum": Family(
        "mellum",
        overrides={
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50000.0},
            },
        },
        keys=_mellum_keys,
        named_as="qwen3moe",
    ),
    "granitemoe_swa": Family(
        "granite_swa",
        overrides={"layer_rope_theta": [10000.0, 0, 10000.0]},
        keys=_granite_swa_keys,
        turned=_granite_swa,
        named_as="granitemoe",
    ),
    "gemma4_text": Family(
        "gemma4",
        overrides={
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
        },
        keys=_gemma4_keys,
        turned=_gemma4,
    ),
}
