"""A question about a picture, answered by a real server with a real model, small as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from tests.scoring import byte_tokenizer
from tests.serving.servers import transformers_serve
from tests.serving.test_batch import batch

ROLES = "{% for m in messages %}{% for p in m.content %}PART{% endfor %}{% endfor %}"
TEMPLATE = ROLES.replace("PART", "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}")
QUESTION, TOKENS = "What is it?", 8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """LLaVA on a Mixtral: of this kind transformers needs no torchvision. A picture of any size becomes 4 tokens."""
    folder = tmp_path_factory.mktemp("pictures") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.MixtralConfig(
        **sizes, vocab_size=300, num_key_value_heads=2, num_local_experts=4, eos_token_id=2
    )
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32)
    both = {"text_config": text, "vision_config": vision, "image_token_index": 3, "vision_feature_layer": -1}
    torch.manual_seed(0)
    made = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**both, image_seq_length=4))
    with torch.no_grad():
        for matrix in (p for p in made.parameters() if p.dim() > 1):
            matrix.mul_(8)  # as drawn, the picture hardly reaches the answer
    made.save_pretrained(folder)
    tokenizer = byte_tokenizer.plain(("<pad>", "<s>", "</s>", "<image>"))
    tokenizer.eos_token = "</s>"
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    cut = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokenizer, **cut, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def own_answer(folder: Path, picture: Path) -> str:
    """The same question without a server."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    parts = [{"type": "image", "url": str(picture)}, {"type": "text", "text": QUESTION}]
    given = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **given)
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True)


def test_a_server_sees_the_pictures_that_the_batch_sends(model, tmp_path):
    lines = [{"id": "none", "prompt": QUESTION}]
    for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
        Image.new("RGB", (40, 24), colour).save(tmp_path / f"{name}.png")
        lines.append({"id": name, "prompt": QUESTION, "images": [f"{name}.png"]})
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--prompts-path", "p.jsonl", "--served-model", str(model), "--max-new-tokens", str(TOKENS))
    with transformers_serve(str(model), tmp_path / "log") as port:
        done = batch(tmp_path, f"http://127.0.0.1:{port}/v1", *words)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()[-2000:]
    found = {entry["id"]: entry for entry in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())}
    for name in ("red", "blue"):
        assert found[name]["answer"] == own_answer(model, tmp_path / f"{name}.png")
        assert found[name]["prompt_tokens"] == found["none"]["prompt_tokens"] + 4
    assert len({entry["answer"] for entry in found.values()}) == 3
