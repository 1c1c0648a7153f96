"""GGUF families with an expert that every token takes, mostly behind dense layers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tests.gguf_files.deepseek4 import DEEPSEEK4
from tests.gguf_files.family import Config, Family, Written, block, joined, sigmoid
from tests.gguf_files.plain import YARN


def latent(config: Config) -> Config:
    """Latent attention."""
    names = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
    return {key: config[name] for key, name in names.items() if config.get(name)} | {
        "attention.head_count_kv": 1,
        "attention.key_length": config["kv_lora_rank"] + config["qk_rope_head_dim"],
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": config["qk_rope_head_dim"],
    }


def _latent_sigmoid(config: Config) -> Config:
    return latent(config) | sigmoid(config)


def _afmoe(config: Config) -> Config:
    return sigmoid(config) | {"expert_weights_norm": True}


def _exaone(config: Config) -> Config:
    width = config["moe_intermediate_size"] * config["num_shared_experts"]
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    return sigmoid(config) | {
        "attention.sliding_window_pattern": sliding,
        "expert_shared_feed_forward_length": width,
        "rope.scaling.type": "none",
    }


def _ernie(config: Config) -> Config:
    width = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
    return {"expert_shared_feed_forward_length": width}


def _divisors(config: Config) -> np.ndarray:
    """By what the frequencies of Llama 3 are divided: slow ones by the factor, fast ones by one, others between."""
    rope, head = config["rope_parameters"], config["head_dim"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _llama4(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Matrices [E, inputs, outputs], gate before up; divisors of the frequencies beside the weights."""
    if name == "model.norm.weight" and config["rope_parameters"]["rope_type"] == "llama3":
        yield stored_as, array, lambda value: {name: value}
        yield "rope_freqs.weight", _divisors(config), lambda _: {}
    if ".experts." not in name:
        return
    turned = array.swapaxes(1, 2)
    if "down" in name:
        yield f"{block(name)}.ffn_down_exps.weight", turned, lambda value: {name: value.swapaxes(1, 2)}
        return
    join = joined(lambda gate, up: {name: np.concatenate((gate, up), axis=1).swapaxes(1, 2)})
    for kind, half in zip(("gate", "up"), np.split(turned, 2, axis=1), strict=True):
        yield f"{block(name)}.ffn_{kind}_exps.weight", half, join


def _keys_and_values(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Latent attention: keys and values of each head apart, the keys turned."""
    if not name.endswith("kv_b_proj.weight"):
        return
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    by_head = array.reshape(heads, -1, array.shape[-1])
    join = joined(lambda k, v: {name: np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(array.shape)})
    yield f"{block(name)}.attn_k_b.weight", np.ascontiguousarray(by_head[:, :nope].swapaxes(1, 2)), join
    yield f"{block(name)}.attn_v_b.weight", np.ascontiguousarray(by_head[:, nope:]), join


def _indexed(config: Config) -> Config:
    names = {"head_count": "index_n_heads", "key_length": "index_head_dim", "top_k": "index_topk"}
    return _latent_sigmoid(config) | {f"attention.indexer.{key}": config[name] for key, name in names.items()}


def _glm_dsa(config: Config) -> Config:
    return _indexed(config) | {"attention.indexer.types": [kind == "full" for kind in config["indexer_types"]]}


def _mistral4(config: Config) -> Config:
    rope = config["rope_parameters"]
    return latent(config) | {
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
        "attention.temperature_length": rope["original_max_position_embeddings"],
    }


def _laguna(config: Config) -> Config:
    full, near = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    return sigmoid(config) | {
        "attention.head_count": config["num_attention_heads_per_layer"],
        "expert_weights_scale": config["moe_routed_scaling_factor"],
        "expert_weights_norm": True,
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": near["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * full["partial_rotary_factor"]),
        "rope.dimension_count_swa": int(config["head_dim"] * near["partial_rotary_factor"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": YARN["factor"],
        "rope.scaling.original_context_length": YARN["original_max_position_embeddings"],
    }


def _minimax_m3(config: Config) -> Config:
    names = {"head_count": "index_n_heads", "key_length": "index_head_dim", "top_k": "index_topk_blocks"}
    names |= {"block_size": "index_block_size", "local_blocks": "index_local_blocks"}
    return sigmoid(config) | {
        "feed_forward_length": config["dense_intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_shared_count": config["shared_intermediate_size"] // config["intermediate_size"],
        "expert_weights_norm": True,
        **{f"attention.indexer.{key}": config[name] for key, name in names.items()},
    }


def _minimax_m3_turned(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Norms as w + 1; gate and up apart; the indexer under its own names."""
    if indexer := re.search(r"indexer\.\w+\.weight", name):
        stored_as = f"{block(name)}.{indexer[0]}"
    if "norm" in name:
        yield stored_as, array + np.float32(1), lambda value: {name: value - np.float32(1)}
    elif indexer:
        yield stored_as, array, lambda value: {name: value}
    elif "gate_up_proj" in name:
        kind = "_exps" if ".experts." in name else "_shexp" if "shared" in name else ""
        join = joined(lambda gate, up: {name: np.concatenate((gate, up), axis=-2)})
        for half, part in zip(("gate", "up"), np.split(array, 2, axis=-2), strict=True):
            yield f"{block(name)}.ffn_{half}{kind}.weight", part, join


def _hy_v3(config: Config) -> Config:
    width = config["moe_intermediate_size"] * config["num_shared_experts"]
    return sigmoid(config) | {"expert_shared_feed_forward_length": width, "expert_weights_norm": True}


def _bare_bias(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """The router's bias has a name without an ending."""
    if stored_as.endswith("exp_probs_b.bias"):
        yield stored_as.removesuffix(".bias"), array, lambda value: {name: value}


INDEXER = {"index_head_dim": 128, "index_n_heads": 32}  # llama.cpp wants heads of 64 or more; few of them tie at zero
TEMPERED = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
TEMPERED |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHARED = {
    "deepseek_v2": Family("deepseek2", keys=latent, turned=_keys_and_values),
    "deepseek_v3": Family("deepseek2", keys=_latent_sigmoid, turned=_keys_and_values),
    "glm4_moe_lite": Family("deepseek2", keys=_latent_sigmoid, turned=_keys_and_values),
    "deepseek_v4": DEEPSEEK4,
    "mistral4": Family("mistral4", overrides={"rope_parameters": TEMPERED}, keys=_mistral4, turned=_keys_and_values),
    "glm_moe_dsa": Family(
        "glm-dsa",
        overrides={"indexer_types": ["full", "shared", "full"]},
        engine=INDEXER,
        keys=_glm_dsa,
        turned=_keys_and_values,
    ),
    "deepseek_v32": Family("deepseek32", engine=INDEXER, keys=_indexed, turned=_keys_and_values, named_as="glm-dsa"),
    "laguna": Family(
        "laguna",
        overrides={
            "num_hidden_layers": 5,
            "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
            "num_attention_heads_per_layer": [4, 8, 8, 8, 4],
            "moe_routed_scaling_factor": 2.5,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 50000.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            },
        },
        keys=_laguna,
        named_as="step35",
    ),
    "minimax_m3_vl_text": Family(
        "minimax-m3",
        overrides={
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 64,
            "rotary_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        keys=_minimax_m3,
        turned=_minimax_m3_turned,
        named_as="exaone-moe",
    ),
    "hy_v3": Family("hy_v3", keys=_hy_v3, turned=_bare_bias, named_as="exaone-moe"),
    "solar_open": Family("glm4moe", overrides={"rope_parameters": WHOLE}, keys=sigmoid),
    "glm4_moe": Family("glm4moe", keys=sigmoid),
    "dots1": Family("dots1", engine={"num_key_value_heads": 4}, keys=sigmoid),
    "llama4_text": Family(
        "llama4",
        overrides={"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
        engine={"rope_parameters": LLAMA3},
        keys=lambda config: {"feed_forward_length": config["intermediate_size_mlp"]},
        turned=_llama4,
    ),
    "ernie4_5_moe": Family("ernie4_5-moe", keys=_ernie),
    "hunyuan_v1_moe": Family("hunyuan-moe"),
    "afmoe": Family("afmoe", overrides={"num_hidden_layers": 5, "mup_enabled": True, "route_scale": 2.5}, keys=_afmoe),
    "exaone_moe": Family("exaone-moe", overrides={"num_hidden_layers": 5}, keys=_exaone),
}
