"""GGUF: what is read is what was written by hand, and what is damaged is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from moeprune.checkpoint import gguf, gguf_layout
from moeprune.checkpoint.families import understand, updated_config
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.checkpoint.formats import format_of
from moeprune.errors import InputError

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q8_0": (8, 32, 34),
    "Q4_K": (12, 256, 144),
    "I32": (26, 1, 4),
    "MXFP4": (39, 32, 17),
}
EXPERTS = 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def number(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


ENTRIES = [
    entry("general.architecture", STRING, text("qwen3moe")),
    number("qwen3moe.block_count", 3),
    number("qwen3moe.nextn_predict_layers", 1),
    number("qwen3moe.expert_count", EXPERTS),
    number("qwen3moe.expert_used_count", 2),
    number("qwen3moe.embedding_length", 256),
    entry("qwen3moe.rope.freq_base", F32, struct.pack("<f", 10000.0)),
    entry("qwen3moe.expert_weights_norm", BOOL, b"\x01"),
    entry("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("\u00e9") + text("")),
    entry("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", F32, 2) + struct.pack("<2f", 1.0, -1.0)),
]


def layer(index: int) -> dict[str, tuple[str, list[int]]]:
    name = f"blk.{index}"
    return {
        f"{name}.attn_q.weight": ("Q8_0", [256, 8]),
        f"{name}.ffn_gate_inp.weight": ("F32", [256, EXPERTS]),
        f"{name}.exp_probs_b.bias": ("F32", [EXPERTS]),
        f"{name}.ffn_gate_exps.weight": ("Q4_K", [256, 32, EXPERTS]),
        f"{name}.ffn_down_exps.weight": ("MXFP4", [32, 256, EXPERTS]),
        f"{name}.ffn_up_exps.weight": ("F16", [256, 32, EXPERTS]),
        f"{name}.ffn_down_exps.scale": ("F32", [EXPERTS]),
        f"{name}.ffn_up_shexp.weight": ("F32", [256, EXPERTS]),
    }


def build(entries, tensors, alignment=32, version=3, counts=None):
    """The bytes of a GGUF file, and those of each tensor. Dimensions are given as on disk, fastest first."""
    data, infos, contents = b"", b"", {}
    for name, (dtype, sizes) in tensors.items():
        kind, values, size = TYPES[dtype]
        total = 1
        for axis in sizes:
            total *= axis
        contents[name] = random.Random(name).randbytes(total // values * size)
        infos += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        data += contents[name] + bytes(-len(contents[name]) % alignment)
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join(entries) + infos
    return head + bytes(-len(head) % alignment) + data, contents


TENSORS = {"token_embd.weight": ("F16", [256, 4])} | layer(0) | layer(1) | layer(2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(build(ENTRIES, TENSORS)[0])
    return tmp_path / "model.gguf"


def test_every_tensor_and_value_is_read(file):
    checkpoint = open_checkpoint(file)
    contents = build(ENTRIES, TENSORS)[1]
    assert {name: checkpoint.read_bytes(name) for name in checkpoint.tensors} == contents
    assert checkpoint.tensors["blk.0.ffn_gate_exps.weight"].shape == (EXPERTS, 32, 256)
    assert checkpoint.config["qwen3moe.rope.freq_base"] == 10000.0
    assert "tokenizer.ggml.tokens" not in checkpoint.config
    assert format_of(checkpoint) == "gguf"
    assert open_checkpoint(file.parent).tensors == checkpoint.tensors


def test_blocks_and_counts(file):
    checkpoint = open_checkpoint(file)
    layout = understand(checkpoint)
    assert (layout.experts, layout.top_k, layout.groups) == (EXPERTS, 2, 1)
    assert [(block.name, block.role) for block in layout.blocks] == [
        ("blk.0", "trunk"),
        ("blk.1", "trunk"),
        ("blk.2", "mtp"),
    ]
    found = {part.tensor: (part.kind, part.axis, part.router) for part in layout.blocks[0].parts}
    stacked = ("ffn_gate_exps.weight", "ffn_down_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.scale")
    routers = ("ffn_gate_inp.weight", "exp_probs_b.bias")
    assert found == {f"blk.0.{name}": ("rows", 0, name in routers) for name in (*stacked, *routers)}
    assert updated_config(checkpoint, layout, 6)["qwen3moe.expert_count"] == 6
    names = ["model.layers.0", "model.layers.1", "vision.layers"]
    assert gguf_layout.same_layers(layout.blocks, names) == {"blk.0": "model.layers.0", "blk.1": "model.layers.1"}


@pytest.mark.parametrize("alignment", [32, 64])
def test_a_header_written_again_is_the_same_to_the_byte(tmp_path, alignment):
    entries = [*ENTRIES, number("general.alignment", alignment)]
    whole, _ = build(entries, TENSORS, alignment)
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    header = gguf.read_header(path)
    written, offsets = gguf.new_header(header, {}, list(header.tensors.values()))
    assert written == whole[: len(written)]
    assert offsets == [tensor.start for tensor in header.tensors.values()]
    assert len(written) == offsets[0]


def test_only_the_changed_value_changes(file):
    header = gguf.read_header(file)
    before, _ = gguf.new_header(header, {}, list(header.tensors.values()))
    changes = {"qwen3moe.expert_count": gguf.with_number(header.entries["qwen3moe.expert_count"], 6), "absent": b""}
    after, _ = gguf.new_header(header, changes, list(header.tensors.values()))
    different = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert different == [before.index(b"expert_count") + len("expert_count") + 4]


def test_a_split_model_is_read_from_any_file(tmp_path):
    first, second = dict(list(TENSORS.items())[:9]), dict(list(TENSORS.items())[9:])
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(build(ENTRIES, first)[0])
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(build([number("split.no", 1)], second)[0])
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.tensors) == set(TENSORS)
        assert len(understand(checkpoint).blocks) == 3
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputError, match="m-00002-of-00002"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_files_of_2023_with_one_tensor_per_expert(tmp_path):
    tensors = {"blk.0.ffn_gate_inp.weight": ("F32", [32, EXPERTS])}
    tensors |= {
        f"blk.0.ffn_{kind}.{e}.weight": ("Q8_0", [32, 4]) for kind in ("gate", "up", "down") for e in range(EXPERTS)
    }
    (tmp_path / "old.gguf").write_bytes(build(ENTRIES, tensors)[0])
    (block,) = understand(open_checkpoint(tmp_path)).blocks
    assert {part.expert for part in block.parts if part.kind == "expert"} == set(range(EXPERTS))
    del tensors["blk.0.ffn_up.3.weight"]
    (tmp_path / "old.gguf").write_bytes(build(ENTRIES, tensors)[0])
    with pytest.raises(InputError, match=r"blk\.0.*expert 3"):
        understand(open_checkpoint(tmp_path))


def patched(at_text: str, offset: int, value: bytes):
    def damage(data: bytes) -> bytes:
        at = data.index(at_text.encode()) + len(at_text) + offset
        return data[:at] + value + data[at + len(value) :]

    return damage


NAME = "blk.0.ffn_gate_exps.weight"
DAMAGE = {
    "wrong magic": lambda data: b"GGML" + data[4:],
    "version 1": lambda data: data[:4] + struct.pack("<I", 1) + data[8:],
    "big endian": lambda data: data[:4] + struct.pack(">I", 3) + data[8:],
    "cut in the header": lambda data: data[:300],
    "cut in the tensors": lambda data: data[:-4000],
    "absurd count of tensors": lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:],
    "absurd count of entries": lambda data: data[:16] + struct.pack("<Q", 2**40) + data[24:],
    "absurd length of a key": lambda data: data[:24] + struct.pack("<Q", 2**63) + data[32:],
    "unknown type of a value": patched("qwen3moe.block_count", 0, struct.pack("<I", 99)),
    "array of arrays": patched("tokenizer.ggml.scores", 4, struct.pack("<I", ARRAY)),
    "absurd array": patched("tokenizer.ggml.tokens", 8, struct.pack("<Q", 2**60)),
    "too many axes": patched(NAME, 0, struct.pack("<I", 2**31)),
    "half a block": patched(NAME, 4, struct.pack("<Q", 255)),
    "absurd shape": patched(NAME, 12, struct.pack("<Q", 2**60)),
    "unknown type of a tensor": patched(NAME, 28, struct.pack("<I", 77)),
    "offset astray": patched(NAME, 32, struct.pack("<Q", 33)),
    "overlap": patched(NAME, 32, struct.pack("<Q", 0)),
    "beyond the end": patched(NAME, 32, struct.pack("<Q", 2**40)),
    "the same name twice": lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
    "the same key twice": lambda _: build([*ENTRIES, ENTRIES[3]], TENSORS)[0],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(file, damage):
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(InputError, match=r"model\.gguf"):
        open_checkpoint(file)


def test_what_is_no_mixture_of_experts_is_refused(tmp_path):
    (tmp_path / "dense.gguf").write_bytes(build(ENTRIES, {"blk.0.ffn_up.weight": ("F16", [32, 4])})[0])
    with pytest.raises(InputError, match="without experts"):
        understand(open_checkpoint(tmp_path))
    tensors = layer(0) | {"blk.0.ffn_gate_inp.weight": ("F32", [256, EXPERTS + 2])}
    (tmp_path / "dense.gguf").write_bytes(build(ENTRIES, tensors)[0])
    with pytest.raises(InputError, match="counts 8 experts"):
        understand(open_checkpoint(tmp_path))
