"""A model that lacks layers or experts that its config promises ends in one line; what a config may say otherwise."""

from __future__ import annotations

import json

import pytest

import prune_model
import reap
from moeprune.checkpoint.families import understand, updated_config
from moeprune.errors import InputError
from tests import tiny
from tests.checkpoint.hub import GATE, GATED, TOP_2, Case, E, layer, write

COUNTED = {"model_type": "qwen3_moe", "num_experts": E, "num_hidden_layers": 3} | TOP_2
DENSE = {f"model.layers.{number}.input_layernorm.weight": [16] for number in range(3)}


def sparse(*numbers):
    return DENSE | {k: v for number in numbers for k, v in layer(f"model.layers.{number}", GATE, GATED).items()}


def without(tensors, prefix):
    return {name: shape for name, shape in tensors.items() if not name.startswith(prefix)}


LACKING = {
    "the last layer": (without(sparse(0, 1), "model.layers.2."), r"promises 3 layers.* model\.layers\.2 \(1 missing"),
    "a layer between": (without(sparse(0, 2), "model.layers.1."), r"promises 3 layers.* model\.layers\.1 \(1 missing"),
    "all but one": (without(without(sparse(0), "model.layers.1."), "model.layers.2."), r"layers\.1 \(2 missing"),
    "the experts of one layer": (
        without(sparse(0, 1, 2), "model.layers.2.mlp.experts"),
        r"router model\.layers\.2\.mlp\.gate\.weight has no experts",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_the_config_promises_must_be_there(tmp_path, what):
    tensors, message = LACKING[what]
    with pytest.raises(InputError, match=message):
        understand(write(tmp_path, Case(COUNTED, tensors, {})))


@pytest.mark.parametrize("stage", [reap.main, prune_model.main])
def test_stages_notice_before_they_begin(tmp_path, stage):
    """The weights end after two of three layers, and so does the index: files and index agree."""
    parent = tiny.make("qwen3_moe", tmp_path / "parent", num_hidden_layers=2)
    config = tiny.read_config(parent) | {"num_hidden_layers": 3}
    (parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"promises 3 layers.* model\.layers\.2 "):
        stage(["--model-path", str(parent), "--output-path", str(tmp_path / "output"), "--prune-ratio", "0.5"])


ALLOWED = {
    "dense layers": (COUNTED, sparse(1, 2)),
    "layers that predict further tokens": (COUNTED | {"num_hidden_layers": 2}, sparse(0, 1, 2)),
    "no number of layers": ({k: v for k, v in COUNTED.items() if k != "num_hidden_layers"}, sparse(0, 2)),
    "halves of layers, counted by another key": (COUNTED | {"num_hidden_layers": 6, "num_layers": 3}, sparse(0, 2)),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_is_complete_is_taken(tmp_path, what):
    config, tensors = ALLOWED[what]
    assert understand(write(tmp_path, Case(config, tensors, {}))).experts == E


def test_a_count_of_something_else_stays_what_it_is(tmp_path):
    """Dense layers counted as one expert, and an alias that the model does not read."""
    config = COUNTED | {"moe_num_experts": [1, E, E], "num_local_experts": 4, "draft_config": {"num_experts": 2 * E}}
    checkpoint = write(tmp_path, Case(config, sparse(1, 2), {}))
    expected = config | {"num_experts": 6, "moe_num_experts": [1, 6, 6]}
    assert updated_config(checkpoint, understand(checkpoint), 6) == expected


def test_experts_per_token_cannot_be_guessed(tmp_path):
    config = {name: value for name, value in COUNTED.items() if name not in TOP_2}
    with pytest.raises(InputError, match=r"config\.json does not say how many experts the router chooses.* TOP_K_KEYS"):
        understand(write(tmp_path / "none", Case(config, sparse(0), {})))
    outer = {"model_type": "x", "text_config": config, "num_experts_per_tok": 3}
    assert understand(write(tmp_path / "outer", Case(outer, sparse(0), {}))).top_k == 3


ODD_ROUTERS = {
    "columns where rows should be": {"mlp.gate.weight": [16, E], "mlp.gate.other.weight": [E, 16]},
    "a bias of another size": GATE | {"mlp.gate.e_score_correction_bias": [E + 2]},
    "a bias of two rows": GATE | {"mlp.expert_bias": [2, E]},
    "rows of an unknown kind": {"mlp.gate.weight": [E + 2, 16], "mlp.gate.other.weight": [E, 16]},
    "stacked behind an axis of one": GATE | {"mlp.experts.scale": [1, E]},
}


@pytest.mark.parametrize("what", ODD_ROUTERS)
def test_a_router_that_is_half_understood_is_refused(tmp_path, what):
    tensors = layer("model.layers.0", ODD_ROUTERS[what], GATED)
    config = COUNTED | {"num_hidden_layers": 1, "hidden_size": 16}
    with pytest.raises(InputError, match=r"TAILS|does not begin with the 8"):
        understand(write(tmp_path, Case(config, tensors, {})))


def test_a_norm_in_the_router_is_none_of_the_experts_business(tmp_path):
    tensors = layer("model.layers.0", GATE | {"mlp.gate.norm.weight": [16], "mlp.gate.up.weight": [32, 16]}, GATED)
    config = COUNTED | {"num_hidden_layers": 1, "hidden_size": 16}
    parts = understand(write(tmp_path, Case(config, tensors, {}))).blocks[0].parts
    assert [part.tensor for part in parts if part.router] == ["model.layers.0.mlp.gate.weight"]
