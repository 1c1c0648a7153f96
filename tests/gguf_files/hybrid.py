"""Families whose layers are of several kinds, as llama.cpp's converter makes their files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Arrays, Config, Family, Written, block, granite, joined, sigmoid
from tests.gguf_files.shared import SHARED, latent


def _lfm2(config: Config) -> Config:
    heads = [config["num_key_value_heads"] * (kind != "conv") for kind in config["layer_types"]]
    return sigmoid(config) | {"attention.head_count_kv": heads}


def _qwen35_keys(config: Config) -> Config:
    return {
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": config.get("full_attention_interval", 2),
        "rope.dimension_sections": [*config["rope_parameters"]["mrope_section"], 0],
    }


def _qwen3_next_keys(config: Config) -> Config:
    return {
        "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": 2,
    }


def _shifted(stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Norms as w + 1."""
    if "norm" in name and "linear_attn" not in name:
        yield stored_as, array + np.float32(1), lambda value: {name: value - np.float32(1)}


def _logarithm(value: np.ndarray) -> np.ndarray:
    """In 64 bits, so that every library has the same."""
    return np.log(value.astype(np.float64)).astype(np.float32)


def _decayed(stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """A_log as -exp."""
    if name.endswith("A_log"):
        yield stored_as, -np.exp(array), lambda value: {name: _logarithm(-value)}


def _qwen3_next(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Queries, keys, values and gates of each key head become all of each kind, gates apart."""
    yield from _shifted(stored_as, name, array)
    yield from _decayed(stored_as, name, array)
    if not name.endswith("in_proj_qkvz.weight"):
        return
    heads, width, of_key = config["linear_num_key_heads"], array.shape[-1], config["linear_key_head_dim"]
    of_value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // heads
    parts = np.split(array.reshape(heads, -1, width), np.cumsum([of_key, of_key, of_value]), axis=1)
    *projected, gates = [part.reshape(-1, width) for part in parts]

    def join(qkv: np.ndarray, z: np.ndarray) -> Arrays:
        ends = np.cumsum([heads * of_key, heads * of_key])
        by_head = [part.reshape(heads, -1, width) for part in (*np.split(qkv, ends), z)]
        return {name: np.concatenate(by_head, axis=1).reshape(array.shape)}

    whole = joined(join)
    yield f"{block(name)}.attn_qkv.weight", np.concatenate(projected), whole
    yield f"{block(name)}.attn_gate.weight", gates, whole


def _qwen35(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Norms as w + 1, decay as -exp, and value heads tiled: the first of every key head, then the second of each."""
    yield from _shifted(stored_as, name, array)
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
        return {name: _logarithm(-whole) if name.endswith("A_log") else whole}

    tiled = tiled.reshape(-1) if array.ndim == 1 else tiled
    yield stored_as, -np.exp(tiled) if name.endswith("A_log") else tiled, back


def _nemotron_keys(config: Config) -> Config:
    kinds = config["layers_block_type"]
    return sigmoid(config) | {
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.head_count_kv": [config["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "feed_forward_length": [config["moe_intermediate_size"] * (kind == "moe") for kind in kinds],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": config["mamba_num_heads"],
        "moe_latent_size": config["moe_latent_size"],
    }


def _mamba(groups: int, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Heads as a column, the norm with a row for each group."""
    column, log = (-1, 1), name.endswith("A_log")
    if log or name.endswith(".D"):
        turned = (-np.exp(array) if log else array).reshape(column)
        yield stored_as, turned, lambda value: {name: (_logarithm(-value) if log else value).reshape(array.shape)}
    elif stored_as.endswith("ssm_norm.weight"):
        yield stored_as, array.reshape(groups, -1), lambda value: {name: value.reshape(array.shape)}


def _nemotron(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    yield from _mamba(config["n_groups"], stored_as, name, array)


def _kimi_keys(config: Config) -> Config:
    attends = [int(kind == "full_attention") for kind in config["layer_types"]]
    own = {"kda.head_dim": config["linear_head_dim"], "attention.head_count_kv": attends}
    return latent(config) | sigmoid(config) | own


def _kimi(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """Four axes for the convolutions and the decay."""
    yield from SHARED["deepseek_v3"].turned(config, stored_as, name, array)
    yield from _decayed(stored_as, name, array)
    if "conv1d" in name:
        yield stored_as, array.reshape(1, len(array), 1, -1), lambda value: {name: value.reshape(array.shape)}


def _granite_keys(config: Config) -> Config:
    attends = [config["num_key_value_heads"] * (kind == "full_attention") for kind in config["layer_types"]]
    return {
        "attention.head_count_kv": attends,
        "rope.scaling.finetuned": config["position_embedding_type"] == "rope",
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.time_step_rank": config["mamba_n_heads"],
    }


def _granite(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    yield from granite(config, stored_as, name, array)
    yield from _mamba(config["mamba_n_groups"], stored_as, name, array)


def _jamba_keys(config: Config) -> Config:
    period, offset = config["attn_layer_period"], config["attn_layer_offset"]
    attends = [layer % period == offset for layer in range(config["num_hidden_layers"])]
    return {
        "attention.head_count_kv": [config["num_key_value_heads"] * there for there in attends],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.inner_size": config["mamba_expand"] * config["hidden_size"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.time_step_rank": config["mamba_dt_rank"],
    }


def _jamba(_config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    yield from _decayed(stored_as, name, array)


GRANITE = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}


def _bailing_keys(config: Config) -> Config:
    bound = {"kda.safe_gate": True, "kda.gate_lower_bound": config["kda_lower_bound"]}
    return _kimi_keys(config) | bound | {"ssm.conv_kernel": config["short_conv_kernel_size"]}


def _bailing(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    """As Kimi Linear, but A_log as exp, and two projections that gguf's older tables do not know."""
    if name.endswith("A_log"):
        yield stored_as, np.exp(array).reshape(-1, 1), lambda value: {name: _logarithm(value).reshape(array.shape)}
    elif name.endswith(("f_proj.weight", "g_proj.weight")):
        full = config["layer_types"][int(name.split(".")[2])] == "full_attention"
        leaf = "ssm_f_a" if "f_proj" in name else "attn_gate" if full else "ssm_g_a"
        yield f"{block(name)}.{leaf}.weight", array, lambda value: {name: value}
    else:
        yield from _kimi(config, stored_as, name, array)


HYBRID = {
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
    ),
    "qwen3_next": Family("qwen3next", keys=_qwen3_next_keys, turned=_qwen3_next),
    "kimi_linear": Family(  # llama.cpp adds another epsilon to the lengths of queries and keys, which short ones show
        "kimi-linear", engine={"initializer_range": 0.1}, keys=_kimi_keys, turned=_kimi
    ),
    "granitemoehybrid": Family(
        "granitehybrid",
        overrides=GRANITE | {"mamba_chunk_size": 256, "mamba_n_groups": 2},
        keys=_granite_keys,
        turned=_granite,
    ),
    "jamba": Family("jamba", overrides={"num_hidden_layers": 4}, keys=_jamba_keys, turned=_jamba),
    "bailing_hybrid": Family(
        "bailingmoe3",
        overrides={"kda_lower_bound": -3.0, "n_group": 2, "topk_group": 1},
        engine={"initializer_range": 0.1},
        keys=_bailing_keys,
        turned=_bailing,
        named_as="kimi-linear",
    ),
    "nemotron_h": Family(
        "nemotron_h_moe",
        overrides={
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "chunk_size": 128,  # no file says it
            "moe_latent_size": 32,
            "routed_scaling_factor": 2.5,
        },
        keys=_nemotron_keys,
        turned=_nemotron,
    ),
}
