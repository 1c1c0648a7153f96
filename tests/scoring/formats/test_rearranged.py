"""Layouts of MLX, written here from plain tensors as mlx-lm's conversions do: each must come back as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.scoring.formats.dequantize import recipes
from tests.scoring.formats.test_made_by_libraries import plain

LAYER, E, H, INNER = "model.layers.0", 3, 4, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def back(folder, model_type, tensors, form="mlx", **config):
    """What transformers would get of these tensors."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": form})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    return plain(folder, torch.float32)


def check(found, expected):
    assert found.keys() == expected.keys()
    assert {name for name, tensor in expected.items() if not torch.equal(found[name], tensor)} == set()


def stacks(module, names):
    """Per-expert matrices, and MLX's stacks of them: its name -> the family's own."""
    each = {n: torch.randn(E, *((H, INNER) if "down" in n or n == "fc2" else (INNER, H))) for n in names}
    mlx = {f"{module}switch_mlp.{n}.weight": stack for n, stack in each.items()}
    return mlx, {f"{module}experts.{e}.{own}.weight": each[n][e].clone() for n, own in names.items() for e in range(E)}


@pytest.mark.parametrize(
    ("model_type", "module", "names"),
    [
        ("qwen3_moe", "mlp.", {n: n for n in ("gate_proj", "up_proj", "down_proj")}),
        ("mixtral", "block_sparse_moe.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        ("lfm2_moe", "feed_forward.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        ("nemotron_h", "mixer.", {"fc1": "up_proj", "fc2": "down_proj"}),
    ],
)
def test_stacks_of_experts(tmp_path, model_type, module, names):
    mlx, expected = stacks(f"{LAYER}.{module}", names)
    if model_type == "lfm2_moe":  # whose dense layers have other names too
        dense = torch.randn(INNER, H)
        mlx["model.layers.1.feed_forward.up_proj.weight"] = dense
        expected["model.layers.1.feed_forward.w3.weight"] = dense
    check(back(tmp_path, model_type, mlx), expected)


def test_granite_keeps_gate_and_up_in_one(tmp_path):
    module = f"{LAYER}.block_sparse_moe."
    both, down = torch.randn(E, 2 * INNER, H), torch.randn(E, H, INNER)
    mlx = {
        f"{module}switch_mlp.gate_proj.weight": both[:, :INNER],
        f"{module}switch_mlp.up_proj.weight": both[:, INNER:],
    }
    mlx[f"{module}switch_mlp.down_proj.weight"] = down
    expected = {f"{module}input_linear.weight": both, f"{module}output_linear.weight": down}
    check(back(tmp_path, "granitemoe", mlx), expected)


def test_dbrx_has_one_flat_matrix(tmp_path):
    flat, module = torch.randn(E * INNER, H), "transformer.blocks.0.ffn.experts."
    mlx = {f"{module}{e}.w1.weight": part for e, part in enumerate(flat.chunk(E))}
    mlx |= {f"{module}{e}.w2.weight": part.T for e, part in enumerate(flat.chunk(E))}
    check(back(tmp_path, "dbrx", mlx), {f"{module}mlp.w1": flat, f"{module}mlp.w2": flat})


@pytest.mark.parametrize("model_type", ["gpt_oss", "openai_privacy_filter"])
def test_gate_and_up_go_in_turns_or_one_behind_the_other(tmp_path, model_type):
    gate, up, down = torch.randn(E, INNER, H), torch.randn(E, INNER, H), torch.randn(E, H, INNER)
    module, bias = f"{LAYER}.mlp.", torch.randn(2, E, INNER)
    mlx = {f"{module}router.weight": torch.randn(E, H), f"{module}experts.down_proj.weight": down}
    mlx |= {f"{module}experts.{n}_proj.weight": t for n, t in (("gate", gate), ("up", up))}
    mlx |= {f"{module}experts.{n}_proj.bias": t for n, t in (("gate", bias[0]), ("up", bias[1]))}
    both = torch.empty(E, H, 2 * INNER), torch.empty(E, 2 * INNER)
    for tensor, (one, two) in zip(both, ((gate.mT, up.mT), bias), strict=True):
        at = (
            (slice(None, None, 2), slice(1, None, 2)) if model_type == "gpt_oss" else (slice(INNER), slice(INNER, None))
        )
        tensor[..., at[0]], tensor[..., at[1]] = one, two
    expected = {f"{module}router.weight": mlx[f"{module}router.weight"], f"{module}experts.down_proj": down.mT}
    expected |= {f"{module}experts.gate_up_proj": both[0], f"{module}experts.gate_up_proj_bias": both[1]}
    check(back(tmp_path, model_type, mlx), expected)


def test_ernie_does_without_its_bias(tmp_path):
    router = torch.randn(E, H)
    expected = {
        f"{LAYER}.mlp.gate.weight": router,
        f"{LAYER}.mlp.moe_statics.e_score_correction_bias": torch.zeros(1, E),
    }
    check(back(tmp_path, "ernie4_5_moe", {f"{LAYER}.mlp.gate.weight": router}), expected)


def test_the_routers_of_ling_and_exaone(tmp_path):
    router, bias = torch.randn(E, H), torch.randn(E)
    mlx = {f"{LAYER}.mlp.gate.gate_proj.weight": router, f"{LAYER}.mlp.gate.e_score_correction_bias": bias}
    expected = {f"{LAYER}.mlp.gate.weight": router, f"{LAYER}.mlp.e_score_correction_bias": bias}
    check(back(tmp_path, "exaone_moe", mlx), expected)


def test_identity_experts_of_longcat_get_matrices_that_nobody_uses(tmp_path):
    """Published files have none; transformers wants gates and ups of them."""
    each = {f"{LAYER}.mlp.experts.{e}.{n}_proj.weight": torch.randn(INNER, H) for e in range(E) for n in ("gate", "up")}
    more = {
        f"{LAYER}.mlp.experts.{e}.{n}_proj.weight": torch.zeros(INNER, H) for e in (E, E + 1) for n in ("gate", "up")
    }
    check(back(tmp_path, "longcat_flash", each, "pt", n_routed_experts=E, zero_expert_num=2), each | more)


def test_llama_4_has_its_stacks_among_the_experts(tmp_path):
    module, up = f"{LAYER}.feed_forward.", torch.randn(E, INNER, H)
    found = back(tmp_path, "llama4_text", {f"{module}experts.up_proj.weight": up})
    check(found, {f"{module}experts.{e}.up_proj.weight": up[e] for e in range(E)})


def test_latent_attention(tmp_path):
    """kv_b_proj [A (K + V), R] is split by head, and its keys are turned."""
    heads, keys, values, rank = 2, 3, 5, 7
    whole = torch.randn(heads, keys + values, rank)
    stem = f"{LAYER}.self_attn."
    mlx = {f"{stem}embed_q.weight": whole[:, :keys].mT, f"{stem}unembed_out.weight": whole[:, keys:]}
    check(back(tmp_path, "deepseek_v3", mlx), {f"{stem}kv_b_proj.weight": whole.reshape(-1, rank)})


@pytest.mark.parametrize("converted", [True, False])
def test_convolutions_and_the_norms_that_go_with_them(tmp_path, converted):
    """mlx-lm turns [C, 1, K] and adds one to these norms; files of others have neither."""
    conv, norms = torch.randn(H, 1, 3), ("input_layernorm", "self_attn.q_norm", "linear_attn.norm")
    expected = {f"{LAYER}.linear_attn.conv1d.weight": conv}
    expected |= {f"{LAYER}.{norm}.weight": torch.randint(-8, 8, (H,)) / 16 for norm in norms}
    expected["model.norm.weight"] = torch.tensor([0.25, -0.5, 0.0, 1.0])
    mlx = dict(expected)
    if converted:
        mlx[f"{LAYER}.linear_attn.conv1d.weight"] = conv.mT
        for name in ("model.norm.weight", f"{LAYER}.input_layernorm.weight", f"{LAYER}.self_attn.q_norm.weight"):
            mlx[name] = expected[name] + 1
    check(back(tmp_path, "qwen3_next", mlx, "mlx" if converted else "pt"), expected)


def test_a_convolution_of_one_step_stays_as_it_is(tmp_path):
    tensors = {"decoder.conv.conv.weight": torch.randn(16, 16, 1)}
    check(back(tmp_path, "qwen3_omni_moe", tensors, "pt"), tensors)


def test_no_row_of_a_stack_is_read_as_the_whole(tmp_path):
    """What has no `make` may be read from the disk straight into a parameter."""
    mlx, _ = stacks(f"{LAYER}.mlp.", {n: n for n in ("gate_proj", "up_proj", "down_proj")})
    back(tmp_path, "qwen3_moe", mlx)
    assert all(recipe.make is not None for recipe in recipes(open_checkpoint(tmp_path)).values())
