"""The bytes that the writer puts on the disk: packing, alignment, copying with and without the kernel's help."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeprune.checkpoint import growing, writer
from moeprune.checkpoint.writer import Entry, NewFile
from moeprune.pruning import rewrite


def go_on() -> None:
    pass


def written(tmp_path: Path, entries: list[Entry], metadata: dict[str, str] | None = None) -> Path:
    ordered = writer.aligned(entries)
    file = NewFile("x.safetensors", writer.header(ordered, metadata or {}), ordered)
    path = writer.write_file(tmp_path / "out", file, go_on)
    assert path.stat().st_size == file.nbytes
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    return path


def test_types_of_every_width_are_aligned(tmp_path: Path, source: Path) -> None:
    """An odd number of bytes comes before wider types in the source; readers need each at a multiple of its width."""
    kinds = [("U8", 1, 3), ("F64", 8, 2), ("BF16", 2, 5), ("F32", 4, 3), ("U8", 1, 1), ("I64", 8, 1)]
    entries = [
        Entry(f"t{i}", dtype, (count,), width * count, source, ranges=((i * 100, i * 100 + width * count),))
        for i, (dtype, width, count) in enumerate(kinds)
    ]
    path = written(tmp_path, entries, {"format": "pt", "who": "m\u00fcller"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    assert table.pop("__metadata__") == {"format": "pt", "who": "m\u00fcller"}
    for i, (_, width, count) in enumerate(kinds):
        start, end = table[f"t{i}"]["data_offsets"]
        assert (8 + length + start) % width == 0
        assert data[8 + length + start : 8 + length + end] == source.read_bytes()[i * 100 : i * 100 + width * count]


def test_the_order_of_the_parent_stays_where_it_is_aligned(source: Path) -> None:
    """Neighbours are then copied as one."""
    kinds = [("U8", 16), ("F32", 3), ("BF16", 2), ("I64", 1), ("U8", 3)]
    entries = [Entry(f"t{i}", dtype, (n,), n * writer.BITS[dtype] // 8, source) for i, (dtype, n) in enumerate(kinds)]
    assert writer.aligned(entries) == tuple(entries)
    late = [entry._replace(name="late") for entry in entries[1:2]]
    assert [entry.name for entry in writer.aligned([*entries, *late])] == ["t3", "t1", "late", "t2", "t0", "t4"]


def test_most_bytes_keep_their_place_in_a_page(tmp_path: Path, source: Path) -> None:
    entry = Entry("t", "U8", (50_000,), 50_000, source, ranges=((1_608, 51_608),))
    head = writer.header([entry], {})
    assert len(head) % writer.PAGE == 1_608
    odd = Entry("t", "U8", (50_000,), 50_000, source, ranges=((1_607, 51_607),))
    assert len(writer.header([odd], {})) % 8 == 0  # alignment of types comes first


def test_groups_stay_below_the_limit(source: Path) -> None:
    entries = [Entry(f"t{i}", "U8", (n,), n, source) for i, n in enumerate((40, 40, 30, 100, 5, 60, 1))]
    groups = writer.packed(entries, 80)
    assert [[entry.nbytes for entry in group] for group in groups] == [[40, 40], [30], [100], [5, 60, 1]]


IN_PHASE = ((8, 45_008), (49_104, 94_104))  # both as far behind the start of a page as in the new file
OUT_OF_PHASE = ((8, 45_008), (50_008, 95_008))


def copied(tmp_path: Path, source: Path, ranges: tuple[tuple[int, int], ...]) -> None:
    path = written(tmp_path, [Entry("t", "U8", (90_000,), 90_000, source, ranges=ranges)])
    data = source.read_bytes()
    assert load_file(path)["t"].tobytes() == b"".join(data[start:end] for start, end in ranges)


@pytest.mark.parametrize(("ranges", "expected"), [(IN_PHASE, 90_000), (OUT_OF_PHASE, 45_000)])
def test_the_kernel_copies_what_keeps_its_place_in_a_page(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, ranges: tuple[tuple[int, int], ...], expected: int
) -> None:
    copy, copied_bytes = os.copy_file_range, []

    def counting(src: int, dst: int, count: int, offset_src: int) -> int:
        copied_bytes.append(done := copy(src, dst, count, offset_src))
        return done

    monkeypatch.setattr(os, "copy_file_range", counting)
    monkeypatch.setattr(growing, "BUFFER", 8_192)
    copied(tmp_path, source, ranges)
    assert sum(copied_bytes) == expected


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_the_kernel(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Across file systems, or on old ones, a buffer carries the bytes; here after a first step that worked."""
    copy, calls = os.copy_file_range, []

    def fails_later(src: int, dst: int, count: int, offset_src: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(code, "not here")
        return copy(src, dst, min(count, 1000), offset_src)

    monkeypatch.setattr(os, "copy_file_range", fails_later)
    monkeypatch.setattr(growing, "BUFFER", 8_192)
    copied(tmp_path, source, IN_PHASE)
    assert len(calls) == 2


def test_a_disk_that_is_full_ends_a_copy_in_the_kernel(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int, offset_src: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(growing, "BUFFER", 8_192)
    with pytest.raises(OSError, match=r"x\.safetensors"):
        copied(tmp_path, source, IN_PHASE)


def test_computed_content_between_ranges(tmp_path: Path, source: Path) -> None:
    entries = [
        Entry("a", "U8", (10,), 10, source, ranges=((0, 10),)),
        Entry("b", "U8", (4,), 4, source, make=lambda: [b"ab", b"cd"]),
        Entry("c", "U8", (10,), 10, source, ranges=((10, 20),)),
    ]
    found = load_file(written(tmp_path, entries))
    data = source.read_bytes()
    assert [found[name].tobytes() for name in "abc"] == [data[:10], b"abcd", data[10:20]]


def test_index_keeps_what_is_still_true(source: Path) -> None:
    entries = (Entry("b", "BF16", (2, 3), 12, source), Entry("a", "F32", (4,), 16, source))
    files = [NewFile("one", b"", entries, indexed=True), NewFile("side", b"", (Entry("c", "U8", (9,), 9, source),))]
    old = {"metadata": {"total_size": 99, "total_parameters": 20, "made_by": "x"}, "weight_map": {}, "extra": 1}
    new = json.loads(writer.index_text(files, old, 20))
    assert new == {
        "metadata": {"made_by": "x", "total_size": 28, "total_parameters": 10},
        "extra": 1,
        "weight_map": {"a": "one", "b": "one"},
    }
    assert "total_parameters" not in json.loads(writer.index_text(files, old, 21))["metadata"]  # counted otherwise


@pytest.mark.parametrize("keep", [(0, 1, 2, 3, 4, 5), (2, 5, 6, 9, 10, 11), (6, 7, 8, 9, 10, 11)])
def test_table_of_expert_numbers(keep: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    old = np.stack([generator.permutation(12)[:6] for _ in range(500)])
    new = rewrite.renumbered_TK(old, keep, 12)
    for expert in range(12):
        if expert in keep:
            assert (new[old == expert] == keep.index(expert)).all()
    assert all(len(set(row)) == 6 for row in new.tolist())
    assert new.min() == 0
    assert new.max() == 5
    assert (rewrite.renumbered_TK(old, keep, 12) == new).all()
    with pytest.raises(rewrite.UsageError, match="6 different experts"):
        rewrite.renumbered_TK(old, keep[:5], 12)
    with pytest.raises(rewrite.InputError, match="damaged"):
        rewrite.renumbered_TK(old, keep, 11)


def test_substitutes_spread_over_all_that_stay() -> None:
    old = np.tile(np.array([[0, 1]]), (4000, 1))
    new = rewrite.renumbered_TK(old, tuple(range(2, 10)), 10)
    counts = np.bincount(new.reshape(-1), minlength=8)
    assert counts.min() > 0.8 * counts.mean()


@pytest.mark.parametrize("library", [ctypes.CDLL(None), object()])
def test_the_disk_may_begin_early_where_the_system_can(
    source: Path, monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    before = source.read_bytes()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    writer.start_syncing(source)
    writer.sync_file(source)
    assert source.read_bytes() == before
