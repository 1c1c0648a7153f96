"""DeepSeek-V4 as a GGUF file: nothing but names, which the gguf package lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tests.gguf_files.family import Config, Family, Written

RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
COMPRESSOR = {"ape": "ape", "wkv.weight": "kv", "wgate.weight": "gate", "norm.weight": "norm"}
WITHIN = {
    **{f"hc_{kind}_{x}": f"hc_{kind}_{x}.weight" for kind in ("attn", "ffn") for x in ("base", "fn", "scale")},
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    **{f"attn.compressor.{name}": f"attn_compressor_{leaf}.weight" for name, leaf in COMPRESSOR.items()},
    **{f"attn.indexer.compressor.{name}": f"indexer_compressor_{leaf}.weight" for name, leaf in COMPRESSOR.items()},
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    **{
        f"ffn.shared_experts.w{x}.weight": f"ffn_{k}_shexp.weight"
        for x, k in zip("123", ("gate", "down", "up"), strict=True)
    },
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
}
OUTSIDE = {
    "head.weight": "output.weight",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    **{f"model.hc_head.hc_{x}": f"output_hc_{x}.weight" for x in ("base", "fn", "scale")},
}


def _keys(config: Config) -> Config:
    layers, rope = config["num_hidden_layers"], config["rope_parameters"]["main"]
    far = config["rope_parameters"]["compress"]
    names = {"q_lora_rank": "q_lora_rank", "output_group_count": "o_groups", "output_lora_rank": "o_lora_rank"}
    names |= {"compress_rope_freq_base": "compress_rope_theta", "indexer.head_count": "index_n_heads"}
    names |= {"indexer.key_length": "index_head_dim", "indexer.top_k": "index_topk"}
    connections = {"count": "hc_mult", "sinkhorn_iterations": "hc_sinkhorn_iters", "epsilon": "hc_eps"}
    return {
        **{f"attention.{key}": config[name] for key, name in names.items()},
        **{f"hyper_connection.{key}": config[name] for key, name in connections.items()},
        "attention.compress_ratios": [RATIOS[kind] for kind in config["layer_types"]],
        "hash_layer_count": config["mlp_layer_types"].count("hash_moe"),
        "expert_gating_func": 4,
        "swiglu_clamp_exp": [config["swiglu_limit"]] * layers,
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": far["factor"],
        "rope.scaling.original_context_length": far["original_max_position_embeddings"],
        "rope.dimension_count": int(config["head_dim"] * rope["partial_rotary_factor"]),
    }


def _named(config: Config, stored_as: str, name: str, array: np.ndarray) -> Iterator[Written]:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    place = f"blk.{layer[1]}.{WITHIN[layer[2]]}" if layer else OUTSIDE[name]
    yield place, array, lambda value: {name: value}


NEAR = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAR = {
    "rope_type": "yarn",
    "rope_theta": 160000.0,
    "partial_rotary_factor": 0.5,
    "factor": 4.0,
    "attention_factor": 1.0,
}
FAR |= {"original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
DEEPSEEK4 = Family(
    "deepseek4",
    overrides={
        "layer_types": list(RATIOS),
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"main": NEAR, "compress": FAR},
    },
    engine={"hc_mult": 4, "index_head_dim": 128, "index_n_heads": 32},
    keys=_keys,
    turned=_named,
    named_as="deepseek2",
)
