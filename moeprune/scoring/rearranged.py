"""Layouts of other programs, brought into the one that transformers loads: experts stacked, split or named otherwise.

A rule takes all recipes and returns them with its own names replaced. To add a layout, add a rule to RULES.
Legend of the array suffixes: E experts, I inner size of an expert, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from moeprune.checkpoint.folder import Checkpoint
from moeprune.scoring.recipe import Recipe, changed, row, together

Recipes = Mapping[str, Recipe]
Rule = Callable[[Recipes, Checkpoint], Recipes]

# MLX stacks experts under a name of its own, one matrix for each of the three; `experts.fc1` is Aria's own.
MLX_STACK = re.compile(
    r"(?P<module>.*\.)(?:switch_mlp|switch_glu|experts(?!\.fc))\.(?P<matrix>(?:gate|up|down)_proj|fc[12])\.(?P<kind>weight|bias)"
)
# unsloth makes a linear layer of each expert of gpt-oss.
UNSLOTH = re.compile(r"(?P<module>.*\.experts\.)(?P<matrix>gate_up|down)_projs\.(?P<id>\d+)\.(?P<kind>weight|bias)")
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


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
    """One recipe for each expert of a stack."""
    result = {}
    for name, recipe in recipes.items():
        match = MLX_STACK.fullmatch(name)
        if match is None:
            result[name] = recipe
            continue
        matrix = match["matrix"]
        if match["module"].endswith("block_sparse_moe."):
            matrix = W123[matrix]
        for expert in range(checkpoint.tensors[next(iter(recipe.sources.values()))].shape[0]):
            result[f"{match['module']}experts.{expert}.{matrix}.{match['kind']}"] = row(recipe, expert)
    return result


RULES: tuple[Rule, ...] = (_unsloth, _mlx_gpt_oss, _mlx_stacks)
