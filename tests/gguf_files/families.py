"""What sets the GGUF file of a family apart, as llama.cpp's converter makes it. To add a family, add an entry."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Arrays, Config, Family, Written, block, joined, rotated, sigmoid
from tests.gguf_files.plain import PLAIN
from tests.gguf_files.shared import SHARED


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


FAMILIES = {
    **PLAIN,
    **SHARED,
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe", overrides={"norm_topk_prob": True}),
    "mixtral": Family("llama", overrides={"sliding_window": None}, turned=rotated),
    "gpt_oss": Family(  # llama.cpp rounds its scaled positions in a way of its own
        "gpt-oss", engine={"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}, turned=_gpt_oss
    ),
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
