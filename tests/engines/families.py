"""Cut random models of the main families at sizes that vLLM accepts, and compute by transformers what it should say.

python tests/engines/families.py FOLDER   ->   {".../mixtral": [[log probability of each next token], ...], ...}
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import prune_model
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from tests import tiny

SIZES = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "head_dim": 64, "vocab_size": 512}
# Positions stretched as DeepSeek publishes them: where they are not, vLLM's CPU kernel for rotary positions reads the
# slices of latent attention as if they were dense, and rotates the wrong numbers.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
# The one size of latent attention that this kernel takes.
LATENT = {"q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
LATENT |= {"rope_parameters": YARN}
FAMILIES = {
    "qwen3_moe": {},
    "mixtral": {},
    "gpt_oss": {"sliding_window": 64},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": {},
    "olmoe": {"num_key_value_heads": 4},
    "flex_olmo": {},
    "exaone_moe": {},
    "qwen2_moe": {},
    "granitemoe": {},
}


# What the published configs say besides; vLLM reads it, transformers does not write it.
PUBLISHED = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 64},
}
PROMPTS = [[(7 * i * i + 31 * start) % 500 + 5 for i in range(9)] for start in range(8)]


def as_published(folder: Path) -> Path:
    """The folder, with the fields that the family's own config has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | PUBLISHED.get(config["model_type"], {})))
    return folder


def log_probabilities(folder: Path) -> list[list[float]]:
    """Of every token that may follow each prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1).tolist()


def cut(parent: Path) -> tuple[Path, dict[str, list[int]]]:
    """Two of eight experts go, others in every second block; and which stay."""
    blocks = understand(open_checkpoint(parent)).blocks
    keep = {b.name: [0, 1, 3, 4, 6, 7] if i % 2 else [1, 2, 3, 5, 6, 7] for i, b in enumerate(blocks)}
    child, plan = parent.with_name(f"{parent.name}-cut"), parent.with_name("plan.json")
    plan.write_text(json.dumps({"keep": keep}))
    prune_model.main(["--model-path", str(parent), "--plan", str(plan), "--pruned-output-path", str(child),
                      "--output-path", str(parent.parent), "--force"])  # fmt: skip
    return child, keep


def main(folder: Path) -> None:
    """Cut; then ask transformers about parents and cuts."""
    expected = {}
    for family, more in FAMILIES.items():
        parent = as_published(tiny.make(family, folder / family, **(SIZES | more)))
        child, _ = cut(parent)
        expected |= {str(model): log_probabilities(model) for model in (parent, child)}
    print(json.dumps(expected | {"prompts": PROMPTS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
