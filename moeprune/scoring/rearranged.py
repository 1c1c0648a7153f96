"""Layouts of other programs, brought into the one that transformers loads: experts stacked, split or named otherwise.

A rule takes all recipes and returns them with its own names replaced. To add a layout, add a rule to RULES.
Legend of the array suffixes: E experts, I inner size of an expert, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.structure import is_tower
from moeprune.scoring.recipe import Recipe, changed, one_row, together

Recipes = Mapping[str, Recipe]
Rule = Callable[[Recipes, Checkpoint], Recipes]

# MLX stacks experts under a name of its own, one matrix for each of the three; `experts.fc1` is Aria's own.
MLX_STACK = re.compile(
    r"(?P<module>.*\.)(?:switch_mlp|switch_glu|experts(?!\.fc))\.(?P<matrix>(?:gate|up|down)_proj|fc[12])\.(?P<kind>weight|bias)"
)
# unsloth makes a linear layer of each expert of gpt-oss.
UNSLOTH = re.compile(r"(?P<module>.*\.experts\.)(?P<matrix>gate_up|down)_projs\.(?P<id>\d+)\.(?P<kind>weight|bias)")
NAMES = {"fc1": "up_proj", "fc2": "down_proj"}
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
DENSE = re.compile(r"(.*\.feed_forward\.)((?:gate|up|down)_proj)\.weight")  # of LFM2, whose names MLX changes too
# MLX turns convolutions, and with them adds to these norms the one that these families add when they run.
SHIFTED = re.compile(r"qwen3_next|qwen3_5_moe")
NORMS = re.compile(r"(\.(input|post_attention)_layernorm|(^|\.)model\.norm|\.[qk]_norm)\.weight")


def rearranged(recipes: Recipes, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """The recipes under the names, and in the shapes, that transformers expects on disk."""
    for rule in RULES:
        recipes = rule(recipes, checkpoint)
    return dict(recipes)


def _mlx_gpt_oss(recipes: Recipes, _checkpoint: Checkpoint) -> Recipes:
    """Gate and up apart, outputs first; transformers wants their rows in turns, inputs first."""
    result = dict(recipes)
    for name in recipes:
        match = MLX_STACK.fullmatch(name)
        if match is None or f"{match['module']}router.weight" not in recipes or "experts" not in name:
            continue
        if f"{match['module']}experts.gate_proj.bias" not in recipes:
            continue
        module, matrix, kind = match["module"], match["matrix"], match["kind"]
        own = result.pop(name)
        plain = f"{module}experts.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"
        plain += "_bias" if kind == "bias" else ""
        if matrix == "down_proj":
            result[plain] = own if kind == "bias" else changed(own, lambda down_EHI: down_EHI.mT)
        elif matrix == "gate_proj":
            join = _in_turns_bias if kind == "bias" else _in_turns
            result[plain] = together([own, recipes[f"{module}experts.up_proj.{kind}"]], join)
    return result


def _in_turns(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(gate_and_up, dim=2).flatten(1, 2).mT  # [E, I, H] twice -> [E, H, 2 I]


def _in_turns_bias(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(gate_and_up, dim=2).flatten(1, 2)  # [E, I] twice -> [E, 2 I]


def _unsloth(recipes: Recipes, _checkpoint: Checkpoint) -> Recipes:
    """One linear layer for each expert; transformers wants them stacked, inputs first."""
    result, experts = dict(recipes), dict[tuple[str, str], dict[int, Recipe]]()
    for name in recipes:
        if match := UNSLOTH.fullmatch(name):
            plain = f"{match['module']}{match['matrix']}_proj"
            experts.setdefault((plain, match["kind"]), {})[int(match["id"])] = result.pop(name)
        elif ".mlp.router.linear." in name:
            result[name.replace(".router.linear.", ".router.")] = result.pop(name)
    for (plain, kind), each in experts.items():
        own = [each[expert] for expert in sorted(each)]
        if kind == "bias":
            result[f"{plain}_bias"] = together(own, torch.stack)
        else:
            result[plain] = together(own, lambda out_in: torch.stack(out_in).mT)
    return result


def _mlx_stacks(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """One recipe for each expert of a stack; granite keeps them stacked, with gate and up in one."""
    result = dict(recipes)
    model_type = str(checkpoint.config.get("model_type", ""))
    granite, lfm2 = model_type.startswith("granitemoe"), model_type.startswith("lfm2")
    for name, recipe in recipes.items():
        if lfm2 and (dense := DENSE.fullmatch(name)):
            result[f"{dense[1]}{W123[dense[2]]}.weight"] = result.pop(name)
        match = MLX_STACK.fullmatch(name)
        if match is None:
            continue
        del result[name]
        module, matrix, kind = match["module"], match["matrix"], match["kind"]
        if granite:
            up = recipes[name.replace(".gate_proj.", ".up_proj.")]
            if matrix != "up_proj":
                which = "input" if matrix == "gate_proj" else "output"
                own = together([recipe, up], lambda pair: torch.cat(pair, dim=1)) if which == "input" else recipe
                result[f"{module}{which}_linear.{kind}"] = own
            continue
        matrix = (W123 if module.endswith("block_sparse_moe.") or lfm2 else NAMES).get(matrix, matrix)
        for expert in range(_axes(recipe, checkpoint)[0]):
            result[f"{module}experts.{expert}.{matrix}.{kind}"] = one_row(recipe, expert)
    return result


def _mlx_attention(recipes: Recipes, _checkpoint: Checkpoint) -> Recipes:
    """Latent attention: keys and values apart for each head [A, R, K] and [A, V, R]; one matrix [A (K + V), R]."""
    result = dict(recipes)
    for name in recipes:
        stem = name.removesuffix("embed_q.weight")
        if name != stem and f"{stem}unembed_out.weight" in recipes:
            parts = [result.pop(name), result.pop(f"{stem}unembed_out.weight")]
            result[f"{stem}kv_b_proj.weight"] = together(parts, _keys_and_values)
    return result


def _keys_and_values(parts: list[torch.Tensor]) -> torch.Tensor:
    keys_ARK, values_AVR = parts
    return torch.cat([keys_ARK.mT, values_AVR], dim=1).flatten(0, 1)


def _mlx_convolutions(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """[C, K, 1] becomes [C, 1, K]; norms that were shifted along with them are shifted back."""
    result = dict(recipes)
    if all(metadata.get("format") != "mlx" for metadata in checkpoint.shard_metadata.values()):
        return result
    # A convolution in a tower may have a kernel of one place, and then looks like one that was turned.
    turned = [name for name in recipes if re.search(r"\bconv(1d)?\.weight$", name) and not is_tower(name)]
    turned = [name for name in turned if len(axes := _axes(recipes[name], checkpoint)) == 3 and axes[2] == 1 < axes[1]]
    for name in turned:
        result[name] = changed(recipes[name], lambda weight_CK1: weight_CK1.mT)
    if turned and SHIFTED.match(str(checkpoint.config.get("model_type", ""))):
        for name in filter(NORMS.search, recipes):
            result[name] = changed(recipes[name], lambda gain: (gain.float() - 1).to(gain.dtype))
    return result


def _axes(recipe: Recipe, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of what a recipe begins with."""
    return checkpoint.tensors[next(iter(recipe.sources.values()))].shape


RULES: tuple[Rule, ...] = (_unsloth, _mlx_gpt_oss, _mlx_stacks, _mlx_attention, _mlx_convolutions)
