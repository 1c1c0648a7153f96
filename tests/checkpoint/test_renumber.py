"""Lists of module names after a cut: exact names, patterns and side files, for every convention in use."""

from __future__ import annotations

import json

import pytest

from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.renumber import Renumbering
from moeprune.errors import InputError
from tests import handmade

EXPERTS, KEEP = 12, {"model.layers.0": (1, 3, 10, 11), "model.layers.1": (0, 1, 2, 3)}
PROJECTIONS = ("down_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = {}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", [EXPERTS, 8])
        for expert in range(EXPERTS):
            for projection in PROJECTIONS:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                tensors[f"{name}.weight"] = ("U8", [8, 4])
                tensors[f"{name}.weight_scale"] = ("F8_E4M3", [8, 1])
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    return handmade.checkpoint(tmp_path_factory.mktemp("ct"), config, tensors)


def renumbered(folder, settings, side_file=None):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    if side_file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(side_file))
    checkpoint = open_checkpoint(folder)
    numbers = Renumbering(checkpoint, understand(checkpoint), KEEP)
    return numbers.config(checkpoint.config)["quantization_config"], numbers


def expert(layer, number, *rest):
    return ".".join([f"model.layers.{layer}.mlp.experts.{number}", *rest])


@pytest.mark.parametrize(
    ("method", "entry", "expected"),
    [
        # exact names follow their expert, or go with it
        ("compressed-tensors", expert(0, 3, "up_proj"), [expert(0, 1, "up_proj")]),
        ("compressed-tensors", expert(0, 2, "up_proj"), []),
        ("compressed-tensors", expert(1, 3, "up_proj"), [expert(1, 3, "up_proj")]),
        ("modelopt", expert(0, 10), [expert(0, 2)]),
        # a word about a tensor of an expert goes with it
        ("spqr", expert(0, 3, "up_proj.weight_scale.shape"), [expert(0, 1, "up_proj.weight_scale.shape")]),
        ("spqr", expert(0, 2, "up_proj.dense_weights.shape"), []),
        # another prefix before the layers
        ("fp8", "language_model." + expert(0, 11, "down_proj"), ["language_model." + expert(0, 3, "down_proj")]),
        ("fp8", "layers.0.mlp.experts.2.down_proj", []),
        # what names no single expert stays as it is
        ("compressed-tensors", "lm_head", ["lm_head"]),
        ("compressed-tensors", "re:.*mlp\\.gate$", ["re:.*mlp\\.gate$"]),
        ("compressed-tensors", "re:.*experts.*", ["re:.*experts.*"]),
        (
            "compressed-tensors",
            "re:model.layers.1.mlp.experts.\\d+.up_proj",
            ["re:model.layers.1.mlp.experts.\\d+.up_proj"],
        ),
        ("modelopt", "model.layers.0.self_attn*", ["model.layers.0.self_attn*"]),
        ("modelopt", "model.layers.1.mlp.experts*", ["model.layers.1.mlp.experts*"]),
        # a pattern that picks some is expanded against the old names: 1 also means 10 and 11
        ("compressed-tensors", "re:model.layers.0.mlp.experts.1.*up", [expert(0, n, "up_proj") for n in (0, 2, 3)]),
        ("compressed-tensors", "re:.*0.mlp.experts.1\\.up", [expert(0, 0, "up_proj")]),
        ("modelopt", expert(0, "1*"), [expert(0, n, p) for n in (0, 2, 3) for p in PROJECTIONS]),
        ("modelopt", expert(0, "1.*"), [expert(0, 0, p) for p in PROJECTIONS]),
        ("modelopt", expert(0, "[45].up*"), []),
    ],
)
def test_one_entry(folder, method, entry, expected):
    after, _ = renumbered(folder, {"quant_method": method, "ignore": ["a", entry, "z"]})
    assert after == {"quant_method": method, "ignore": ["a", *expected, "z"]}


def test_dictionaries_keep_their_order_and_values(folder):
    settings = {
        "quant_method": "gptq",
        "dynamic": {f"-:{expert(0, 3)}\\.up.*": {}, "+:.*down.*": {"bits": 8}},
        "extra_config": {expert(0, 11, "up_proj"): {"bits": 16}, expert(0, 0, "up_proj"): {"bits": 16}},
    }
    after, _ = renumbered(folder, settings)
    assert list(after["dynamic"]) == [r"-:model\.layers\.0\.mlp\.experts\.1\.up_proj$", "+:.*down.*"]
    assert after["extra_config"] == {expert(0, 3, "up_proj"): {"bits": 16}}


def test_both_files_of_modelopt_follow(folder):
    settings = {"quant_method": "modelopt", "ignore": [expert(0, 10, "up_proj")]}
    side = {"producer": {"name": "modelopt"}, "quantization": {"quantized_layers": {expert(0, 3, "up_proj"): {"a": 1}}}}
    after, numbers = renumbered(folder, settings, side)
    assert after["ignore"] == [expert(0, 2, "up_proj")]
    changed = numbers.side_files()["hf_quant_config.json"]
    assert changed["quantization"]["quantized_layers"] == {expert(0, 1, "up_proj"): {"a": 1}}
    assert changed["producer"] == side["producer"]


def test_names_without_a_layer_hold_for_all_layers(folder):
    """GPTQ lists what it quantized inside a layer; every layer keeps four experts, whichever they were."""
    inside = [[f"mlp.experts.{n}.{p}" for n in range(EXPERTS) for p in ("up_proj", "gate_proj")], ["self_attn.q_proj"]]
    after, _ = renumbered(folder, {"quant_method": "gptq", "modules_in_block_to_quantize": inside})
    kept = [f"mlp.experts.{n}.{p}" for n in range(4) for p in ("up_proj", "gate_proj")]
    assert after["modules_in_block_to_quantize"] == [kept, ["self_attn.q_proj"]]
    with pytest.raises(InputError, match="full name"):
        renumbered(folder, {"quant_method": "gptq", "modules_in_block_to_quantize": [inside[0][2:]]})


def test_copies_of_the_settings_beside_the_config_follow(folder):
    (folder / "quantization_config.json").write_text(json.dumps({"dynamic": {f"-:{expert(0, 3)}\\..*": {}}}))
    _, numbers = renumbered(folder, {"quant_method": "gptq"})
    names = [rf"-:model\.layers\.0\.mlp\.experts\.1\.{p}$" for p in PROJECTIONS]
    assert numbers.side_files()["quantization_config.json"] == {"dynamic": {name: {} for name in names}}
    (folder / "quantization_config.json").unlink()


def test_what_cannot_be_decided_is_refused(folder):
    with pytest.raises(InputError, match="full name"):
        renumbered(folder, {"quant_method": "fp8", "modules_to_not_convert": ["experts.3.up_proj"]})
    with pytest.raises(InputError, match="broken pattern"):
        renumbered(folder, {"quant_method": "compressed-tensors", "ignore": ["re:experts.(3"]})


def test_what_torchao_says_of_its_tensors(folder):
    """Its list of names, and what stands under each, follow the experts; transformers refuses a header otherwise."""
    _, numbers = renumbered(folder, {"quant_method": "torchao"})
    names = [expert(0, number, "up_proj.weight") for number in (2, 3, 10)] + ["model.norm.weight"]
    about = {name: json.dumps({"_type": name}) for name in names} | {"tensor_names": json.dumps(names), "format": "pt"}
    staying = [expert(0, 1, "up_proj.weight"), expert(0, 2, "up_proj.weight"), "model.norm.weight"]
    after = numbers.metadata(about)
    assert json.loads(after.pop("tensor_names")) == staying
    assert after == dict(zip(staying, [about[name] for name in names[1:]], strict=True)) | {"format": "pt"}
    with pytest.raises(InputError, match="tensor_names is not JSON"):
        numbers.metadata({"tensor_names": "["})


def test_what_torchao_says_of_a_stack(tmp_path):
    stem = "model.layers.0.mlp."
    tensors = {f"{stem}gate.weight": ("BF16", [EXPERTS, 8])}
    for kind in ("gate_up_proj", "down_proj"):
        tensors[f"{stem}experts._{kind}_qdata"] = ("I8", [EXPERTS, 8, 4])
        tensors[f"{stem}experts._{kind}_scale"] = ("BF16", [EXPERTS, 1, 8])
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 2}
    checkpoint = open_checkpoint(handmade.checkpoint(tmp_path, config, tensors))
    numbers = Renumbering(checkpoint, understand(checkpoint), {"model.layers.0": (1, 3)})
    for before, after in (
        ({"block_size": [1, 1, 8], "shape": [EXPERTS, 8, 8]}, {"block_size": [1, 1, 8], "shape": [2, 8, 8]}),
        ({"block_size": [EXPERTS, 8, 8]}, {"block_size": [2, 8, 8]}),  # one scale for the whole stack
        ({"block_size": None, "kwargs": {"shape": [EXPERTS]}}, {"block_size": None, "kwargs": {"shape": [EXPERTS]}}),
    ):
        about, wanted = (json.dumps({"_type": "Int4Tensor", "_data": data}) for data in (before, after))
        same = {f"{stem}shared_expert.up_proj": about, f"{stem}gate.weight": about}
        assert (
            numbers.metadata({f"{stem}experts.down_proj": about} | same) == {f"{stem}experts.down_proj": wanted} | same
        )


def test_the_map_of_optimum_quanto(folder):
    kinds = {"weights": "qint8", "activations": "none"}
    names = [expert(0, number, "up_proj") for number in (2, 3, 10)] + ["lm_head"]
    path = folder / "quanto_qmap.json"
    path.write_text(json.dumps(dict.fromkeys(names, kinds)))
    _, numbers = renumbered(folder, {"quant_method": "quanto"})
    after = numbers.side_files()
    path.unlink()
    staying = [expert(0, 1, "up_proj"), expert(0, 2, "up_proj"), "lm_head"]
    assert after["quanto_qmap.json"] == dict.fromkeys(staying, kinds)
