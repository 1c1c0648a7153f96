"""Every family of experts that mlx-lm or mlx-vlm converts and transformers knows: are its scores those of the original?

python tests/engines/mlx_families.py make FOLDER       tiny checkpoints as they lie on the hub, for to_mlx.py
python tests/engines/mlx_families.py compare FOLDER    {name: how far the sums are apart, or why there are none}
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moeprune.errors import StageError
from tests import tiny
from tests.scoring import streamed

Tensors = dict[str, torch.Tensor]
BOTH = ("mlx-lm", "mlx-vlm")
ROPE = ("rope_theta", "partial_rotary_factor")
COUNTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


def same(tensors: Tensors) -> Tensors:
    """What transformers writes is what lies on the hub."""
    return tensors


def stacked(tensors: Tensors) -> Tensors:
    """Experts one by one -> [E, 2 I, H] and [E, H, I], as Qwen3.5 ships them."""
    result, expert = dict(tensors), re.compile(r"(.*\.experts\.)0\.gate_proj\.weight")
    for match in filter(None, map(expert.fullmatch, tensors)):
        count = sum(bool(re.fullmatch(rf"{re.escape(match[1])}\d+\.gate_proj\.weight", name)) for name in tensors)
        gate, up, down = (
            torch.stack([result.pop(f"{match[1]}{e}.{p}_proj.weight") for e in range(count)])
            for p in ("gate", "up", "down")
        )
        result |= {f"{match[1]}gate_up_proj": torch.cat([gate, up], dim=1), f"{match[1]}down_proj": down}
    return result


def turned(tensors: Tensors) -> Tensors:
    """Stacks with the inputs first, as Qwen3-VL ships them."""
    stacks = re.compile(r".*\.experts\.(gate_up|down)_proj")
    return {n: t.mT.contiguous() if stacks.fullmatch(n) else t for n, t in stacked(tensors).items()}


def renamed(names: dict[str, str], without: str = "^$") -> Callable[[Tensors], Tensors]:
    """Under other names, and without what transformers alone writes."""

    def rename(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not re.search(without, name)}
        for old, new in names.items():
            kept = {re.sub(old, new, name): tensor for name, tensor in kept.items()}
        return kept

    return rename


@dataclass(frozen=True)
class Family:
    """How a family's tiny checkpoint becomes what the libraries read; `said` is what their configurations add."""

    libraries: tuple[str, ...] = BOTH
    sizes: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    hub: Callable[[Tensors], Tensors] = same


# What published configurations of a family say.
LING = (
    {"model_type": "bailing_moe_v3", "q_lora_rank": None, "moe_shared_expert_intermediate_size": 32}
    | {"group_norm_size": 1, "layer_group_size": 2, "n_group": 1, "num_experts_per_tok": 2}
    | {"max_position_embeddings": 256}
)
KIMI = {"first_k_dense_replace": 1, "rope_theta": 1e4, "model_max_length": 256} | {
    "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16}
    | {"short_conv_kernel_size": 4}
}
KIMI_NAMES = {r"^(language_model\.model)\.blocks\.": r"\1.layers.", r"^lm_head\.": "language_model.lm_head."}
LONGCAT = {"attention_method": "MLA", "zero_expert_type": "identity", "mla_scale_q_lora": True} | {
    "mla_scale_kv_lora": True
}
MIMO = {"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "sliding_window_size": 8} | {
    "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "n_shared_experts": None,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "layernorm_epsilon": 1e-5, "rope_theta": 5e6,
    "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 16}  # fmt: skip
QWEN35 = {
    "text_config": {"full_attention_interval": 2, "rope_parameters": {"type": "default", "mrope_section": [1, 1, 0]}}
}
QWEN_VL = {"text_config": {"norm_topk_prob": True, "tie_word_embeddings": False, "rope_scaling": None}} | {
    "vision_config": {"model_type": "qwen3_vl_moe"}
}
TOWER = {"width": 32, "layers": 1, "heads": 2}
STEP = {"num_attention_groups": 2, "moe_top_k": 2, "moe_layers_enum": "1,2", "use_head_wise_attn_gate": True} | {
    "use_moe_router_bias": True
}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(sizes=tiny.SLIDING),
    "bailing_hybrid": Family(
        ("mlx-lm",), {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        LING, renamed({r"(layers\.0\.attention)\.dense": r"\1.o_proj"})),
    "cohere2_moe": Family(("mlx-vlm",)),
    "dbrx": Family(),
    "deepseek_v2": Family(said={"rope_scaling": {"type": "yarn", "factor": 1.0, "mscale_all_dim": 1}}),
    "deepseek_v3": Family(),
    "deepseek_v32": Family(),
    "dots1": Family(),
    "ernie4_5_moe": Family(),
    "exaone_moe": Family(said={"head_dim": 16, "is_moe_layer": [False, True, True]}),
    "flint": Family(("mlx-vlm",)),
    "gemma4": Family(said={"vocab_size": 272}),
    "gemma4_text": Family(said={"global_head_dim": 32}),
    "glm4_moe": Family(said={"head_dim": 16}),
    "glm4_moe_lite": Family(),
    "glm4v_moe": Family(("mlx-vlm",), said={"text_config": {"head_dim": 16, "use_qk_norm": False}}),
    "glm_moe_dsa": Family(said={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}),
    "granitemoe": Family(),
    "granitemoehybrid": Family(said={"layer_types": ["mamba", "attention", "mamba"]}),
    "jamba": Family(),
    "kimi_k25": Family(("mlx-lm",), sizes={"tie_word_embeddings": False}, hub=renamed(KIMI_NAMES, "mm_projector")),
    "kimi_linear": Family(said=KIMI, hub=renamed({r"\.block_sparse_moe\.(?=(gate|up|down)_proj)": ".mlp."})),
    "kolibri1": Family(("mlx-vlm",)),
    "laguna": Family(),
    "lfm2_moe": Family(),
    "llama4": Family(sizes={"num_experts_per_tok": 1}, said={"vision_config": {"vision_feature_layer": -1}}),
    "longcat_flash": Family(said=LONGCAT, hub=renamed({}, r"\.experts\.([89]|1\d)\.")),
    "mellum": Family(),
    "mimo_v2_flash": Family(said=MIMO),
    "minimax_m2": Family(said={"shared_intermediate_size": 64, "rotary_dim": 16}),
    "minimax_m3_vl": Family(),
    "mistral4": Family(("mlx-lm",)),
    "mixtral": Family(),
    "nemotron_h": Family(said={"hybrid_override_pattern": "ME*-", "layers_block_type": None}),
    "olmoe": Family(),
    "phimoe": Family(sizes={"attention_bias": True, "lm_head_bias": True}),
    "qwen2_moe": Family(),
    "qwen3_5_moe": Family(said=QWEN35, hub=stacked),
    "qwen3_moe": Family(said={"head_dim": 16}),
    "qwen3_next": Family(said={"full_attention_interval": 2}),
    "qwen3_vl_moe": Family(said=QWEN_VL, hub=turned),
    "solar_open": Family(said={"intermediate_size": 64, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
    "step3p7": Family(("mlx-vlm",), said={"text_config": STEP, "vision_config": TOWER}),
}  # fmt: skip
OFF = re.compile(r"moe_statics\.e_score_correction_bias$")  # MLX leaves it out


def make(folder: Path) -> None:
    """NAME/parent as transformers writes it, NAME/hub with the configuration that the libraries want."""
    for family, about in FAMILIES.items():
        for library in about.libraries:
            place = folder / f"{family}-{library}"
            parent = tiny.make(family, place / "parent", **about.sizes)
            tensors = load_file(parent / "model.safetensors")
            tensors = {name: torch.zeros_like(t) if OFF.search(name) else t for name, t in tensors.items()}
            save_file(tensors, parent / "model.safetensors", {"format": "pt"})
            shutil.copytree(parent, place / "hub")
            save_file(about.hub(tensors), place / "hub" / "model.safetensors", {"format": "pt"})
            config = merged(published(tiny.read_config(parent)), about.said)
            (place / "hub" / "config.json").write_text(json.dumps(config))


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the fields that published ones have and transformers gathers or names otherwise."""
    config = {key: published(value) if isinstance(value, dict) else value for key, value in config.items()}
    rope = config.get("rope_parameters") or {}
    more = {key: rope[key] for key in ROPE if key in rope} | ({"rope_scaling": None} if rope else {})
    count = next((config[key] for key in COUNTS if key in config), None)
    more |= dict.fromkeys(COUNTS, count) if count else {}
    return more | config


def merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Nested, too."""
    return config | {k: merged(config[k], v) if isinstance(config.get(k), dict) else v for k, v in more.items()}


def compare(folder: Path) -> dict[str, float | str]:
    """The largest difference of any sum, as a share of the largest of its kind."""
    data, found = streamed.batches(count=2, length=10), {}
    for place in sorted(folder.iterdir()):
        if (place / "mlx").exists():
            try:
                found[place.name] = apart(*(streamed.score(place / form, data, folder) for form in ("parent", "mlx")))
            except StageError as error:
                found[place.name] = str(error)
    return found


def apart(first: Any, second: Any) -> float | str:
    """Of all sums of all blocks; their names differ by what is around the model."""
    pairs = list(zip((b for b in first.blocks if "mtp" not in b.block), second.blocks, strict=True))
    worst = 0.0
    for one, other in pairs:
        for name, sums in one.values.items():
            worst = max(worst, float(np.abs(sums - other.values[name]).max() / (np.abs(sums).max() + 1e-9)))
    return worst


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        print(json.dumps(compare(Path(sys.argv[2]))))
