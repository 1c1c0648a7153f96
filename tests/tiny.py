"""Tiny random checkpoints of every MoE family, made by transformers' own classes: `make("mixtral", folder)`.

One table. An entry names the architecture and only those config fields for which COMMON's small sizes will not do; both
reach every nested config that has a field of that name, so wrappers need no text_config of their own. Vision and audio
towers take their small sizes from TOWER.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "hidden_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    **dict.fromkeys(("image_token_id", "image_token_index", "video_token_id", "audio_token_id"), 3),
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "depth": 1,
    "patch_size": 4,
    "image_size": 8,
    "head_dim": 16,
    "num_key_value_heads": 2,
}
MLA = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA | {"n_group": 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
}


def config(family: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The small config of a family. An override reaches every config of the tree that has the field."""
    architecture, special = FAMILIES[family]
    return _config(getattr(transformers, architecture).config_class, special | overrides)


def _config(kind: type[Any], special: dict[str, Any], tower: bool = False) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    sizes = COMMON | (TOWER if tower else special)
    values = {name: value for name, value in sizes.items() if name in known}
    for name, sub in kind.sub_configs.items():
        given = special.get(name, {})
        if sub is transformers.AutoConfig:
            sub = type(transformers.AutoConfig.for_model(given["model_type"]))
        inner = "vision" in name or "audio" in name
        values[name] = _config(sub, (given if inner else special | given), inner)
    if tower:
        values |= {name: value for name, value in special.items() if name in known}
    return kind(**values)


def build(family: str, **overrides: Any) -> transformers.PreTrainedModel:
    """The model itself, with seeded random weights that are large enough for a wrong slice to show."""
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family][0])(config(family, **overrides)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            _randomise(name, tensor, model.config)
    return model


def _randomise(name: str, tensor: torch.Tensor, model_config: Any) -> None:
    """Matrices of unit gain; vectors a little off what they were, so that no two experts are alike."""
    if name.endswith("tid2eid"):
        experts = model_config.n_routed_experts
        tensor.copy_(torch.stack([torch.randperm(experts)[: tensor.shape[1]] for _ in range(len(tensor))]))
    elif not tensor.is_floating_point() or any(part in name for part in ("A_log", "dt_bias", "inv_freq", "conv")):
        return
    elif tensor.ndim >= 2:
        tensor.normal_(0, tensor.shape[-1] ** -0.5)
    else:
        tensor.add_(torch.randn_like(tensor) * 0.1)


def make(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny checkpoint of `family` into `folder`; `max_shard_size` among the overrides splits it."""
    shard = overrides.pop("max_shard_size", "5GB")
    build(family, **overrides).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Save a byte-level tokenizer of 264 tokens: 8 special ones, then one per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|image|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it lies on disk."""
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]
