"""Which model of transformers a GGUF file holds: its configuration and the names of its tensors.

A GGUF file has neither config.json nor the names that transformers knows. TABLE says for each architecture of llama.cpp
what its keys and names stand for; sizes are read from the tensors where they can be. To add an architecture, add an
entry; what transformers itself describes in full comes from there (gguf_library.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moeprune.checkpoint import gguf
from moeprune.checkpoint.folder import Checkpoint
from moeprune.errors import InputError

SIGMOID = 2  # expert_gating_func


class Facts:
    """What a file says about its model, with an InputError for what it should say and does not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.file = checkpoint.shards[0]
        self.architecture = str(checkpoint.config.get("general.architecture", ""))

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.file} does not say {self.architecture}.{key}, so its model cannot be built")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the model's own section. Of a list with one value for each layer the largest."""
        name = f"{self.architecture}.{key}"
        if name in self.checkpoint.config:
            return shortest(self.checkpoint.config[name])
        return max(found) if (found := self.each(key)) else default

    def each(self, key: str) -> list[int]:
        """A list with one number for each layer."""
        entry = self._entries.get(f"{self.architecture}.{key}")
        return gguf.numbers(entry) if entry is not None else []

    @cached_property
    def _entries(self) -> Mapping[str, gguf.Entry]:
        return gguf.read_header(self.file).entries

    @cached_property
    def layers(self) -> int:
        """Layers of the trunk; those behind predict further tokens."""
        return int(self["block_count"]) - int(self.get("nextn_predict_layers", 0))

    def has(self, leaf: str) -> bool:
        """Whether some layer has this tensor, or the file where it is no layer's."""
        return leaf in self.checkpoint.tensors or bool(self.shape(leaf))

    def shape(self, leaf: str) -> tuple[int, ...]:
        """The shape of this tensor in the first layer that has it."""
        names = (f"blk.{layer}.{leaf}" for layer in range(self.layers))
        return next((t.shape for name in names if (t := self.checkpoint.tensors.get(name))), ())

    @cached_property
    def dense(self) -> list[int]:
        """Layers of the trunk without a router."""
        return [i for i in range(self.layers) if f"blk.{i}.ffn_gate_inp.weight" not in self.checkpoint.tensors]

    @cached_property
    def leading_dense(self) -> int:
        """How many dense layers come first; refused where one comes later."""
        if self.dense != list(range(len(self.dense))):
            raise InputError(f"{self.file}: layer {self.dense[-1]} has no experts though one before it has")
        return len(self.dense)

    @cached_property
    def expert_width(self) -> int:
        """Inner size of an expert."""
        shape = self.shape("ffn_down_exps.weight") or self.shape("ffn_down.0.weight")
        return shape[-1] if shape else int(self["expert_feed_forward_length"])

    @cached_property
    def head_dim(self) -> int:
        """Size of a head of the attention."""
        return int(self.get("attention.key_length") or self["embedding_length"] // self["attention.head_count"])


def shortest(value: Any) -> Any:
    """A number of 32 bits as its maker wrote it: 1e-06 and not 9.999999974752427e-07."""
    if not isinstance(value, float):
        return value
    as_stored = struct.pack("<f", value)
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((float(text) for text in texts if struct.pack("<f", float(text)) == as_stored), value)


def rope(facts: Facts, **more: Any) -> dict[str, Any]:
    """The rotary embedding."""
    kind = str(facts.get("rope.scaling.type", "none"))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 10000.0), **more}
    if kind == "none" or not facts.get("rope.scaling.factor"):
        return found
    if kind not in ("linear", "yarn"):
        raise InputError(f"{facts.file}: rope scaling of type {kind} cannot be read; {INSTEAD}")
    found |= {"rope_type": kind, "factor": facts["rope.scaling.factor"]}
    if kind == "yarn":
        found["original_max_position_embeddings"] = facts["rope.scaling.original_context_length"]
        found |= {name: facts.get(f"rope.scaling.yarn_{name}", usual) for name, usual in BETAS.items()}
        if (factor := facts.get("rope.scaling.yarn_attn_factor")) is not None:
            found["attention_factor"] = factor
    return found


BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
INSTEAD = "score the original model and cut this file with those scores (./run.sh prune --other-scores)"


def common(facts: Facts) -> dict[str, Any]:
    """What the configurations of all models have."""
    embeddings = facts.checkpoint.tensors.get("token_embd.weight")
    if embeddings is None:
        raise InputError(f"{facts.file} has no token_embd.weight; it is no whole model")
    tokens = {name: facts.checkpoint.config.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    kinds = {tensor.dtype for tensor in facts.checkpoint.tensors.values()}
    return tokens | {
        "vocab_size": embeddings.shape[0],
        "hidden_size": facts["embedding_length"],
        "intermediate_size": facts.get("feed_forward_length", 0) or facts.expert_width,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts["attention.head_count"],
        "num_key_value_heads": facts.get("attention.head_count_kv", facts["attention.head_count"]),
        "rms_norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": facts["context_length"],
        "num_experts_per_tok": facts["expert_used_count"],
        "rope_parameters": rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.checkpoint.tensors,
        "dtype": "float32" if kinds <= {"F32"} else "bfloat16",
        "pad_token_id": facts.checkpoint.config.get("tokenizer.ggml.padding_token_id"),
    }


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "shared_expert_intermediate_size": facts.shape("ffn_up_shexp.weight")[0],
        "norm_topk_prob": False,  # as llama.cpp computes it, and as all models of this family do
        "mlp_only_layers": facts.dense,
        "qkv_bias": facts.has("attn_q.bias"),
    }


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "norm_topk_prob": True,  # as llama.cpp computes it
        "mlp_only_layers": facts.dense,
        "attention_bias": facts.has("attn_q.bias"),
    }


def _mixtral(facts: Facts) -> dict[str, Any]:
    if facts.has("rope_freqs.weight") or facts.dense:
        raise InputError(f"{facts.file} is no Mixtral, though of the architecture llama; {INSTEAD}")
    return {"num_local_experts": facts["expert_count"], "head_dim": facts.get("rope.dimension_count", facts.head_dim)}


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "sliding_window": facts["attention.sliding_window"],
        "rope_parameters": rope(facts, truncate=False),
    }


def _routed(facts: Facts) -> dict[str, Any]:
    """What the models after DeepSeek-V3 have in common."""
    groups = facts.get("expert_group_count", 1) or 1
    return {
        "n_routed_experts": facts["expert_count"],
        "n_shared_experts": facts.get("expert_shared_count", 0),
        "moe_intermediate_size": facts.expert_width,
        "first_k_dense_replace": facts.leading_dense,
        "mlp_layer_types": ["dense" if i in facts.dense else "sparse" for i in range(facts.layers)],
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": facts.get("expert_group_used_count", groups) or groups,
        "attention_bias": facts.has("attn_q.bias"),
        "head_dim": facts.head_dim,
    }


def _deepseek(facts: Facts) -> dict[str, Any]:
    rotary = int(facts["rope.dimension_count"])
    heads = int(facts["attention.head_count"])
    parameters = rope(facts)
    if parameters["rope_type"] == "yarn":  # llama.cpp stores a tenth of the exponent's base
        scale = shortest(float(facts.get("rope.scaling.yarn_log_multiplier", 0.0)) * 10)
        parameters |= {"mscale": scale, "mscale_all_dim": scale}
    sigmoid = facts.get("expert_gating_func", 1) == SIGMOID
    model_type = "deepseek_v3" if sigmoid else "deepseek_v2"
    found = _routed(facts) | {
        "model_type": model_type,
        "architectures": ["DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM"],
        "q_lora_rank": facts.get("attention.q_lora_rank") or None,
        "kv_lora_rank": facts["attention.kv_lora_rank"],
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": int(facts.get("attention.key_length_mla", facts["attention.key_length"])) - rotary,
        "v_head_dim": facts.get("attention.value_length_mla", facts["attention.value_length"]),
        "num_key_value_heads": heads,
        "rope_parameters": parameters,
        "head_dim": rotary,
    }
    if not sigmoid:
        found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    return found


def _glm4(facts: Facts) -> dict[str, Any]:
    return _routed(facts) | {"use_qk_norm": facts.has("attn_q_norm.weight"), "rope_parameters": _rotating_part(facts)}


def _rotating_part(facts: Facts) -> dict[str, Any]:
    """The rotary embedding where it may turn a part of each head only."""
    part = facts.get("rope.dimension_count", facts.head_dim) / facts.head_dim
    return rope(facts, **({"partial_rotary_factor": part} if part < 1 else {}))


def _minimax(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "head_dim": facts.head_dim,
        "rope_parameters": _rotating_part(facts),
    }


def _olmoe(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "norm_topk_prob": False,  # as llama.cpp computes it
        "clip_qkv": facts.get("attention.clamp_kqv") or None,
    }


def _granite(facts: Facts) -> dict[str, Any]:
    return {
        "num_local_experts": facts["expert_count"],
        "intermediate_size": facts.expert_width,
        "attention_multiplier": facts.get("attention.scale", facts.head_dim**-0.5),
        "embedding_multiplier": facts.get("embedding_scale", 1.0),
        "residual_multiplier": facts.get("residual_scale", 1.0),
        "logits_scaling": facts.get("logit_scale", 1.0),
    }


def _lfm2(facts: Facts) -> dict[str, Any]:
    attends = facts.each("attention.head_count_kv")
    return {
        "num_experts": facts["expert_count"],
        "moe_intermediate_size": facts.expert_width,
        "num_dense_layers": facts.leading_dense,
        "layer_types": ["full_attention" if heads else "conv" for heads in attends],
        "norm_eps": facts["attention.layer_norm_rms_epsilon"],
        "conv_L_cache": facts["shortconv.l_cache"],
        "use_expert_bias": facts.has("exp_probs_b.bias"),
        "norm_topk_prob": True,
    }


@dataclass(frozen=True)
class Model:
    """One architecture: the class of transformers, what its config needs beside COMMON, and names beside LEAVES."""

    model_type: str
    architecture: str
    config: Callable[[Facts], dict[str, Any]]
    leaves: Mapping[str, str] = field(default_factory=dict)
    experts: str = "mlp.experts"
    permuted: bool = False  # the rows of q and k lie as llama.cpp's rotary embedding wants them
    interleaved: bool = False  # experts in memory [E, inputs, outputs], a column of gate and one of up by turns


# Name within a layer on disk -> in memory. With an ending it is the whole name, without one it keeps its ending.
LEAVES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{f"ffn_{x}_shexp": f"mlp.shared_experts.{x}_proj" for x in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",  # files of early 2025
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "token_embd_norm.weight": "model.embedding_norm.weight",  # LFM2: the norm behind the last layer
}
SHARED_EXPERT = {f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")} | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate"
}
LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
AFTER = {"post_attention_norm": "post_attention_layernorm"}
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
GRANITE = {"ffn_gate_inp": "block_sparse_moe.router"}
ROUTER = {"ffn_gate_inp": "mlp.router", "attn_sinks.weight": "self_attn.sinks"}
BLOCK_BIAS = {"exp_probs_b.bias": "mlp.e_score_correction_bias"}

TABLE = {
    "qwen2moe": Model("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2, SHARED_EXPERT),
    "qwen3moe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),
    "qwen3vlmoe": Model("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3),  # for text they are the same
    "llama": Model("mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "gpt-oss": Model("gpt_oss", "GptOssForCausalLM", _gpt_oss, AFTER | ROUTER, interleaved=True),
    "deepseek2": Model("deepseek_v3", "DeepseekV3ForCausalLM", _deepseek, LATENT),
    "glm4moe": Model("glm4_moe", "Glm4MoeForCausalLM", _glm4, AFTER),
    "dots1": Model("dots1", "Dots1ForCausalLM", _routed),
    "minimax-m2": Model("minimax_m2", "MiniMaxM2ForCausalLM", _minimax, BLOCK_BIAS),
    "olmoe": Model("olmoe", "OlmoeForCausalLM", _olmoe),
    "granitemoe": Model(
        "granitemoe", "GraniteMoeForCausalLM", _granite, GRANITE, experts="block_sparse_moe.experts", permuted=True
    ),
    "lfm2moe": Model("lfm2_moe", "Lfm2MoeForCausalLM", _lfm2, SHORT_CONVOLUTION, experts="feed_forward.experts"),
}
