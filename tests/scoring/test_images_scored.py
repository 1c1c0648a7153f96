"""Vision-language models scored on text and images together, against the loop over tokens in float64.

The pixels are drawn here, so that no image library is needed. What processors make of files is tested elsewhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeprune.scoring.calibration.batching import unpacked
from moeprune.scoring.calibration.documents import Document
from tests import tiny
from tests.scoring import streamed, vision
from tests.scoring.test_oracle import oracle

IMAGE_TOKEN = 3
DOMAINS = ("mix", "mix [image]")
# Family -> the shape of a patch. All of them make one token of 2 x 2 patches.
FAMILIES = {"qwen3_vl_moe": (96,), "qwen3_5_moe": (96,), "glm4v_moe": (96,), "kimi_k25": (3, 4, 4)}


def documents(patch: tuple[int, ...]) -> list[Document]:
    """Two texts and two documents with an image of another size each."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(10, 250, (count,), generator=generator).tolist()

    made = [Document(words(7), "mix", 0), Document(words(12), "mix", 1)]
    for slice_, (height, width) in enumerate([(4, 6), (2, 4)]):
        ids = [*words(3), *[IMAGE_TOKEN] * (height * width // 4), *words(5)]
        stacked = {
            "pixel_values": torch.randn(height * width, *patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }
        aligned = {"mm_token_type_ids": torch.tensor(ids).eq(IMAGE_TOKEN).long()}
        made.append(Document(ids, "mix", slice_, frozenset({IMAGE_TOKEN}), aligned=aligned, stacked=stacked))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_image_tokens_are_summed_apart_and_right(family, tmp_path):
    made = documents(FAMILIES[family])
    data = unpacked(made, DOMAINS, 3, 0)
    assert [len(batch.domain_BT) for batch in data] == [3, 1]
    folder = streamed.checkpoint(family)
    expected = oracle(folder, data)
    sums = streamed.score(folder, data, tmp_path)
    for block, want in zip(
        sums.blocks, expected.values(), strict=True
    ):  # names on disk may differ from those in memory
        np.testing.assert_array_equal(block.tokens_D, [7 + 12 + 8 + 8, 6 + 2])
        np.testing.assert_array_equal(block.values["count"], want["count"])
        for name in ("gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", "max_abs"):
            np.testing.assert_allclose(block.values[name], want[name], rtol=2e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(block.slices["gate_norm_sum"], want["slices"], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_reach_the_model(family):
    """Other pixels, other logits behind the image; the texts in the same batch stay as they were."""
    model = streamed.plain(streamed.checkpoint(family))
    first, second = documents(FAMILIES[family]), documents(FAMILIES[family])
    second[2].stacked["pixel_values"].mul_(-1)

    def logits(made):
        (batch,) = unpacked(made, DOMAINS, 4, 0)
        with torch.no_grad():
            return batch, model(**batch.inputs, use_cache=False).logits

    batch, before_BTV = logits(first)
    _, after_BTV = logits(second)
    for b, mask_T in enumerate(batch.inputs["attention_mask"].bool()):
        same = torch.allclose(before_BTV[b][mask_T], after_BTV[b][mask_T], rtol=1e-4, atol=1e-4)
        assert same == (len(first[2].ids) != int(mask_T.sum()))


def test_llama4_whose_gate_goes_into_the_expert(tmp_path):
    """Tiles of 8 x 8 pixels make a token each; an expert contributes f(g x), computed here in float64."""
    generator = torch.Generator().manual_seed(5)
    made = [Document(torch.randint(10, 250, (9,), generator=generator).tolist(), "mix", 0)]
    for slice_, tiles in enumerate((1, 3)):
        pixels = {"pixel_values": torch.randn(tiles, 3, 8, 8, generator=generator)}
        ids = [*torch.randint(10, 250, (4,), generator=generator).tolist(), *[IMAGE_TOKEN] * tiles, 20, 21]
        made.append(Document(ids, "mix", slice_, frozenset({IMAGE_TOKEN}), stacked=pixels))
    data = unpacked(made, DOMAINS, 2, 0)
    folder = tiny.make("llama4", tmp_path / "model", **vision.FAMILIES["llama4"].model)
    model = streamed.plain(folder)
    blocks = [module for module in model.modules() if type(module).__name__ == "Llama4TextMoe"]
    expected = [np.zeros((2, 8)) for _ in blocks]
    domain_T = torch.empty(0)

    def look(block: torch.nn.Module, args: tuple[torch.Tensor], want: np.ndarray) -> None:
        x_TH = args[0].reshape(-1, args[0].shape[-1])
        logits_TE = block.router(x_TH)[1]
        for t in torch.nonzero(domain_T >= 0).flatten().tolist():
            for e in logits_TE[t].topk(block.top_k).indices.tolist():
                x_H = x_TH[t].double() * logits_TE[t, e].double().sigmoid()
                gate, up = (x_H @ block.experts.gate_up_proj[e].double()).chunk(2)
                f_H = (up * torch.nn.functional.silu(gate)) @ block.experts.down_proj[e].double()
                want[domain_T[t], e] += float(f_H.norm())

    for block, want in zip(blocks, expected, strict=True):
        block.register_forward_pre_hook(lambda owner, args, want=want: look(owner, args, want))
    for batch in data:
        domain_T = batch.domain_BT.reshape(-1)
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    found = streamed.score(folder, data, tmp_path).blocks
    for block, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(block.tokens_D, [9 + 6 + 6, 1 + 3])
        assert want.any(axis=1).all()
        np.testing.assert_allclose(block.values["gate_norm_sum"], want, rtol=2e-5, atol=1e-7)
