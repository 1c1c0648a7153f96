"""DeepSeek-V4 in a GGUF file: compressed attention, hyper-connections, and layers that find experts in a table."""

from __future__ import annotations

from typing import Any

from moeprune.errors import InputError
from moeprune.scoring.gguf.facts import INSTEAD, Facts, rope

COMPRESSED = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def config(facts: Facts) -> dict[str, Any]:
    """What transformers is to be told."""
    part = {"partial_rotary_factor": facts["rope.dimension_count"] / facts.head_dim}
    theta, far = facts["rope.freq_base"], facts["attention.compress_rope_freq_base"]
    positions = rope(facts, **part) | {"rope_theta": far}
    if positions["rope_type"] == "yarn":
        positions["attention_factor"] = 1.0
    hashed, ratios = int(facts["hash_layer_count"]), facts.by_layer("attention.compress_ratios")
    if strange := set(ratios) - COMPRESSED.keys():
        raise InputError(f"{facts.file}: keys compressed by {min(strange)}, which transformers cannot do; {INSTEAD}")
    return part | {
        "n_routed_experts": facts["expert_count"],
        "n_shared_experts": facts["expert_shared_count"],
        "moe_intermediate_size": facts.expert_width,
        "mlp_layer_types": ["hash_moe" if i < hashed else "moe" for i in range(facts.layers)],
        "routed_scaling_factor": facts["expert_weights_scale"],
        "norm_topk_prob": facts["expert_weights_norm"],
        "swiglu_limit": facts["swiglu_clamp_exp"],
        "layer_types": [COMPRESSED[ratio] for ratio in ratios],
        "compress_rope_theta": far,
        "rope_theta": theta,
        "rope_parameters": {"main": {"rope_type": "default", "rope_theta": theta, **part}, "compress": positions},
        "head_dim": facts.head_dim,
        "sliding_window": facts["attention.sliding_window"],
        "q_lora_rank": facts["attention.q_lora_rank"],
        "o_groups": facts["attention.output_group_count"],
        "o_lora_rank": facts["attention.output_lora_rank"],
        "index_n_heads": facts["attention.indexer.head_count"],
        "index_head_dim": facts["attention.indexer.key_length"],
        "index_topk": facts["attention.indexer.top_k"],
        "hc_mult": facts["hyper_connection.count"],
        "hc_sinkhorn_iters": facts["hyper_connection.sinkhorn_iterations"],
        "hc_eps": facts["hyper_connection.epsilon"],
    }


COMPRESSOR = {"ape.weight": "position_bias", "kv": "kv_proj", "gate": "gate_proj", "norm": "kv_norm"}
INDEXER = "self_attn.compressor.indexer"
LEAVES = {
    "attn_sinks.weight": "self_attn.sinks",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_norm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv": "self_attn.kv_proj",
    "attn_kv_a_norm": "self_attn.kv_norm",
    "attn_output_a": "self_attn.o_a_proj",
    "attn_output_b": "self_attn.o_b_proj",
    **{f"attn_compressor_{leaf}": f"self_attn.compressor.{name}" for leaf, name in COMPRESSOR.items()},
    **{f"indexer_compressor_{leaf}": f"{INDEXER}.{name}" for leaf, name in COMPRESSOR.items()},
    "indexer.attn_q_b": f"{INDEXER}.q_b_proj",
    "indexer.proj": f"{INDEXER}.scorer.weights_proj",
    "ffn_gate_tid2eid.weight": "mlp.gate.tid2eid",
    **{f"hc_{kind}_{x}.weight": f"{kind}_hc.{x}" for kind in ("attn", "ffn") for x in ("fn", "base", "scale")},
    **{f"output_hc_{x}.weight": f"model.hc_head.hc_{x}" for x in ("fn", "base", "scale")},
}
