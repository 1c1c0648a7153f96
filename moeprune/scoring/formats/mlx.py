"""What conversions to MLX (mlx-lm, mlx-vlm) change in a checkpoint, undone: names, stacks, turned axes, shifted norms.

A family that they convert in a way of its own: an entry in a table here. A rule takes all recipes and the checkpoint,
and returns the recipes with its own names replaced (rearranged.py).
Legend of the array suffixes: E experts, I inner size of an expert, H hidden size, A heads, R rank, K a key, V a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from moeprune.checkpoint.families import scopes
from moeprune.checkpoint.folder import Checkpoint
from moeprune.checkpoint.structure import is_tower
from moeprune.errors import InputError
from moeprune.scoring.formats.recipe import Recipe, changed, one_row, together

Recipes = Mapping[str, Recipe]

# Experts are stacked under a name of its own, one matrix for each of the three; `experts.fc1` is Aria's own.
STACK = re.compile(
    r"(?P<module>.*\.)(?:switch_mlp|switch_glu|experts(?!\.fc))\.(?P<matrix>(?:gate|up|down|gate_up)_proj|fc[12])\.(?P<kind>weight|bias)"
)
NAMES = {"fc1": "up_proj", "fc2": "down_proj"}
W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
W123_FAMILIES = {"lfm2_moe", "kimi_linear"}  # and whatever is called block_sparse_moe
DENSE = re.compile(r"(.*\.feed_forward\.)((?:gate|up|down)_proj)\.weight")  # of LFM2, whose names MLX changes too

# Model type (any where it is empty), MLX's name, the name that transformers knows.
RENAMED: tuple[tuple[str, str, str], ...] = (
    ("", r"\.mlp\.gate\.(gate_proj|gate|proj)\.", ".mlp.gate."),
    ("exaone_moe", r"\.mlp\.gate\.e_score", ".mlp.e_score"),
    ("kimi_linear", r"\.mlp\.e_score", ".mlp.gate.e_score"),
    ("kimi_linear", r"_conv\.conv\.", "_conv1d."),
    ("step3p5", r"\.mlp\.switch_mlp\.", ".moe."),
    ("step3p5", r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
    ("step3p5", r"\.mlp\.share_expert\.", ".share_expert."),
)
# Families whose norms add one when they run, and which of them MLX adds it to beforehand.
SHIFTED = {
    "qwen3_next": (USUAL := r"(\.(input|post_attention)_layernorm|(^|\.)model\.norm|\.[qk]_norm)\.weight$"),
    "qwen3_5_moe_text": USUAL,
    "step3p5": r"norm.*\.weight$",
}
# What MLX leaves out and does without: type, a tensor that is there, the name of what is not. It is all zeros then.
LEFT_OUT = (("ernie4_5_moe", r"gate\.weight$", "moe_statics.e_score_correction_bias"),)
FOLDED = {
    "muse_spark": "its queries, keys, values and gates are one matrix with other rows, and its norms are rounded",
    "diffusion_gemma": "the half that reads is not in it",
}
UNKNOWN = (
    "MLX lays this family out in a way that is not known: add it to a table in moeprune/scoring/formats/mlx.py, or "
    "score the original checkpoint and cut this one with its scores (--other-scores)"
)
# Where transformers itself has the language model under the name that MLX puts around all of them.
SAME_NAMES = {"llama4"}
WRAPPER = "language_model."


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Whether MLX wrote the file."""
    return any(metadata.get("format") == "mlx" for metadata in checkpoint.shard_metadata.values())


def seen(config: Any, checkpoint: Checkpoint) -> Any:
    """What is run of a model: of MLX's files the part for text; towers lie there in many ways, or are left out."""
    return config.get_text_config() if is_mlx(checkpoint) else config


def _types(checkpoint: Checkpoint) -> set[str]:
    return {str(scope.get("model_type", "")) for _, scope in scopes(checkpoint.config)}


def refused(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Families that MLX changes beyond what can be undone end here."""
    for family in _types(checkpoint) & FOLDED.keys() if is_mlx(checkpoint) else ():
        raise InputError(
            f"{checkpoint.folder}: MLX's form of {family} cannot be scored: {FOLDED[family]}; score the original "
            "checkpoint and cut this one with its scores (--other-scores)"
        )
    return recipes


def names(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Modules of MLX's own, and the one that it puts around every language model."""
    if not is_mlx(checkpoint):
        return recipes
    types = _types(checkpoint)
    around = "model.language_model." if _is_nested(checkpoint) else "model."
    renamed = [(pattern, name) for family, pattern, name in RENAMED if family in types or not family]
    if not types & SAME_NAMES:
        renamed += [(rf"^{WRAPPER}model\.", around), (rf"^{WRAPPER}", "")]
    return {_renamed(name, renamed): recipe for name, recipe in recipes.items()}


def _is_nested(checkpoint: Checkpoint) -> bool:
    """Whether the language model is a part of the model, beside towers."""
    return any("text_config" in scope for _, scope in scopes(checkpoint.config))


def _renamed(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, by in patterns:
        name = re.sub(pattern, by, name)
    return name


def gpt_oss(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Gate and up apart, outputs first; transformers wants them in one, in turns or as halves, inputs first."""
    result, join = dict(recipes), _in_turns if "gpt_oss" in _types(checkpoint) else _as_halves
    for name in recipes:
        match = STACK.fullmatch(name)
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
            result[plain] = together([own, recipes[f"{module}experts.up_proj.{kind}"]], join)
    return result


def _in_turns(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    return _inputs_first(torch.stack(gate_and_up, dim=2).flatten(1, 2))


def _as_halves(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    return _inputs_first(torch.cat(gate_and_up, dim=1))


def _inputs_first(both: torch.Tensor) -> torch.Tensor:
    return both if both.ndim == 2 else both.mT  # a bias [E, 2 I] | [E, 2 I, H] -> [E, H, 2 I]


def dbrx(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """A matrix for each expert, the last one turned; transformers wants one flat [E I, H] for all."""
    result = dict(recipes)
    first = re.compile(r"(.*\.ffn\.experts\.)0\.(w1|v1|w2)\.weight")
    for match in filter(None, map(first.fullmatch, recipes if "dbrx" in _types(checkpoint) else ())):
        stem, matrix, each = match[1], match[2], list[Recipe]()
        while (name := f"{stem}{len(each)}.{matrix}.weight") in result:
            own = result.pop(name)
            each.append(changed(own, lambda down_HI: down_HI.mT) if matrix == "w2" else own)
        result[f"{stem}mlp.{matrix}"] = together(each, torch.cat)
    return result


def stacks(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """One recipe for each expert of a stack; granite keeps them stacked, with gate and up in one."""
    result, types = dict(recipes), _types(checkpoint)
    granite, lfm2 = any(name.startswith("granitemoe") for name in types), "lfm2_moe" in types
    for name, recipe in recipes.items():
        if lfm2 and (dense := DENSE.fullmatch(name)):
            result[f"{dense[1]}{W123[dense[2]]}.weight"] = result.pop(name)
        match = STACK.fullmatch(name)
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
        w123 = module.endswith("block_sparse_moe.") or types & W123_FAMILIES
        matrix = (W123 if w123 else NAMES).get(matrix, matrix)
        for expert in range(_axes(recipe, checkpoint)[0]):
            own = one_row(recipe, expert)
            halves = {"gate_proj": 0, "up_proj": 1} if matrix == "gate_up_proj" else {}
            result |= {f"{module}experts.{expert}.{half}.{kind}": _half(own, at) for half, at in halves.items()}
            result |= {} if halves else {f"{module}experts.{expert}.{matrix}.{kind}": own}
    return result


def _half(recipe: Recipe, which: int) -> Recipe:
    """Gate or up, of a matrix [2 I, H] that holds both."""
    return changed(recipe, lambda both: both.chunk(2)[which])


def attention(recipes: Recipes, _checkpoint: Checkpoint) -> Recipes:
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


def convolutions(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """[C, K, 1] becomes [C, 1, K]."""
    result = dict(recipes)
    # A convolution in a tower may have a kernel of one place, and then looks like one that was turned.
    kernels = [name for name in recipes if re.search(r"conv(1d)?\.weight$", name) and not is_tower(name)]
    for name in kernels if is_mlx(checkpoint) else ():
        if len(axes := _axes(recipes[name], checkpoint)) == 3 and axes[2] == 1 < axes[1]:
            result[name] = changed(recipes[name], lambda weight_CK1: weight_CK1.mT)
    return result


def norms(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Without the one that these families add when they run."""
    result = dict(recipes)
    for family in _types(checkpoint) & SHIFTED.keys() if is_mlx(checkpoint) else ():
        for name in recipes:
            if re.search(SHIFTED[family], name) and not is_tower(name):
                result[name] = changed(recipes[name], lambda gain: (gain.float() - 1).to(gain.dtype))
    return result


def left_out(recipes: Recipes, checkpoint: Checkpoint) -> Recipes:
    """Zeros for a bias [1, E] that MLX's own forward does without."""
    result, types = dict(recipes), _types(checkpoint)
    for family, known, missing in LEFT_OUT:
        for name in recipes if is_mlx(checkpoint) and family in types else ():
            bias = re.sub(known, missing, name)
            if bias not in result:
                result[bias] = changed(recipes[name], lambda router_EH: router_EH.new_zeros(1, len(router_EH)))
    return result


def _axes(recipe: Recipe, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of what a recipe begins with."""
    return checkpoint.tensors[next(iter(recipe.sources.values()))].shape


RULES = (refused, names, gpt_oss, dbrx, stacks, attention, convolutions, norms, left_out)
