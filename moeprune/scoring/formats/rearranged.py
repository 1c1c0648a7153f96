"""Layouts of other programs, brought into the one that transformers loads: experts stacked, split or named otherwise.

A rule takes all recipes and returns them with its own names replaced. To add a layout, add a rule to RULES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from moeprune.checkpoint.folder import Checkpoint
from moeprune.scoring.formats import mlx
from moeprune.scoring.formats.recipe import Recipe, changed, together

Recipes = Mapping[str, Recipe]
Rule = Callable[[Recipes, Checkpoint], Recipes]

# unsloth makes a linear layer of each expert of gpt-oss.
UNSLOTH = re.compile(r"(?P<module>.*\.experts\.)(?P<matrix>gate_up|down)_projs\.(?P<id>\d+)\.(?P<kind>weight|bias)")


def rearranged(recipes: Recipes, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """The recipes under the names, and in the shapes, that transformers expects on disk."""
    for rule in RULES:
        recipes = rule(recipes, checkpoint)
    return dict(recipes)


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


def _identity_experts(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Zeros for LongCat's experts that only hand on the token: transformers keeps matrices of them, and uses none."""
    result = dict(recipes)
    first = re.compile(r"(.*\.experts\.)0(\.(?:gate|up)_proj\.weight)")
    config = checkpoint.config
    for match in filter(None, map(first.fullmatch, recipes if config.get("model_type") == "longcat_flash" else ())):
        own = changed(recipes[match[0]], torch.zeros_like)
        missing = range(config["n_routed_experts"], config["n_routed_experts"] + config["zero_expert_num"])
        result |= {name: own for e in missing if (name := f"{match[1]}{e}{match[2]}") not in recipes}
    return result


RULES: tuple[Rule, ...] = (_unsloth, *mlx.RULES, _identity_experts)
