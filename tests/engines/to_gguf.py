"""Run by llama.cpp's interpreter: MODEL FILE TYPE writes a small Qwen3-MoE checkpoint as GGUF, matrices in TYPE."""

import json
import sys
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401, makes numpy know bfloat16
import numpy as np
from safetensors import safe_open

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    **{f"self_attn.{x}_proj.weight": f"attn_{x}.weight" for x in "qkv"},
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{x}_norm.weight": f"attn_{x}_norm.weight" for x in "qk"},
}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32."""
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118


def write(folder: Path, target: Path, kind: str) -> None:
    """The whole file."""
    config = json.loads((folder / "config.json").read_text())
    tensors = read(folder)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    add_metadata(writer, config)
    add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), config["eos_token_id"])

    def add(name: str, value: np.ndarray) -> None:
        as_is = value.ndim == 1 or "ffn_gate_inp" in name
        stored = gguf.GGMLQuantizationType.F32 if as_is else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for old, new in NAMES.items():
            add(f"blk.{layer}.{new}", tensors[f"model.layers.{layer}.{old}"])
        for part in ("gate", "up", "down"):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack([tensors[name] for name in names]))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def add_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    """Sizes and constants."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict, end: int) -> None:
    """A byte-level BPE with Qwen's way of splitting text."""
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    words |= special
    tokens = [words[number] for number in range(len(words))]
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
