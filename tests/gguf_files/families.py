"""What sets the GGUF file of a family apart, as llama.cpp's converter makes it. To add a family, add an entry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Arrays, Config, Family, Written, block, joined, rotated, sigmoid
from tests.gguf_files.plain import PLAIN


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


def _lfm2(config: Config) -> Config:
    heads = [config["num_key_value_heads"] * (kind != "conv") for kind in config["layer_types"]]
    return sigmoid(config) | {"attention.head_count_kv": heads}


def _qwen35_keys(config: Config) -> Config:
    return {
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": config.get("full_attention_interval", 2),
        "rope.dimension_sections": [*config["rope_parameters"]["mrope_section"], 0],
    }


def _granite(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    if name.endswith("input_linear.weight"):
        gate, up = np.split(array, 2, axis=1)
        whole = joined(lambda gate, up: {name: np.concatenate((gate, up), axis=1)})
        yield f"{block(name)}.ffn_gate_exps.weight", gate, whole
        yield f"{block(name)}.ffn_up_exps.weight", up, whole
    yield from rotated(config, stored_as, name, array)


def _qwen35(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Norms as w + 1, decay as -exp, and value heads tiled: the first of every key head, then the second of each."""
    if "norm" in name and "linear_attn" not in name:
        yield stored_as, array + np.float32(1), lambda value: {name: value - np.float32(1)}
    if "linear_attn" not in name or name.endswith("norm.weight"):
        return
    keys, each = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    if "out_proj" in name:
        turned = array.reshape(len(array), keys, each, -1).swapaxes(1, 2).reshape(array.shape)
        yield stored_as, turned, lambda v: {name: v.reshape(len(v), each, keys, -1).swapaxes(1, 2).reshape(v.shape)}
        return
    flat = array.reshape(len(array), -1)
    start = 2 * keys * config["linear_key_head_dim"] if "qkv" in name or "conv1d" in name else 0
    tail = flat[start:].reshape(keys, each, -1).swapaxes(0, 1).reshape(-1, flat.shape[1])
    tiled = np.concatenate((flat[:start], tail))

    def back(value: np.ndarray) -> Arrays:
        value = value.reshape(flat.shape)
        tail = value[start:].reshape(each, keys, -1).swapaxes(0, 1).reshape(-1, flat.shape[1])
        whole = np.concatenate((value[:start], tail)).reshape(array.shape)
        return {name: np.log(-whole) if name.endswith("A_log") else whole}

    tiled = tiled.reshape(-1) if array.ndim == 1 else tiled
    yield stored_as, -np.exp(tiled) if name.endswith("A_log") else tiled, back


def _llama4(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Matrices [E, inputs, outputs], gate before up."""
    if ".experts." not in name:
        return
    turned = array.swapaxes(1, 2)
    if "down" in name:
        yield f"{block(name)}.ffn_down_exps.weight", turned, lambda value: {name: value.swapaxes(1, 2)}
        return
    join = joined(lambda gate, up: {name: np.concatenate((gate, up), axis=1).swapaxes(1, 2)})
    for kind, half in zip(("gate", "up"), np.split(turned, 2, axis=1), strict=True):
        yield f"{block(name)}.ffn_{kind}_exps.weight", half, join


def _gpt_oss(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Columns of gate and up by turns; matrices [E, inputs, outputs]."""
    if ".experts." not in name:
        return
    ending = "bias" if name.endswith("bias") else "weight"
    turned = array.swapaxes(1, 2) if ending == "weight" else array
    back = (lambda value: value.swapaxes(1, 2)) if ending == "weight" else (lambda value: value)
    if "down" in name:
        yield f"{block(name)}.ffn_down_exps.{ending}", turned, lambda value: {name: back(value)}
        return
    join = joined(lambda gate, up: {name: back(np.stack((gate, up), axis=2).reshape(turned.shape))})
    yield f"{block(name)}.ffn_gate_exps.{ending}", turned[:, ::2], join
    yield f"{block(name)}.ffn_up_exps.{ending}", turned[:, 1::2], join


def _keys_and_values(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Latent attention: keys and values of each head apart, the keys turned."""
    if not name.endswith("kv_b_proj.weight"):
        return
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    by_head = array.reshape(heads, -1, array.shape[-1])
    join = joined(lambda k, v: {name: np.concatenate((k.swapaxes(1, 2), v), axis=1).reshape(array.shape)})
    yield f"{block(name)}.attn_k_b.weight", np.ascontiguousarray(by_head[:, :nope].swapaxes(1, 2)), join
    yield f"{block(name)}.attn_v_b.weight", np.ascontiguousarray(by_head[:, nope:]), join


FAMILIES = PLAIN | {
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe", overrides={"norm_topk_prob": True}),
    "mixtral": Family("llama", overrides={"sliding_window": None}, turned=rotated),
    "gpt_oss": Family(  # llama.cpp rounds its scaled positions in a way of its own
        "gpt-oss", engine={"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, turned=_gpt_oss
    ),
    "deepseek_v2": Family("deepseek2", keys=latent, turned=_keys_and_values),
    "deepseek_v3": Family("deepseek2", keys=_latent_sigmoid, turned=_keys_and_values),
    "glm4_moe_lite": Family("deepseek2", keys=_latent_sigmoid, turned=_keys_and_values),
    "glm4_moe": Family("glm4moe", keys=sigmoid),
    "dots1": Family("dots1", engine={"num_key_value_heads": 4}, keys=sigmoid),
    "llama4_text": Family(
        "llama4",
        overrides={"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
        keys=lambda config: {"feed_forward_length": config["intermediate_size_mlp"]},
        turned=_llama4,
    ),
    "ernie4_5_moe": Family("ernie4_5-moe", keys=_ernie),
    "hunyuan_v1_moe": Family("hunyuan-moe"),
    "afmoe": Family("afmoe", overrides={"num_hidden_layers": 5, "mup_enabled": True, "route_scale": 2.5}, keys=_afmoe),
    "exaone_moe": Family("exaone-moe", overrides={"num_hidden_layers": 5}, keys=_exaone),
    "minimax_m2": Family("minimax-m2", keys=sigmoid),
    "olmoe": Family("olmoe", engine={"num_key_value_heads": 4}),
    "granitemoe": Family("granitemoe", turned=_granite),
    "lfm2_moe": Family("lfm2moe", keys=_lfm2),
    "qwen3_5_moe_text": Family(
        "qwen35moe",
        overrides={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
        keys=_qwen35_keys,
        turned=_qwen35,
        exact=False,
    ),
}
