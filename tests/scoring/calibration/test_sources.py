"""Local calibration files: every kind is read, and what cannot be read says so in one line with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from moeprune.errors import InputError, UsageError
from moeprune.scoring.calibration.readers import PASSAGE, read_parquet
from moeprune.scoring.calibration.samples import parse_columns
from moeprune.scoring.calibration.selection import choose, shares
from moeprune.scoring.calibration.sources import Source, local_source, parse_sources, request_digest
from moeprune.settings import Settings

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def samples(path: Path, columns: str = "", count: int = 100):
    return choose(local_source(path), count, 0, parse_columns(columns), 10**6).samples


def parquet(path: Path, rows: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("code.txt", "print(1)\n"),
        ("code.md", "print(1)"),
        ("code.jsonl", '{"text": "print(1)"}\n\n'),
        ("code.jsonl", '\ufeff{"text": "print(1)"}'),
        ("code.jsonl", '"print(1)"'),
        ("code.json", '[{"text": "print(1)"}]'),
        ("code.json", '{"version": 1, "data": [{"text": "print(1)"}]}'),
        ("code.json", '{"text": "print(1)"}\n{"text": ""}\n'),
        ("code.csv", "id,content\n7,print(1)\n"),
        ("code.tsv", "id\tcontent\n7\tprint(1)\n"),
    ],
)
def test_every_kind_of_file_gives_the_same_text(tmp_path, name, content):
    (sample,) = samples(write(tmp_path, name, content))
    assert (sample.text, sample.domain) == ("print(1)", "code")


def test_a_large_parquet_file_is_not_read_ahead(tmp_path):
    """What Arrow holds while the rows go by; its default would hold the file to its end."""
    path = tmp_path / "x.parquet"
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema({"text": pyarrow.string()}), compression="none") as writer:
        for group in range(40):
            rows = [f"{group * 1000 + i:08}" * 70 for i in range(1000)]
            writer.write_table(pyarrow.table({"text": rows}), row_group_size=1000)
    size = path.stat().st_size
    assert size > 20_000_000
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in read_parquet(path)]
    assert len(held) == 40_000
    assert max(held) < size / 5


def test_parquet_with_text_and_shard_numbers(tmp_path):
    path = parquet(tmp_path / "train-00000-of-00002.parquet", [{"text": f"row {i}"} for i in range(600)])
    chosen = samples(path, count=1000)
    assert sorted(s.text for s in chosen) == sorted(f"row {i}" for i in range(600))
    assert {s.domain for s in chosen} == {"train"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"prompt": "Hi", "answer": "Hello"}, CHAT),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, CHAT),
        ({"instruction": "Add", "input": "1 2"}, [{"role": "user", "content": "Add\n\n1 2"}]),
        ({"question": "Hi"}, CHAT[:1]),
        ({"system": "Be brief", "prompt": "Hi"}, [{"role": "system", "content": "Be brief"}, CHAT[0]]),
        ({"chat": [{"role": "user", "content": ["H", {"text": "i"}]}]}, [{"role": "user", "content": "H\ni"}]),
        ({"regions": ["a tree", "a car"]}, None),
    ],
)  # fmt: skip
def test_rows_of_the_usual_shapes(tmp_path, row, messages):
    (sample,) = samples(write(tmp_path, "x.jsonl", lines([row])))
    if messages is None:
        assert sample.messages[0]["content"].endswith("- a tree\n- a car")
    else:
        assert list(sample.messages) == messages


def test_rows_of_a_table_may_hold_different_content(tmp_path):
    rows = [{"messages": CHAT, "text": None}, {"messages": None, "text": "words"}, {"messages": "[]", "text": None}]
    choice = choose(local_source(parquet(tmp_path / "x.parquet", rows[:2])), 9, 0, {}, 99)
    assert sorted(sample.text or "chat" for sample in choice.samples) == ["chat", "words"]
    choice = choose(local_source(write(tmp_path, "x.jsonl", lines(rows))), 9, 0, {}, 99)
    assert (len(choice.samples), choice.empty) == (2, 1)


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path, "x.jsonl", lines([{"text": "no", "frage": "Hi", "antwort": "Hello", "fach": "law"}]))
    (sample,) = samples(path, "prompt=frage,answer=antwort,domain=fach")
    assert (list(sample.messages), sample.domain) == (CHAT, "law")


def test_named_columns_are_not_asked_of_plain_texts(tmp_path):
    write(tmp_path, "law.jsonl", lines([{"frage": "Hi", "antwort": "Hello"}]))
    write(tmp_path, "prose.txt", "words")
    found = samples(tmp_path, "prompt=frage,answer=antwort")
    assert [sample.text or list(sample.messages) for sample in found] == [CHAT, "words"]


def test_tools_stay_to_the_letter_and_calls_become_objects(tmp_path):
    tools = '[ {"name": "f", "parameters": {"a": {"type": "string"}}}, {"name": "g", "parameters": {}} ]'
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
    row = {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}
    (sample,) = samples(write(tmp_path, "x.jsonl", lines([row])))
    assert sample.tools == tools
    assert sample.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}],
    }


def test_arrow_s_nulls_are_taken_out_of_structures(tmp_path):
    tools = [
        {"name": "f", "parameters": {"a": {"type": "string"}}},
        {"name": "g", "parameters": {"b": {"type": "integer"}}},
    ]
    path = parquet(tmp_path / "x.parquet", [{"messages": CHAT, "tools": tools}])
    assert "null" in json.dumps(pyarrow.parquet.read_table(path).to_pylist())
    (sample,) = samples(path)
    assert json.loads(sample.tools) == tools


def test_long_texts_become_passages_of_whole_paragraphs(tmp_path):
    paragraphs = [f"{i} " + "\n".join(["word " * 20] * 10) for i in range(100)]
    chosen = samples(write(tmp_path, "book.txt", "\n\n".join(paragraphs)))
    assert len(chosen) > 10
    assert all(len(sample.text) <= PASSAGE for sample in chosen)
    ordered = sorted(chosen, key=lambda sample: int(sample.text.split()[0]))
    kept = [line.strip() for sample in ordered for line in sample.text.split("\n\n")]
    assert kept == [paragraph.strip() for paragraph in paragraphs]


def test_folders_name_domains(tmp_path):
    for name in ("law/a.txt", "law/deep/b.md", "chat.jsonl", "README.md", ".hidden/c.txt", "notes.txt", "picture.png"):
        write(tmp_path, name, '{"text": "some words"}')
    domains = sorted(sample.domain for sample in samples(tmp_path))
    assert domains == ["chat", "law", "law", "notes"]


def test_many_prompt_files_are_one_domain(tmp_path):
    for i in range(20):
        write(tmp_path / "prompts", f"{i:02}.txt", f"Prompt number {i}")
    assert {sample.domain for sample in samples(tmp_path / "prompts")} == {"prompts"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": "b"\n', "x.jsonl:2: broken JSON"),
        ("x.jsonl", '{"text": "a"}\n[1]\n', "x.jsonl:2: a list"),
        ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl:1: not UTF-8"),
        ("x.jsonl", "[" * 100_000, "x.jsonl:1: broken JSON"),
        ("x.jsonl", '{"text": "a"}\n{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "x.jsonl:2: .*no text"),
        ("x.json", '[{"text": "\\ud83d"}]', "x.json: .*no text"),
        ("x.jsonl", "", "x.jsonl: empty; give"),
        ("x.jsonl", '{"text": ""}', "x.jsonl: all 1 samples in it are empty; name their column with --columns"),
        ("x.jsonl", '{"id": 1, "label": 2}', "x.jsonl:1: no usable column among 'id', 'label'"),
        ("x.jsonl", '{"text": {"a": 1}}', "'text' holds a dict"),
        ("x.jsonl", '{"messages": [{"content": "a"}]}', "x.jsonl:1: a message without a role"),
        ("x.jsonl", '{"messages": "not json"}', "x.jsonl:1: the messages are not valid JSON"),
        ("x.jsonl", '{"prompt": "a", "tools": "not json"}', "x.jsonl:1: the tools are not valid JSON"),
        ("x.json", '{"text": "a"', "x.json:1: broken JSON"),
        ("x.json", "3", "a int, not a list"),
        ("x.csv", "a,text\n1,2,3\n", "x.csv:2: another number of columns"),
        ("x.csv", 'text\n"a\n', "broken CSV"),
        ("x.parquet", "PAR1", "cannot be read as parquet"),
        ("x.pdf", "a", "unknown kind of file"),
    ],
)
def test_bad_input_is_one_line_with_its_place(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message) as caught:
        samples(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_named_column_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no column 'body' for text; there are 'text'"):
        samples(write(tmp_path, "x.jsonl", '{"text": "a"}'), "text=body")
    with pytest.raises(UsageError, match="write kind=column"):
        parse_columns("body")


def test_empty_folder_and_missing_path(tmp_path):
    with pytest.raises(InputError, match="no calibration file"):
        local_source(tmp_path)
    with pytest.raises(InputError, match=r"not found at .*nowhere"):
        parse_sources(str(tmp_path / "nowhere.jsonl"))


def test_a_column_of_identifiers_is_not_a_domain(tmp_path):
    path = write(tmp_path, "x.jsonl", lines([{"text": "a", "domain": str(i)} for i in range(100)]))
    with pytest.raises(InputError, match="more than 64 domains"):
        samples(path)


def test_composite_of_local_files(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path, f"{name}.jsonl", lines([{"text": f"{name} {i}"} for i in range(50)]))
    sources = parse_sources(f"{tmp_path}/a.jsonl:7, {tmp_path}/b.jsonl:3,{tmp_path}/c.jsonl")
    assert [(source.name, source.limit) for source in sources] == [("a.jsonl", 7), ("b.jsonl", 3), ("c.jsonl", None)]
    assert shares(sources, 30, capped=False) == [7, 3, 20]
    assert shares([Source("x", (), 4000), Source("y", (), 1000)], 100, capped=True) == [80, 20]
    assert shares([Source("x", (), 40), Source("y", (), 10)], 100, capped=True) == [40, 10]


def test_equal_shares_of_domains_and_the_rest_from_those_that_have_more(tmp_path):
    rows = [{"text": f"{i}", "domain": "small" if i < 3 else "big" if i % 2 else "other"} for i in range(1000)]
    counts: dict[str, int] = {}
    for sample in samples(write(tmp_path, "x.jsonl", lines(rows)), count=30):
        counts[sample.domain] = counts.get(sample.domain, 0) + 1
    assert counts["small"] == 3
    assert abs(counts["big"] - counts["other"]) <= 1
    assert sum(counts.values()) == 30


def test_the_draw_is_random_repeatable_and_nested(tmp_path):
    path = write(tmp_path, "x.jsonl", lines([{"text": str(i)} for i in range(2000)]))

    def draw(count, seed):
        return [int(s.text) for s in choose(local_source(path), count, seed, {}, 100).samples]

    few, many = draw(50, 1), draw(400, 1)
    assert many[:50] == few
    assert few != draw(50, 2)
    assert 800 < sum(many) / len(many) < 1200  # from everywhere in the file, not from its start
    # The numbers themselves: the same on every machine and in every version of Python.
    assert draw(5, 42) == [1732, 92, 367, 1158, 1544]


def test_request_digest_follows_the_files_and_the_settings(tmp_path):
    path = write(tmp_path, "x.jsonl", '{"text": "some words"}')
    first = request_digest(Settings(calibration_path=str(path)))
    assert first == request_digest(Settings(calibration_path=str(path)))
    assert first != request_digest(Settings(calibration_path=str(path), seed=1))
    assert first != request_digest(Settings(calibration_path=str(path), thinking="off"))
    write(tmp_path, "x.jsonl", '{"text": "other words"}')
    assert first != request_digest(Settings(calibration_path=str(path)))


def test_a_large_file_streams_in_flat_memory(tmp_path):
    """45 MB are read with less than 10 MB in use at any time: no more would come of 10 GB."""
    block = lines([{"text": f"{i} " + "x" * 3000} for i in range(1000)]).encode()
    path = tmp_path / "big.jsonl"
    with path.open("wb") as file:
        for _ in range(15):
            file.write(block)
    program = (
        "import sys, tracemalloc\n"
        "from pathlib import Path\n"
        "from moeprune.scoring.calibration.selection import choose\n"
        "from moeprune.scoring.calibration.sources import local_source\n"
        "tracemalloc.start()\n"
        "choice = choose(local_source(Path(sys.argv[1])), 100, 0, {}, 5000)\n"
        "print(choice.seen, len(choice.samples), tracemalloc.get_traced_memory()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    seen, kept, peak = map(int, done.stdout.split())
    assert (seen, kept) == (15_000, 100)
    assert peak < 10_000_000
