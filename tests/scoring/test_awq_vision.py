"""Qwen3-VL-MoE in AWQ, as it is published: experts in int4 one by one, the vision tower and the rest in half precision.

The checkpoint is packed here by hand. Beside it lies a plain one with the values that the packed numbers stand for, in
the form that transformers writes; whatever is measured or said by the one must be by the other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import prune_model
import reap
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.metadata import Sums
from moeprune.scoring.calibration.load import load_calibration
from moeprune.scoring.streaming import LayerStream
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import streamed, vision
from tests.scoring.test_images_end_to_end import samples

GROUP = 32
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in nibble 0, 1, ... of a word
UNTOUCHED = ["visual", "mlp.gate", "lm_head"]


def words(values: np.ndarray) -> torch.Tensor:
    """Rows of 4-bit numbers, eight to a word in AWQ's order."""
    eights = values.reshape(len(values), -1, 8)[..., NIBBLES].astype(np.uint32)
    packed = sum(eights[..., place] << np.uint32(4 * place) for place in range(8))
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def quantized(weight_OI: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What AWQ stores for a matrix, each group of inputs with a scale and a zero; and what that stands for."""
    groups = weight_OI.T.reshape(-1, GROUP, len(weight_OI))  # of inputs, for each output
    low, high = groups.amin(1), groups.amax(1)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    q = (groups / scale.float().unsqueeze(1) + zero.unsqueeze(1)).round().clamp(0, 15)
    value = ((q - zero.unsqueeze(1)) * scale.float().unsqueeze(1)).reshape(weight_OI.T.shape).T
    stored = {"qweight": words(q.reshape(weight_OI.T.shape).numpy()), "qzeros": words(zero.numpy()), "scales": scale}
    return stored, value.contiguous()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the AWQ model and that of the plain one."""
    folder = tmp_path_factory.mktemp("awq")
    model, stored = tiny.build("qwen3_vl_moe").half().float(), {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            block, _, kind = name.rpartition(".")
            if not block.endswith("mlp.experts"):
                stored[name] = tensor.half()
                continue
            for e, expert in enumerate(tensor):
                projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
                for projection, weight_OI in zip(projections, expert.chunk(len(projections)), strict=True):
                    parts, value_OI = quantized(weight_OI.clone())
                    stored |= {f"{block}.{e}.{projection}.{ending}": part for ending, part in parts.items()}
                    weight_OI.copy_(value_OI)
    model.save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "model")
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model" / "model.safetensors")
    config = tiny.read_config(folder / "model")
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    config |= {"quantization_config": settings | {"modules_to_not_convert": UNTOUCHED}, "dtype": "float16"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    for name in ("plain", "model"):
        vision.dress(folder / name, "qwen3_vl_moe")
    return folder / "model", folder / "plain"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return samples(tmp_path_factory.mktemp("awq-data") / "data")


@pytest.mark.parametrize("mode", ["routed", "full", "router"])
def test_scores_are_those_of_the_values(models, data, mode, tmp_path):
    tokenizer, config = AutoTokenizer.from_pretrained(models[0]), tiny.config("qwen3_vl_moe")
    batches = load_calibration(Settings(calibration_path=str(data)), tokenizer, config).batches
    found, expected = (streamed.score(folder, batches, tmp_path, mode) for folder in models)
    assert [block.block for block in found.blocks] == [f"model.language_model.layers.{i}" for i in range(3)]
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        assert min(a.tokens_D) > 0
        for name, array in b.values.items():
            np.testing.assert_array_equal(a.values[name], array, err_msg=f"{a.block} {name}")


def test_scored_and_cut_it_describes_an_image_as_its_values_would(models, data, tmp_path):
    shared = ["--model-path", str(models[0]), "--output-path", str(tmp_path)]
    reap.main([*shared, "--calibration-path", str(data), "--device", "cpu", "--dtype", "float32"])
    prune_model.main([*shared, "--keep", "4"])
    (small,) = tmp_path.glob("model-reap-4of8")
    metadata = json.loads((tmp_path / "reap_metadata.json").read_text())
    assert Sums.from_json(metadata["scores"]).domains == ("mix", "mix [image]")
    keep = metadata["plan"]["keep"]
    assert_carried_over(load_file(models[0] / "model.safetensors"), load_file(small / "model.safetensors"), keep)
    expected = described(cut_in_memory(models[1], keep))
    stream = LayerStream(open_checkpoint(small), Settings(device="cpu", dtype="float32", output_path=tmp_path))
    found = described(lambda **inputs: stream.run([lambda model: model(**inputs)])[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma4", "llama4"])
def test_experts_one_by_one_are_those_of_the_stack(family, tmp_path):
    stacked = streamed.checkpoint(family)
    apart = tmp_path / "apart"
    shutil.copytree(stacked, apart)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(stacked / "model.safetensors").items():
        block, _, kind = name.rpartition(".")
        if not block.endswith(".experts"):
            tensors[name] = tensor
            continue
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for e, expert in enumerate(tensor):
            weight_OI = expert.T if family == "llama4" else expert
            for projection, part_OI in zip(names, weight_OI.chunk(len(names)), strict=True):
                tensors[f"{block}.{e}.{projection}.weight"] = part_OI.contiguous().clone()
    assert len(tensors) > len(load_file(stacked / "model.safetensors"))
    save_file(tensors, apart / "model.safetensors")
    data = streamed.batches()
    found, expected = (streamed.score(folder, data, tmp_path) for folder in (apart, stacked))
    for a, b in zip(found.blocks, expected.blocks, strict=True):
        for name, array in b.values.items():
            np.testing.assert_array_equal(a.values[name], array, err_msg=f"{a.block} {name}")


def assert_carried_over(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], keep: dict[str, list[int]]):
    """To the byte: packed numbers of the experts that stay, under new numbers, and all that is no expert's."""
    expected = {}
    for name, tensor in before.items():
        block, _, rest = name.partition(".mlp.experts.")
        if rest:
            number, _, ending = rest.partition(".")
            if int(number) in keep[block]:
                expected[f"{block}.mlp.experts.{keep[block].index(int(number))}.{ending}"] = tensor
        elif name.endswith(".mlp.gate.weight"):
            expected[name] = tensor[keep[name.removesuffix(".mlp.gate.weight")]]
        else:
            expected[name] = tensor
    assert after.keys() == expected.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in expected.items()
    )


def cut_in_memory(folder: Path, keep: dict[str, list[int]]) -> torch.nn.Module:
    """The plain model with the experts taken out of its matrices."""
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for name, ids in keep.items():
        block = model.get_submodule(name).mlp
        for owner, attribute in ((block.experts, "gate_up_proj"), (block.experts, "down_proj"), (block.gate, "weight")):
            setattr(owner, attribute, torch.nn.Parameter(getattr(owner, attribute).detach()[ids]))
        block.experts.num_experts = block.gate.num_experts = len(ids)
    return model


def described(model) -> torch.Tensor:
    """The logits of the three tokens that the model says to a picture, and the choice of each."""
    processor = vision.processor("qwen3_vl_moe")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    red, said = Image.new("RGB", (24, 24), (250, 10, 10)), []
    for _ in range(3):
        inputs = processor(text=[text], images=[red], return_tensors="pt", add_special_tokens=False)
        for token in said:
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token.argmax(-1, keepdim=True)], dim=1)
        extra = inputs["input_ids"].shape[1] - inputs["attention_mask"].shape[1]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
        with torch.no_grad():
            said.append(model(**inputs, use_cache=False).logits[:, -1])
    return torch.cat(said)
