"""What a table says of one architecture, and the names within a layer that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeprune.scoring.gguf.facts import Facts
from moeprune.scoring.gguf.turns import Made, Turn

GATED = {"gate_up": ("gate", "up"), "down": ("down",)}  # stack in memory -> what of each expert it holds
UNGATED = {"up": ("up",), "down": ("down",)}


@dataclass(frozen=True)
class Model:
    """One architecture: the class of transformers, what its config needs beside COMMON, and names beside LEAVES."""

    model_type: str
    architecture: str
    config: Callable[[Facts], dict[str, Any]]
    leaves: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    experts: str = "mlp.experts"  # empty where leaves name the stacks
    turns: Mapping[str, Turn] = field(default_factory=dict)  # leaf -> the way back from what was done to it
    made: Mapping[str, Made] = field(default_factory=dict)  # name in memory -> the tensors it is made of
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: GATED)
    permuted: bool = False  # the rows of q and k lie as llama.cpp's rotary embedding wants them
    columns: bool = False  # experts in memory [E, inputs, outputs]
    by_turns: bool = False  # gate and up in memory by turns, an output of each


def feed_forward(target: str, leaf: str = "ffn_{}") -> dict[str, str]:
    """The three matrices of a dense layer, or of an expert that every token takes."""
    return {leaf.format(x): f"{target}.{x}_proj" for x in ("gate", "up", "down")}


def shared_expert(target: str) -> dict[str, str]:
    """The expert that every token takes."""
    return feed_forward(target, "ffn_{}_shexp")


# Name within a layer on disk -> in memory. With an ending it is the whole name, without one it keeps its ending.
LEAVES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    "attn_output": "self_attn.o_proj",
    **feed_forward("mlp"),
    **shared_expert("mlp.shared_experts"),
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
SHARED_EXPERT = shared_expert("mlp.shared_expert") | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"}
LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
AFTER = {"post_attention_norm": "post_attention_layernorm"}
