"""What is found in layouts of the hub, block by block, and what is refused.

Each case says which tensors belong to experts and how; every other tensor must be left alone. What transformers itself
writes is proven for every configuration by tests/pruning/test_every_family.py.
"""

from __future__ import annotations

import re

import pytest

from moeprune.checkpoint.families import config_without_mtp, mtp_tensors, new_name, understand, updated_config
from moeprune.errors import InputError
from tests.checkpoint.hub import CASES, GATE, GATED, STACKED, Case, E, layer, write


def number(name):
    """The name with N in place of the expert's number."""
    return re.sub(r"(experts\.(?:local_experts\.)?|projs\.)\d+", r"\1N", name)


def described(part):
    if part.kind == "expert":
        return "expert" if part.share == 1 else f"expert of {part.share}"
    if part.kind != "rows":
        return part.kind
    rows = f" x {part.rows_per_expert}" if part.rows_per_expert > 1 else ""
    return f"{'router' if part.router else 'rows'} {part.axis}{rows}" + (f" + {part.tail}" if part.tail else "")


@pytest.mark.parametrize("name", CASES)
def test_a_layout_of_the_hub(tmp_path, name):
    case = CASES[name]
    layout = understand(write(tmp_path, case))
    found = {
        block.name: {number(part.tensor[len(block.name) + 1 :]): described(part) for part in block.parts}
        for block in layout.blocks
    }
    assert found == case.blocks
    assert {block.name: block.role for block in layout.blocks if block.role != "trunk"} == case.role
    assert layout.experts == E


@pytest.mark.parametrize("name", CASES)
def test_renumbering_is_one_to_one(tmp_path, name):
    keep = (0, 1, 4, 5)
    for block in understand(write(tmp_path, CASES[name])).blocks:
        single = [part for part in block.parts if part.kind == "expert"]
        new = {part.tensor: new_name(part, block.experts, keep) for part in single}
        staying = {old: name for old, name in new.items() if name is not None}
        assert len(set(staying.values())) == len(staying) == len(single) // 2
        for old, name in staying.items():
            before, after = (re.search(r"(?:experts\.(?:local_experts\.)?|projs\.)(\d+)", text) for text in (old, name))
            assert (old[: before.start(1)], old[before.end(1) :]) == (name[: after.start(1)], name[after.end(1) :])
            run = 2 if "chunk" in old else 1  # such a tensor serves two neighbours
            assert int(after[1]) == keep.index(run * int(before[1])) // run


def test_every_count_in_the_config_follows_and_nothing_else(tmp_path):
    config = {
        "model_type": "deepseek_ocr2",
        "n_routed_experts": E,
        "num_experts": E,
        "language_config": {
            "z": 1,
            "n_routed_experts": E,
            "num_experts_per_tok": 2,
            "a": E,
            "n_group": 2,
            "topk_group": 1,
        },
        "vision_config": {"num_experts": E, "num_local_experts": 4},
        "moe_num_experts": [E, E],
    }
    case = Case(config, layer("model.layers.0", GATE, GATED), {})
    checkpoint = write(tmp_path, case)
    layout = understand(checkpoint)
    after = updated_config(checkpoint, layout, 6)
    expected = config | {"n_routed_experts": 6, "num_experts": 6, "moe_num_experts": [6, 6]}
    expected["language_config"] = config["language_config"] | {"n_routed_experts": 6}
    assert after == expected
    assert list(after) == list(config)
    assert list(after["language_config"]) == list(config["language_config"])
    assert checkpoint.config == config
    assert (layout.top_k, layout.groups, layout.top_groups) == (2, 2, 1)  # said by the inner part alone


def test_dropping_the_layers_that_predict_further_tokens(tmp_path):
    case = CASES["glm-4.5, MTP as one more layer"]
    dense = Case(
        case.config | {"num_nextn_predict_layers": 2}, case.tensors | {"model.layers.3.mlp.up.weight": [4, 4]}, {}
    )
    for model, layers in ((case, ("model.layers.2.",)), (dense, ("model.layers.2.", "model.layers.3."))):
        checkpoint = write(tmp_path, model)
        gone = mtp_tensors(checkpoint, understand(checkpoint))
        assert gone == {name for name in model.tensors if name.startswith(layers)}
    assert config_without_mtp(case.config) == case.config | {"num_nextn_predict_layers": 0}
    case = CASES["qwen3.5, stacked trunk with an MTP layer per expert"]
    checkpoint = write(tmp_path / "b", case)
    gone = mtp_tensors(checkpoint, understand(checkpoint))
    assert gone == {name for name in case.tensors if name.startswith("mtp.")}


def test_a_scale_for_all_rows_of_a_router_is_no_row_of_experts(tmp_path):
    """FP8 in blocks: one row of scales for up to 128 experts, with as many columns of inputs as there are experts."""
    tensors = layer("model.layers.0", GATE | {"mlp.gate.weight_scale_inv": ("F32", [1, E])}, GATED)
    block = understand(write(tmp_path, Case(MIXTRAL, tensors, {}))).blocks[0]
    assert [part.tensor for part in block.parts if part.router] == ["model.layers.0.mlp.gate.weight"]


MIXTRAL = {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": 2}
REFUSED = {
    "a dense model": (
        {"model_type": "llama"},
        layer("model.layers.0", {"mlp.up_proj.weight": [E, 16]}),
        "llama.*without experts",
    ),
    "product keys": ({"model_type": "doge", "num_experts": E}, layer("model.layers.0", {"mlp.x": [E]}), "product keys"),
    "no router": (MIXTRAL, layer("model.layers.0", {}, GATED), "no router"),
    "another count in the config": (
        {"num_experts": 5},
        layer("model.layers.0", GATE, GATED),
        "8 experts.*num_experts=5",
    ),
    "no count in the config": ({"model_type": "x"}, layer("model.layers.0", GATE, GATED), "nothing about experts"),
    "an expert without a tensor": (
        MIXTRAL,
        {k: v for k, v in layer("model.layers.0", GATE, GATED).items() if "experts.3.up" not in k},
        "expert 3 has no tensor up_proj.weight",
    ),
    "an absurd number": (MIXTRAL, layer("model.layers.0", GATE, GATED, [0, 1, 999_999]), "expert 2 has no"),
    "two groups in a layer": (
        MIXTRAL,
        layer("model.layers.0", GATE | {"moe.gate.weight": [E, 16]}, GATED | {"moe.experts.{e}.w.weight": [4]}),
        "two groups of experts",
    ),
    "experts of an unknown number": (
        {"model_type": "x"},
        layer("model.layers.0", {"mlp.experts.bias": [16], "mlp.experts.scale": []}),
        "how many",
    ),
    "a hole in the numbers": (MIXTRAL, layer("model.layers.0", GATE, GATED, [0, 1, 2, 3, 4, 5, 7]), "expert 6"),
    "blocks of different size": (
        MIXTRAL,
        layer("model.layers.0", GATE, GATED) | layer("model.layers.1", {"mlp.gate.weight": [4, 16]}, GATED, range(4)),
        "8 experts and model.layers.1 has 4",
    ),
    "an unknown table per expert": (
        MIXTRAL,
        layer("model.layers.0", GATE | {"mlp.mystery.table": [3, E]}, GATED),
        r"mlp\.mystery\.table.*is not known",
    ),
    "a stacked tensor of another size": (
        MIXTRAL,
        layer("model.layers.0", GATE | STACKED | {"mlp.experts.more": [5, 16]}),
        "experts.more.*does not begin with the 8",
    ),
    "a router with a scale for several experts": (
        MIXTRAL,
        layer("model.layers.0", GATE | {"mlp.gate.weight_scale_inv": [2, E]}, GATED),
        "packed across experts",
    ),
    "a router that keeps its shape beside it": (
        MIXTRAL,
        layer("model.layers.0", GATE | {"mlp.gate.weight_shape": ("I64", [2])}, GATED),
        "packed across experts",
    ),
    "a router packed across experts": (
        MIXTRAL,
        layer("model.layers.0", GATE | {"mlp.gate.qzeros": ("I32", [1, 1])}, GATED),
        "packed across experts",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path, name):
    config, tensors, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        understand(write(tmp_path, Case(config, tensors, {})))
