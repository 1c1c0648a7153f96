"""Tiny checkpoints as GGUF files, made the way llama.cpp's converter makes them: names from gguf's own tables.

`convert` writes the file and returns what its tensors stand for under the names of the checkpoint, so that a plain
checkpoint with these values can be compared. The transformations are written out here once more, in numpy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.gguf_files.families import FAMILIES
from tests.gguf_files.family import Arrays, Written

KEYS = {  # GGUF key -> config keys, the first that is there counts
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "expert_used_count": ("num_experts_per_tok", "moe_topk", "moe_k"),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor", "route_scale", "router_scaling_factor"),
    "expert_weights_norm": ("norm_topk_prob",),
    "leading_dense_block_count": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "interleave_moe_layer_step": ("interleave_moe_layer_step", "moe_layer_interval"),
    "attention.scale": ("attention_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("linear_conv_kernel_dim",),
    "ssm.state_size": ("linear_key_head_dim",),
    "ssm.group_count": ("linear_num_key_heads",),
    "ssm.time_step_rank": ("linear_num_value_heads",),
}
OTHER_WORDS = {  # DBRX, Kimi Linear
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_model": "hidden_size",
    "max_seq_len": "max_position_embeddings",
    "model_max_length": "max_position_embeddings",
    "num_experts_per_token": "num_experts_per_tok",
    "num_expert_group": "n_group",
    "moe_renormalize": "norm_topk_prob",
}
EXPERT = re.compile(r"(?P<stem>.*experts)\.(?P<id>\d+)\.(?P<rest>.+)")


def convert(
    folder: Path, target: Path, *, kind: str = "F32", mtp: int = 0, split: bool = False, without: str = "", **more: Any
) -> Arrays:
    """Write `target`; matrices with rows of whole blocks in `kind`, everything else in 32 bits."""
    config = json.loads((folder / "config.json").read_text())
    config |= {usual: config[name] for name, usual in OTHER_WORDS.items() if name in config}
    family = config["model_type"]
    tensors = {
        name: value if value.dtype.kind == "i" else value.astype(np.float32)
        for name, value in load_file(folder / "model.safetensors").items()
    }
    shards = {"split_max_tensors": 20, "small_first_shard": False} if split else {}
    writer = gguf.GGUFWriter(target, FAMILIES[family].architecture, **shards)
    for key, value in (metadata(config, mtp) | more).items():
        if key != without:
            write_value(writer, f"{writer.arch}.{key}", value)
    add_vocabulary(writer, folder, config)
    values: Arrays = {}
    for name, array, back in stored(family, config, tensors):
        if array.dtype.kind == "i":
            writer.add_tensor(name, array.astype(np.int32))
            values |= back(array)
            continue
        quantized = gguf.GGMLQuantizationType[kind if _is_quantized(name, array, kind) else "F32"]
        raw = gguf.quants.quantize(array, quantized)
        writer.add_tensor(name, raw, raw_dtype=quantized)
        values |= back(gguf.quants.dequantize(raw, quantized).reshape(array.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert values.keys() == tensors.keys()
    return values


def with_mtp(layer: int, like: int) -> Callable[[str, np.ndarray], Iterator[tuple[str, np.ndarray]]]:
    """For a rewritten file: one more layer, which predicts further tokens, with parts of its own."""

    def change(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        yield name, array
        if name.startswith(f"blk.{like}."):
            yield name.replace(f"blk.{like}.", f"blk.{layer}."), array
        if name == f"blk.{like}.attn_norm.weight":
            yield f"blk.{layer}.nextn.enorm.weight", array

    return change


def tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that merges one pair: GGUF has no empty lists."""
    tiny.tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["he"], state["model"]["merges"] = 264, [["h", "e"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def twin(folder: Path, values: Arrays, target: Path) -> Path:
    """The checkpoint with other values."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, target / "model.safetensors")
    return target


def _is_quantized(name: str, array: np.ndarray, kind: str) -> bool:
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    plain = "ffn_gate_inp" in name or "conv" in name or ".bias" in name or "ssm" in name
    return array.ndim > 1 and array.shape[-1] % block == 0 and not plain


def write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One key, by the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _layers(config: dict[str, Any]) -> int:
    return config.get("num_hidden_layers") or len(config["layers_block_type"])


def metadata(config: dict[str, Any], mtp: int) -> dict[str, Any]:
    """The keys of the model's section."""
    found: dict[str, Any] = {"block_count": _layers(config) + mtp}
    if mtp:
        found["nextn_predict_layers"] = mtp
    for key, names in KEYS.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found[key] = value
    rope = config.get("rope_parameters", {})
    found["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if "original_max_position_embeddings" in rope:
            found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if rope.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    found["expert_gating_func"] = 1
    if "mlp_layer_types" in config:
        found["leading_dense_block_count"] = config["mlp_layer_types"].count("dense")
    return found | FAMILIES[config["model_type"]].keys(config)


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """The tokenizer of the folder, a byte-level BPE, or as many names of nothing."""
    if not (folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    words |= special
    words |= {number: f"<|unused{number}|>" for number in range(config["vocab_size"]) if number not in words}
    unused = {number for number in words if words[number].startswith("<|unused")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words[number] for number in range(len(words))])
    kinds = [3 if number in special else 5 if number in unused else 1 for number in range(len(words))]
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]] or ["a b"])
    template = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    jinja = folder / "chat_template.jinja"
    writer.add_chat_template(template or jinja.read_text())
    for name in ("bos", "eos", "pad"):
        write_value(
            writer, f"tokenizer.ggml.{'padding' if name == 'pad' else name}_token_id", config[f"{name}_token_id"]
        )


def stored(family: str, config: dict[str, Any], tensors: Arrays) -> Iterator[Written]:
    """All tensors of the file."""
    names = gguf.get_tensor_name_map(_arch(family), _layers(config))
    stacks: dict[str, list[str]] = {}
    for name in tensors:
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match['stem']}.{match['rest']}", []).append(name)
    for stem, members in stacks.items():
        members.sort(key=lambda name: int(EXPERT.fullmatch(name)["id"]))  # type: ignore[index]
        array = np.stack([tensors[name] for name in members])
        yield _named(names, stem), array, lambda value, members=members: dict(zip(members, value, strict=True))
    for name, array in tensors.items():
        if not EXPERT.fullmatch(name):
            yield from _one(family, config, names, name, array)


def _arch(family: str) -> gguf.MODEL_ARCH:
    way = FAMILIES[family]
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == (way.named_as or way.architecture))


BARE = ("attn_sinks", "_exps", "layer_output_scale")  # names of checkpoints that have no ending
EXPERT_WORDS = {"1": "gate", "2": "down", "3": "up"}


def _named(names: gguf.TensorNameMap, name: str) -> str:
    """The name in the file, empty where gguf's tables do not know it."""
    name = name.replace("experts.e_score", "gate.e_score")
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace("dt_bias", "dt_proj.bias")
    name = re.sub(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", name)  # a dense layer of Kimi Linear
    name = re.sub(r"(?:feed_forward|ffn)\.experts\.w(\d)", lambda m: f"mlp.experts.{EXPERT_WORDS[m[1]]}_proj", name)
    name = re.sub(r"backbone(\.layers\.\d+)\.mixer\.experts", r"model\1.mlp.experts", name)
    name = re.sub(r"expert_bias$", "expert_bias.bias", name)
    ways = (name, name.replace(".attention.", ".self_attn."))
    found = next((found for way in ways if (found := names.get_name(way, try_suffixes=(".weight", ".bias")))), "")
    return f"{found}.weight" if found.endswith(BARE) else found


def _one(
    family: str, config: dict[str, Any], names: gguf.TensorNameMap, name: str, array: np.ndarray
) -> Iterator[Written]:
    stored_as = _named(names, name)
    if turned := [*FAMILIES[family].turned(config, stored_as, name, array)]:
        yield from turned
    elif 1 in array.shape:
        yield stored_as, np.atleast_1d(array.squeeze()), lambda value: {name: value.reshape(array.shape)}
    else:
        assert stored_as, name
        yield stored_as, array, lambda value: {name: value}
