"""From image files and text to a smaller model that sees: both stages as a person runs them, family by family."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

import prune_model
import reap
from moeprune.metadata import Sums
from moeprune.scoring.calibration.batching import Batch
from moeprune.scoring.calibration.load import load_calibration
from moeprune.settings import Settings
from tests import tiny
from tests.scoring import vision
from tests.scoring.calibration.test_images import noise
from tests.scoring.test_oracle import oracle

# Where the modules with the experts are, for the oracle. It does not know how Gemma calls its experts.
EXPERTS = dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "kimi_k25"), (".mlp",))
EXPERTS["ernie4_5_vl_moe"] = ("text_moe", "vision_moe")  # text and images have experts of their own
VISION = ("visual", "vision", "vision_tower", "vision_model")


def samples(folder: Path) -> Path:
    """Two images and three texts in one file, as a person has them."""
    folder.mkdir()
    rows: list[dict[str, Any]] = [{"text": f"{i} words and numbers {i * 7}"} for i in range(3)]
    for i, (width, height) in enumerate([(40, 24), (16, 48)]):
        noise(folder / f"{i}.png", width, height, i)
        rows.append({"image": f"{i}.png", "prompt": "What is it?", "answer": "Noise."})
    (folder / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "mix.jsonl"


@pytest.fixture(scope="module", params=vision.FAMILIES)
def staged(request, tmp_path_factory):
    """The family's name, its folder, the data and what came out of reap.py and prune_model.py."""
    name, family = request.param, vision.FAMILIES[request.param]
    if family.needs_torchvision and importlib.util.find_spec("torchvision") is None:
        pytest.skip("transformers has no image processor of this family that does without torchvision")
    folder = tmp_path_factory.mktemp(name)
    model = vision.dress(tiny.make(name, folder / "model", **family.model), name)
    data = samples(folder / "data")
    shared = ["--model-path", str(model), "--output-path", str(folder)]
    reap.main([*shared, "--calibration-path", str(data), "--device", "cpu", "--dtype", "float32", "--batch-size", "2"])
    prune_model.main([*shared, "--keep", "4"])
    return name, folder, data


def test_image_and_text_tokens_are_summed_apart_and_right(staged):
    name, folder, data = staged
    scores = Sums.from_json(json.loads((folder / "reap_metadata.json").read_text())["scores"])
    assert scores.domains == ("mix", "mix [image]")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    batches = load_calibration(Settings(calibration_path=str(data), batch_size=2), tokenizer, config).batches
    tokens = [sum(int((batch.domain_BT == d).sum()) for batch in batches) for d in (0, 1)]
    assert min(tokens) > 0
    layers: dict[str, Any] = defaultdict(int)
    for block in scores.blocks:
        layers[block.block.removesuffix(".vision")] += block.tokens_D
        assert block.values["count"].sum(1).tolist() == [2 * n for n in block.tokens_D]
    assert all(total.tolist() == tokens for total in layers.values())
    for ending in EXPERTS.get(name, ()):
        found = [block for block in scores.blocks if block.block.endswith(".vision") == (ending == "vision_moe")]
        reach = [batch for batch in (reaching(batch, ending) for batch in batches) if batch.domain_BT.numel()]
        expected = oracle(folder / "model", batches, ending, reach)
        for block, want in zip(found, expected.values(), strict=True):
            np.testing.assert_array_equal(block.tokens_D, want["tokens"])
            np.testing.assert_array_equal(block.values["count"], want["count"])
            for statistic in ("gate_sum", "norm_sum", "gate_norm_sum", "max_abs"):
                np.testing.assert_allclose(block.values[statistic], want[statistic], rtol=2e-5, err_msg=statistic)


def test_the_report_shows_the_experts_by_what_they_see(staged):
    _, folder, _ = staged
    page = (folder / "report.html").read_text()
    assert "score in mix [image]" in page
    plan = json.loads((folder / "reap_metadata.json").read_text())["plan"]
    assert all(set(block["for_images"]) <= set(range(8)) for block in plan["blocks"])


def reaching(batch: Batch, ending: str) -> Batch:
    """Only the tokens that come to this kind of experts."""
    if ending == ".mlp":
        return batch
    none_BT = torch.zeros_like(batch.inputs["input_ids"])  # a batch of texts alone
    here_BT = batch.inputs.get("moe_mm_token_type_ids", none_BT).bool() == (ending == "vision_moe")
    return replace(batch, domain_BT=batch.domain_BT[here_BT], slice_BT=batch.slice_BT[here_BT])


def test_the_smaller_model_sees(staged):
    name, folder, _ = staged
    (small,) = folder.glob("model-reap-*")
    kind = getattr(transformers, tiny.FAMILIES[name][0])
    model, report = kind.from_pretrained(small, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    before, after = load_file(folder / "model" / "model.safetensors"), load_file(small / "model.safetensors")
    towers = [tensor for tensor in before if any(part in tensor.split(".") for part in VISION)]
    assert towers
    assert all(torch.equal(before[tensor].view(torch.uint8), after[tensor].view(torch.uint8)) for tensor in towers)
    described = [describe(model.eval(), name, color) for color in ((250, 10, 10), (10, 10, 250))]
    assert not torch.equal(*described)


def describe(model: Any, name: str, color: tuple[int, int, int]) -> torch.Tensor:
    """The logits of what the model says to a picture."""
    processor = vision.processor(name)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    picture = Image.new("RGB", (24, 24), color)
    inputs = processor(text=[text], images=[picture], return_tensors="pt", add_special_tokens=False)
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert said.sequences.shape[1] > inputs["input_ids"].shape[1]
    return torch.stack(said.logits[:1])
