"""GGUF in, GGUF out: every byte of what stays, one file or several, and the count where llama.cpp reads it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import prune_model
from moeprune import metadata
from moeprune.errors import InputError, ResultError, UsageError
from moeprune.pruning.verify_gguf import GgufVerification
from tests.checkpoint import test_gguf as written
from tests.pruning import cutting

KEEP = {"blk.0": [0, 3, 5], "blk.1": [1, 2, 7], "blk.2": [0, 4, 6]}


def read(path: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Key -> raw value and tensor -> bytes, by the layout of the format written out once more."""
    data, at = path.read_bytes(), 24
    count_tensors, count_pairs = struct.unpack("<QQ", data[8:24])
    pairs, tensors = {}, {}

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def string() -> bytes:
        return take(struct.unpack("<Q", take(8))[0])

    def value(kind: int) -> bytes:
        if kind == written.STRING:
            return string()
        if kind == written.ARRAY:
            inner, count = struct.unpack("<IQ", take(12))
            return b"|".join(value(inner) for _ in range(count))
        return take({written.U32: 4, written.F32: 4, written.BOOL: 1}[kind])

    for _ in range(count_pairs):
        key = string().decode()
        pairs[key] = value(struct.unpack("<I", take(4))[0])
    infos = []
    for _ in range(count_tensors):
        name = string().decode()
        sizes = struct.unpack(f"<{(n := struct.unpack('<I', take(4))[0])}Q", take(8 * n))
        infos.append((name, sizes, *struct.unpack("<IQ", take(12))))
    base = -(-at // 32) * 32
    widths = {kind: (values, size) for kind, values, size in written.TYPES.values()}
    for name, sizes, kind, offset in infos:
        values, size = widths[kind]
        start = base + offset
        tensors[name] = data[start : start + int(np.prod(sizes)) // values * size]
    return pairs, tensors


def expected(contents: dict[str, bytes], keep: dict[str, list[int]] = KEEP) -> dict[str, bytes]:
    """The rows of the experts that stay."""
    result = {}
    for name, data in contents.items():
        block = ".".join(name.split(".")[:2])
        of_experts = any(word in name for word in ("exps", "ffn_gate_inp", "exp_probs_b"))
        rows = np.frombuffer(data, np.uint8).reshape(8, -1) if of_experts else None
        result[name] = data if rows is None else rows[keep[block]].tobytes()
    return result


def cut(model: Path, tmp_path: Path, *flags: str, keep: dict[str, list[int]] = KEEP) -> Path:
    plan = cutting.write_plan(tmp_path / "plan.json", keep)
    prune_model.main(["--model-path", str(model), "--plan", str(plan), "--output-path", str(tmp_path / "out"), *flags])
    return next((tmp_path / "out").iterdir())


def test_one_file(tmp_path: Path) -> None:
    data, contents = written.build(written.ENTRIES, written.TENSORS)
    (tmp_path / "tiny-Q4.gguf").write_bytes(data)
    child = cut(tmp_path / "tiny-Q4.gguf", tmp_path)
    assert sorted(path.name for path in child.iterdir()) == ["pruning.json", "tiny-Q4-reap-3of8.gguf"]
    old_pairs, _ = read(tmp_path / "tiny-Q4.gguf")
    pairs, tensors = read(child / "tiny-Q4-reap-3of8.gguf")
    assert pairs == old_pairs | {"qwen3moe.expert_count": struct.pack("<I", 3)}
    assert list(pairs) == list(old_pairs)
    assert tensors == expected(contents)


def test_split_files(tmp_path: Path) -> None:
    names = list(written.TENSORS)
    total = written.number("split.tensors.count", len(names))
    contents = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        entries = [*(written.ENTRIES if number == 1 else written.ENTRIES[:1]), total]
        data, more = written.build(entries, {name: written.TENSORS[name] for name in part})
        (tmp_path / f"tiny-{number:05d}-of-00002.gguf").write_bytes(data)
        contents |= more
    child = cut(tmp_path / "tiny-00002-of-00002.gguf", tmp_path)
    files = sorted(child.glob("*.gguf"))
    assert [file.name for file in files] == [f"tiny-reap-3of8-0000{i}-of-00002.gguf" for i in (1, 2)]
    (first, one), (second, two) = map(read, files)
    assert one | two == expected(contents)
    assert first["qwen3moe.expert_count"] == struct.pack("<I", 3)
    assert "qwen3moe.expert_count" not in second
    assert second["split.tensors.count"] == struct.pack("<I", len(names))


def test_one_tensor_per_expert(tmp_path: Path) -> None:
    """Files of 2023 number their experts in names; those that stay are numbered anew, and fewer tensors are counted."""
    tensors = {"token_embd.weight": ("F16", [256, 4])}
    for layer in range(3):
        tensors[f"blk.{layer}.ffn_gate_inp.weight"] = ("F32", [256, 8])
        for kind in ("gate", "up", "down"):
            tensors |= {f"blk.{layer}.ffn_{kind}.{e}.weight": ("Q8_0", [256, 2]) for e in range(8)}
    entries = [*written.ENTRIES, written.number("split.tensors.count", len(tensors))]
    data, contents = written.build(entries, tensors)
    (tmp_path / "old.gguf").write_bytes(data)
    pairs, found = read(cut(tmp_path / "old.gguf", tmp_path) / "old-reap-3of8.gguf")
    assert pairs["split.tensors.count"] == struct.pack("<I", 1 + 3 * (1 + 9))
    for layer in range(3):
        for new, old in enumerate(KEEP[f"blk.{layer}"]):
            assert found[f"blk.{layer}.ffn_up.{new}.weight"] == contents[f"blk.{layer}.ffn_up.{old}.weight"]
    assert len(found) == 1 + 3 * (1 + 9)


def test_scores_of_the_original(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(written.build(written.ENTRIES, written.TENSORS)[0])
    gain_E = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    ones = np.ones((1, 8))
    values = dict.fromkeys(("count", "gate_sum", "norm_sum", "max_abs"), ones) | {"gate_norm_sum": gain_E[None]}
    slices = {name: np.ones((1, 4, 8)) for name in ("count", "gate_norm_sum")}
    blocks = [metadata.BlockSums(f"model.layers.{i}", 8, np.ones(1), values, slices) for i in range(2)]
    sums = metadata.Sums("routed", ("all",), tuple(blocks)).to_json()
    model = {"fingerprint": "of the original", "path": "original"}
    result = metadata.header("reap_metadata") | {"inputs": {"model": model}, "scores": sums}
    metadata.write_json(tmp_path / "out" / "reap_metadata.json", result)
    flags = ["--model-path", str(tmp_path / "tiny.gguf"), "--output-path", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--other-scores"):
        prune_model.main(flags)
    prune_model.main([*flags, "--other-scores"])
    manifest = json.loads((tmp_path / "out/tiny-reap-4of8/pruning.json").read_text())
    assert manifest["keep"]["blk.0"] == [0, 1, 2, 3]
    assert manifest["keep"]["blk.2"] == [0, 2, 4, 6]  # it predicts further tokens and was not scored


def test_rows_for_runs_of_neighbours(tmp_path: Path) -> None:
    """GroveMoE: two neighbours share a row of three further tensors, and stay or go together."""
    further = {f"blk.{i}.ffn_{kind}_chexps.weight": ("Q8_0", [64, 4, 4]) for i in range(3) for kind in ("up", "down")}
    entries = [*written.ENTRIES, written.number("qwen3moe.experts_per_group", 2)]
    data, contents = written.build(entries, written.TENSORS | further)
    (tmp_path / "grove.gguf").write_bytes(data)
    keep = {"blk.0": [0, 1, 4, 5], "blk.1": [2, 3, 6, 7], "blk.2": [4, 5, 6, 7]}
    child = cut(tmp_path / "grove.gguf", tmp_path, keep=keep)
    pairs, found = read(next(child.glob("*.gguf")))
    assert pairs["qwen3moe.experts_per_group"] == struct.pack("<I", 2)
    assert found == expected({n: d for n, d in contents.items() if n not in further}, keep) | {
        name: np.frombuffer(contents[name], np.uint8).reshape(4, -1)[[e // 2 for e in keep[name[:5]][::2]]].tobytes()
        for name in further
    }
    with pytest.raises(UsageError, match=r"experts 0 to 1 share a tensor"):
        cut(tmp_path / "grove.gguf", tmp_path, keep=keep | {"blk.0": [0, 2, 4, 5]})
    proof = GgufVerification([tmp_path / "grove.gguf"], child, {b: tuple(ids) for b, ids in keep.items()})
    proof.finish()
    with pytest.raises(ResultError, match=r"blk\.0.*not those of the kept|does not hold the values"):
        wrong = {b: tuple(ids) for b, ids in (keep | {"blk.0": [0, 1, 2, 3]}).items()}
        GgufVerification([tmp_path / "grove.gguf"], child, wrong).file(next(child.glob("*.gguf")), lambda: None)


HEADS = written.entry("qwen3moe.attention.head_count_kv", written.ARRAY, struct.pack("<IQ3I", written.U32, 3, 2, 4, 8))


def test_without_layers_for_further_tokens(tmp_path: Path) -> None:
    """Their tensors go, and with them what the file says of them; lists of one number for each layer get shorter."""
    names = list(written.TENSORS)
    total = written.number("split.tensors.count", len(names))
    contents = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        entries = [*([*written.ENTRIES, HEADS] if number == 1 else written.ENTRIES[:1]), total]
        data, more = written.build(entries, {name: written.TENSORS[name] for name in part})
        (tmp_path / f"tiny-{number:05d}-of-00002.gguf").write_bytes(data)
        contents |= more
    plan = cutting.write_plan(tmp_path / "plan.json", {"blk.0": KEEP["blk.0"], "blk.1": KEEP["blk.1"]})
    model, out = tmp_path / "tiny-00001-of-00002.gguf", tmp_path / "out"
    prune_model.main(["--model-path", str(model), "--plan", str(plan), "--output-path", str(out), "--drop-mtp"])
    files = sorted(out.glob("*/*.gguf"))
    (first, one), (second, two) = map(read, files)
    trunk = {name: data for name, data in expected(contents).items() if not name.startswith("blk.2.")}
    assert one | two == trunk
    old = read(model)[0]
    four = struct.Struct("<I").pack
    counts = {"expert_count": 3, "block_count": 2, "nextn_predict_layers": 0}
    changed = {f"qwen3moe.{key}": four(value) for key, value in counts.items()}
    changed |= {"qwen3moe.attention.head_count_kv": four(2) + b"|" + four(4), "split.tensors.count": four(len(trunk))}
    assert first == old | changed
    assert second["split.tensors.count"] == four(len(trunk))
    check_faults_of_dropping(files, tmp_path)


def check_faults_of_dropping(files: list[Path], parent: Path) -> None:
    gone = {name for name in written.TENSORS if name.startswith("blk.2.")}
    keep = {block: tuple(KEEP[block]) for block in ("blk.0", "blk.1")}
    parents = sorted(parent.glob("*.gguf"))
    GgufVerification(parents, files[0].parent, keep, gone).finish()
    with pytest.raises(ResultError, match=r"blk\.2.*was kept"):
        GgufVerification(parents, files[0].parent, keep, gone - {"blk.2.attn_q.weight"}).finish()
    with pytest.raises(ResultError, match=r"blk\.1.*was dropped"):
        GgufVerification(parents, files[0].parent, keep, gone | {"blk.1.attn_q.weight"}).finish()
    good = files[0].read_bytes()
    for key, words in {"block_count": "does not say 2", "attention.head_count_kv": "head_count_kv has changed"}.items():
        at = good.index(key.encode()) + len(key) + (4 if key == "block_count" else 16)
        files[0].write_bytes(good[:at] + b"\x07" + good[at + 1 :])
        with pytest.raises(ResultError, match=words):
            GgufVerification(parents, files[0].parent, keep, gone).finish()


def test_faults_are_found(tmp_path: Path) -> None:
    parent = tmp_path / "tiny.gguf"
    parent.write_bytes(written.build(written.ENTRIES, written.TENSORS)[0])
    child = cut(parent, tmp_path)
    good = (file := next(child.glob("*.gguf"))).read_bytes()
    keep = {block: tuple(ids) for block, ids in KEEP.items()}

    def check() -> None:
        proof = GgufVerification([parent], child, keep)
        proof.file(file, lambda: None)
        proof.finish()

    check()
    count = good.index(b"expert_count") + len("expert_count") + 4
    rope = good.index(b"rope.freq_base") + len("rope.freq_base") + 4
    for at, words in (
        (len(good) - 40, "does not hold|differs"),
        (count, "does not say 3"),
        (rope, "freq_base has changed"),
    ):
        bad = bytearray(good)
        bad[at] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ResultError, match=words):
            check()
