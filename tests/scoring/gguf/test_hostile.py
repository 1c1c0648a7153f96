"""A GGUF file that is damaged, or made to do harm, ends a run with one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.scoring.building import build
from moeprune.scoring.gguf import tokenizer
from moeprune.settings import Settings
from tests import gguf_files, tiny
from tests.gguf_files.families import FAMILIES
from tests.scoring import streamed
from tests.scoring.gguf.test_scored import rewritten


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound one."""
    folder = tiny.make("qwen3_moe", tmp_path_factory.mktemp("sound") / "parent", norm_topk_prob=True)
    gguf_files.tokenizer(folder)
    gguf_files.convert(folder, folder.parent / "model.gguf")
    return folder.parent / "model.gguf"


def with_values(file: Path, target: Path, **values: Any) -> Path:
    """The file with other values under some keys; numbers take the type that holds them."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            values.setdefault(key, field.contents())
    for key, value in values.items():
        if type(value) is int and not 0 <= value < 2**32:
            writer.add_int64(key, value)
        else:
            gguf_files.write_value(writer, key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


def empty(file: Path) -> None:
    """The model without its weights."""
    build(open_checkpoint(file), Settings(device="cpu"))


VALUES = {
    "a text": ("attention.head_count", "four", r"attention\.head_count = 'four', which cannot be"),
    "a text for a count of layers": ("block_count", "many", "block_count = 'many'"),
    "no number": ("attention.layer_norm_rms_epsilon", math.nan, "epsilon = nan"),
    "infinity": ("rope.freq_base", math.inf, "freq_base = inf"),
    "nothing to rotate by": ("rope.freq_base", 0.0, r"freq_base = 0\.0"),
    "below zero": ("attention.head_count_kv", -3, "head_count_kv = -3"),
    "a length below zero": ("context_length", -3, "context_length = -3"),
    "too large": ("embedding_length", 2**40, "embedding_length = 1099511627776"),
    "more layers than tensors": ("block_count", 2**19, "block_count = 524288, and holds 3 layers up to 2"),
    "fewer layers": ("block_count", 2, "block_count = 2, and holds 3 layers up to 2"),
    "texts for numbers": ("attention.head_count_kv", ["two", "two", "two"], "3 values that are no numbers"),
    "one wrong in a list": ("attention.head_count_kv", [2, 2, -1], "head_count_kv = -1"),
    "no heads": ("attention.head_count", 0, "describe no model that can be"),
    "a fraction of a head": ("attention.head_count", 4.5, "describe no model that can be"),
    "more experts used than there are": ("expert_used_count", 9, "expert_used_count = 9 of 8, which cannot be"),
    "uneven groups": ("expert_group_count", 3, "expert_group_count = 3, with 8 experts"),
    "more groups used than there are": ("expert_group_used_count", 2, "expert_group_used_count = 2 of 1"),
    "a width that is not the embeddings'": ("embedding_length", 63, r"token_embd\.weight has the shape \[272, 64\]"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be(case: str, file: Path, tmp_path: Path) -> None:
    key, value, words = VALUES[case]
    other = with_values(file, tmp_path / "other.gguf", **{f"qwen3moe.{key}": value})
    with pytest.raises(InputError, match=words):
        empty(other)


@pytest.mark.parametrize(("name", "value"), [("padding", 272), ("eos", "two")])
def test_special_tokens_that_the_model_has_no_row_for(name: str, value: object, file: Path, tmp_path: Path) -> None:
    other = with_values(file, tmp_path / "other.gguf", **{f"tokenizer.ggml.{name}_token_id": value})
    with pytest.raises(InputError, match=rf"{name}_token_id = .*, which is no token of its model"):
        empty(other)


SHAPES = {
    "a row more": (
        "blk.1.attn_q_norm.weight",
        lambda a: np.append(a, a[:1]),
        r"shape \(17,\) where the config promises",
    ),
    "turned": ("blk.1.attn_k.weight", lambda a: a.T.copy(), r"shape \(64, 32\) where"),
    "halves of a pair that differ": (
        "blk.1.ffn_up_exps.weight",
        lambda a: a.swapaxes(1, 2).copy(),
        r"no parameter can be made of blk\.1\.ffn_gate_exps\.weight, blk\.1\.ffn_up_exps\.weight",
    ),
    "embeddings in one row": ("token_embd.weight", lambda a: a.reshape(-1), "token_embd.weight has the shape"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit(case: str, file: Path, tmp_path: Path) -> None:
    wrong, change, words = SHAPES[case]
    other = rewritten(file, tmp_path / "other.gguf", lambda n, a: [(n, change(a) if n == wrong else a)])
    with pytest.raises(InputError, match=words):
        streamed.score(other, streamed.batches(1), tmp_path)


def test_rows_that_heads_do_not_share_evenly(tmp_path: Path) -> None:
    folder = tiny.make("mixtral", tmp_path / "parent", sliding_window=None)
    gguf_files.convert(folder, tmp_path / "model.gguf")
    longer = rewritten(
        tmp_path / "model.gguf",
        tmp_path / "other.gguf",
        lambda n, a: [(n, np.append(a, a[:1], axis=0) if n == "blk.0.attn_q.weight" else a)],
    )
    with pytest.raises(InputError, match=r"no parameter can be made of blk\.0\.attn_q\.weight"):
        streamed.score(longer, streamed.batches(1), tmp_path)


def test_a_tensor_that_the_described_model_has_no_place_for(tmp_path: Path) -> None:
    """Its name is known, but not to a model of these sizes; it would be left out unseen."""
    family = FAMILIES["gemma4_text"]
    folder = tiny.make("gemma4_text", tmp_path / "parent", **family.overrides)
    gguf_files.convert(folder, tmp_path / "model.gguf", embedding_length_per_layer_input=0)
    with pytest.raises(InputError, match=r"has no place in Gemma4ForCausalLM"):
        streamed.score(tmp_path / "model.gguf", streamed.batches(1), tmp_path)


WORDS = {
    "tokens that are numbers": ("ggml.tokens", [1, 2, 3], "tokens is no list of texts"),
    "more tokens than rows": ("ggml.tokens", [f"t{i}" for i in range(273)], "lists 273 tokens.* rows for 272"),
    "types that are texts": ("ggml.token_type", ["normal"] * 272, "token_type is no list of a number for each"),
    "too few types": ("ggml.token_type", [1] * 5, "token_type is no list of a number for each of its 272"),
    "a merge of three": ("ggml.merges", ["h e l"], "merge 0, 'h e l', is not of two of its tokens"),
    "a merge of one": ("ggml.merges", ["h e", "he"], "merge 1, 'he', is not of two of its tokens"),
    "a merge of what is no token": ("ggml.merges", ["h e", "q \u4e2d"], "merge 1, 'q \u4e2d', is not"),
    "a merge into no token": ("ggml.merges", ["q z"], "merge 0, 'q z', is not"),
    "merges that are numbers": ("ggml.merges", [1, 2], "merges is no list of texts"),
    "merges that are one text": ("ggml.merges", "h e", "merges is no list of texts"),
    "a token beyond the last": ("ggml.eos_token_id", 272, "eos_token_id = 272 is none of its 272"),
    "a token before the first": ("ggml.bos_token_id", -1, "bos_token_id = -1 is none of its 272"),
    "a template that is a number": ("chat_template", 7, "chat_template is no text"),
    "a kind that is a list": ("ggml.model", [1, 2], r"ggml\.model is no text"),
}


@pytest.mark.parametrize("case", WORDS)
def test_tokenizers_that_cannot_be(case: str, file: Path, tmp_path: Path) -> None:
    key, value, words = WORDS[case]
    other = with_values(file, tmp_path / "other.gguf", **{f"tokenizer.{key}": value})
    with pytest.raises(InputError, match=rf"{words}.*put tokenizer\.json"):
        tokenizer.load(other)


OTHERS = {
    "granitemoe": ({"rope.scaling.finetuned": False}, "its layers know no positions"),
    "gemma4_text": ({"attention.sliding_window_pattern": [True] * 4}, "its last layer attends within a window"),
    "mimo_v2_flash": ({"attention.head_count_kv": [2, 2, 2]}, "have not twice the heads"),
    "mellum": ({"rope.freq_base_swa": 9.0}, "rotations of two bases"),
    "cohere2_moe": ({"expert_weights_scale": 2.5}, "its router weighs experts"),
    "qwen3_5_moe_text": ({"rope.dimension_sections": [1, 2]}, r"dimension_sections = \[1, 2\], which cannot be"),
    "granitemoe_swa": ({"attention.sliding_window_pattern": 4}, "has no list"),
}


@pytest.mark.parametrize("family", OTHERS)
def test_models_that_transformers_would_run_in_another_way(family: str, tmp_path: Path) -> None:
    values, words = OTHERS[family]
    folder = tiny.make(family, tmp_path / "parent", **FAMILIES[family].overrides)
    gguf_files.convert(folder, tmp_path / "model.gguf", **values)
    with pytest.raises(InputError, match=words):
        empty(tmp_path / "model.gguf")
