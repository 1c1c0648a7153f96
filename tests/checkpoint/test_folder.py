"""Opening a checkpoint: what is sound is found to the byte, what is damaged or hostile ends in one InputError."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from moeprune.checkpoint.folder import check_outside, locate_model, open_checkpoint
from moeprune.errors import InputError, MachineError, UsageError
from tests import handmade, tiny

A = {"a": ("BF16", [2, 3]), "b": ("F32", [4])}
B = {"c": ("U8", [5]), "d": ("F4", [4, 2])}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return handmade.checkpoint(tmp_path / "model", {"model_type": "x"}, A, B)


def test_finds_every_byte_that_the_library_finds(tmp_path):
    made = tiny.make("mixtral", tmp_path / "m", max_shard_size="400KB")
    checkpoint = open_checkpoint(made)
    seen = 0
    for shard in sorted(made.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                assert checkpoint.tensors[name].shape == tuple(tensor.shape)
                assert checkpoint.read_bytes(name) == tensor.numpy().tobytes()
                seen += 1
    assert seen == len(checkpoint.tensors) > 20
    assert len(checkpoint.shards) > 1
    assert checkpoint.shard_metadata[checkpoint.shards[0]] == {"format": "pt"}


def test_side_files_and_second_copies_are_told_apart(folder):
    for name in (
        "tokenizer.json",
        "code/modeling.py",
        "original/model.safetensors",
        "pytorch_model.bin",
        ".git/config",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    checkpoint = open_checkpoint(folder)
    assert {file.as_posix() for file in checkpoint.side_files} == {"config.json", "tokenizer.json", "code/modeling.py"}
    assert {file.as_posix() for file in checkpoint.other_weights} == {"original/model.safetensors", "pytorch_model.bin"}


def test_a_missing_shard_is_noticed_without_an_index(folder):
    (folder / INDEX).unlink()
    assert len(open_checkpoint(folder).tensors) == 4
    sorted(folder.glob("model-*-of-*.safetensors"))[-1].unlink()
    with pytest.raises(InputError, match=r"1 shard.* missing, first model-00002-of-00002"):
        open_checkpoint(folder)


def test_a_sidecar_outside_the_index_is_found(folder):
    handmade.shard(folder / "scales.safetensors", {"s": ("F32", [3])}, {"made": "later"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors["s"].file.name == "scales.safetensors"
    assert checkpoint.shard_metadata[checkpoint.tensors["s"].file] == {"made": "later"}


def test_fingerprint_follows_content_and_not_the_place(folder, tmp_path):
    before = open_checkpoint(folder).fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_checkpoint(moved).fingerprint == before
    shard = moved / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    assert open_checkpoint(moved).fingerprint != before


def entry(**changes):
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes}


BROKEN_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "header longer than the file": lambda path: handmade.write(path, entry(), b"1234", length=10**6),
    "absurd header length": lambda path: handmade.write(path, entry(), b"1234", length=2**63),
    "not json": lambda path: handmade.write(path, "{hello"),
    "not utf-8": lambda path: path.write_bytes((4).to_bytes(8, "little") + b"{\xff\xfe}"),
    "not an object": lambda path: handmade.write(path, "[1, 2]"),
    "endless nesting": lambda path: handmade.write(path, "[" * 200_000),
    "the same name twice": lambda path: handmade.write(
        path, f"{{{json.dumps(entry())[1:-1]}, {json.dumps(entry())[1:-1]}}}", b"1234"
    ),
    "entry is no object": lambda path: handmade.write(path, {"a": 3}),
    "negative shape": lambda path: handmade.write(path, entry(shape=[-4]), b"1234"),
    "shape too large": lambda path: handmade.write(path, entry(shape=[2**62, 2**62]), b"1234"),
    "shape is text": lambda path: handmade.write(path, entry(shape=["4"]), b"1234"),
    "shape is true": lambda path: handmade.write(path, entry(shape=[True] * 4, data_offsets=[0, 1]), b"1"),
    "unknown dtype": lambda path: handmade.write(path, entry(dtype="Q9"), b"1234"),
    "dtype is a list": lambda path: handmade.write(path, entry(dtype=["U8"]), b"1234"),
    "offsets reversed": lambda path: handmade.write(path, entry(data_offsets=[4, 0]), b"1234"),
    "offsets beyond the file": lambda path: handmade.write(path, entry(data_offsets=[4, 8]), b"1234"),
    "truncated": lambda path: handmade.write(path, entry(), b"12"),
    "bytes behind the end": lambda path: handmade.write(path, entry(), b"123456"),
    "overlap": lambda path: handmade.write(path, entry() | {"b": entry(data_offsets=[2, 6])["a"]}, b"123456"),
    "hole": lambda path: handmade.write(path, entry() | {"b": entry(data_offsets=[6, 10])["a"]}, b"1234567890"),
    "metadata is a list": lambda path: handmade.write(path, {"__metadata__": [1]} | entry(), b"1234"),
}


@pytest.mark.parametrize("damage", BROKEN_FILES)
def test_a_broken_file_is_refused_by_name(tmp_path, damage):
    (tmp_path / "config.json").write_text("{}")
    BROKEN_FILES[damage](tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def outside(name):
    return lambda folder: rewrite_index(folder, lambda index: index["weight_map"].update(a=name))


BROKEN_FOLDERS = {
    "no config": lambda f: (f / "config.json").unlink(),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "config is cut short": lambda f: (f / "config.json").write_text('{"a": '),
    "index is a list": lambda f: (f / INDEX).write_text("[]"),
    "index without a map": lambda f: (f / INDEX).write_text("{}"),
    "index maps to numbers": outside(3),
    "index leaves the folder": outside("../model-00001-of-00002.safetensors"),
    "index is absolute": outside("/etc/passwd"),
    "index names a backslash": outside("..\\x.safetensors"),
    "index names a config": outside("config.json"),
    "index names the wrong shard": outside("model-00002-of-00002.safetensors"),
    "index names an unknown tensor": lambda f: rewrite_index(
        f, lambda index: index["weight_map"].update(zz="model-00001-of-00002.safetensors")
    ),
    "missing shard": lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
    "a tensor in two files": lambda f: handmade.shard(f / "stale.safetensors", {"a": ("U8", [1])}),
    "link out of the folder": lambda f: (f / "extra.py").symlink_to("/etc/passwd"),
    "link to a folder": lambda f: (f / "loop").symlink_to(f),
    "link to itself": lambda f: (f / "self").symlink_to(f / "self"),
    "dangling link": lambda f: (f / "gone.json").symlink_to(f / "nothing"),
    "a pipe": lambda f: os.mkfifo(f / "tokenizer.json"),
}


@pytest.mark.parametrize("damage", BROKEN_FOLDERS)
def test_a_broken_folder_is_refused(folder, damage):
    open_checkpoint(folder)
    BROKEN_FOLDERS[damage](folder)
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_the_hub_cache_with_its_links_is_read(folder, tmp_path):
    repo = tmp_path / "models--me--mine"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c", "d"}


def test_where_a_model_is_looked_for(folder, monkeypatch, tmp_path):
    assert locate_model(str(folder)) == folder
    with pytest.raises(UsageError, match="--model-path"):
        locate_model("")
    for wrong in ("no/such/folder", "./nothing"):
        with pytest.raises(InputError):
            locate_model(wrong)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="nobody/nothing"):
        locate_model("nobody/nothing")


@pytest.mark.parametrize("place", ["model", "model/results", "link", "model/../model/x"])
def test_results_in_the_folder_of_the_model_are_refused(tmp_path, place):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UsageError, match="lies in it; choose another folder"):
        check_outside(tmp_path / "model", tmp_path / place)
    check_outside(tmp_path / "model", tmp_path)
    check_outside(tmp_path / "model", tmp_path / "model-reap-4of8")
