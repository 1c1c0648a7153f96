"""A tiny random parent and cuts of it made by hand in torch: an oracle that shares no code with the pruning stage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 16},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "head_dim": 8},
}  # fmt: skip
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def parent(folder: Path, family: str = "qwen3_moe", seed: int = 0) -> Path:
    """A seeded random model with weights large enough that experts matter, and a byte-level tokenizer."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "tie_word_embeddings": False,
             "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}  # fmt: skip
    config = AutoConfig.for_model(family, **{**shape, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4 if "embed" in name or "head" in name else 0.15)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """One token per byte and three special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def cut(source: Path, target: Path, keep: dict[int, Sequence[int]], spoil: Callable[[Any], None] | None = None) -> Path:
    """The model with only the experts of `keep` (layer -> ids), optionally spoiled, and the metadata beside it."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    kept = len(next(iter(keep.values())))
    config |= {key: kept for key in COUNT_KEYS if key in config}
    smaller = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=model.dtype)
    smaller.load_state_dict({name: _taken(name, value, keep) for name, value in model.state_dict().items()})
    with torch.no_grad():
        if spoil is not None:
            spoil(smaller)
    smaller.save_pretrained(target)
    for path in source.iterdir():
        if path.suffix in {".json", ".jinja"} and not (target / path.name).exists():
            shutil.copy(path, target)
    plan = {"keep": {f"model.layers.{layer}": list(ids) for layer, ids in keep.items()}}
    about = {"model": {"path": str(source)}}
    metadata = {"schema_version": "1.0", "kind": "reap_metadata", "inputs": about, "plan": plan}
    (target / "reap_metadata.json").write_text(json.dumps(metadata))
    return target


def _taken(name: str, value: torch.Tensor, keep: dict[int, Sequence[int]]) -> torch.Tensor:
    number = re.search(r"layers\.(\d+)\.", name)
    ids = keep.get(int(number[1])) if number else None
    of_experts = re.search(r"\.experts\.|\.(gate|router)\.(weight|bias|e_score_correction_bias)$", name)
    return value[list(ids)] if ids is not None and of_experts else value
