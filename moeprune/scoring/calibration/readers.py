"""Local calibration files, row by row: whatever the size of a file, one row or one passage is in memory.

TABLE READERS: ending of the file -> rows with their places, for messages to a person.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import InputError, MachineError

Rows = Iterator[tuple[str, Mapping[str, Any]]]

LINE_LIMIT = 64_000_000  # bytes; a longer line is a damaged file, not a document
WHOLE_FILE_LIMIT = 1_000_000_000  # bytes of a .json file, which must be read in one piece
PARQUET_BUFFER = 1_000_000  # bytes of a column that are read at once
PARQUET_ROWS = 64  # in memory at a time; with images inside, a row takes megabytes
PASSAGE = 8_000  # characters of a text file that make one document: some 2,000 tokens


def read_text(path: Path) -> Rows:
    """Passages of whole paragraphs (cut at blank lines) up to PASSAGE characters; a short file is one document."""
    passage: list[str] = []
    length = start = 0
    for number, line in _lines(path):
        blank = not line.strip()
        if passage and (length + len(line) > PASSAGE or (blank and length > PASSAGE // 2)):
            yield f"{path}:{start}", {"text": "".join(passage).strip()}
            passage, length = [], 0
        if passage or not blank:
            start = start if passage else number
            passage.append(line)
            length += len(line)
    if passage:
        yield f"{path}:{start}", {"text": "".join(passage).strip()}


def read_jsonl(path: Path) -> Rows:
    """One JSON object (or one JSON string, taken as text) in each line."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line), f"{path}:{number}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}:{number}: broken JSON: {error}; mend or remove this line") from None
        if "\\u" in line and _has_half_character(row):
            raise InputError(
                f"{path}:{number}: a \\uD800 to \\uDFFF without its pair is no text; mend or remove this line"
            )
        yield f"{path}:{number}", row


def _has_half_character(value: Any) -> bool:
    """Whether JSON escapes gave one half of a surrogate pair, which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def read_json(path: Path) -> Rows:
    """A JSON list of samples, an object that holds one, or one object per line in spite of the name."""
    if path.stat().st_size > WHOLE_FILE_LIMIT:
        raise InputError(f"{path}: too large for one JSON document; write one object per line and name it .jsonl")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from read_jsonl(path)
            return
        raise InputError(f"{path}:{error.lineno}: broken JSON: {error.msg}; mend the file") from None
    if _has_half_character(data):
        raise InputError(f"{path}: a \\uD800 to \\uDFFF without its pair is no text; mend or remove it")
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        data = lists[0] if len(lists) == 1 and "messages" not in data else [data]
    if not isinstance(data, list):
        raise InputError(f"{path}: a {type(data).__name__}, not a list of samples")
    for index, item in enumerate(data):
        yield f"{path}[{index}]", _row(item, f"{path}[{index}]")


def read_csv(path: Path) -> Rows:
    """Rows under the names of the first line; .tsv is separated by tabs."""
    csv.field_size_limit(LINE_LIMIT)
    lines = (line for _, line in _lines(path))
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}:{reader.line_num}: another number of columns than in the first line; mend this row"
                )
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: broken CSV: {error}; mend the file") from None


def read_parquet(path: Path) -> Rows:
    """Rows of a parquet file, a few in memory at a time. Nulls inside structures were put there by Arrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MachineError(
            f"{path}: reading parquet needs pyarrow; install it, or convert the file to .jsonl"
        ) from None
    try:
        # Its default reads ahead to the end of the file: 2.2 GB of memory for a file of 2 GB.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PARQUET_BUFFER)
        index = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", {key: without_nulls(value) for key, value in row.items()}
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct the fields of all structs in the column; the ones that were not there are null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _row(item: Any, place: str) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        raise InputError(f"{place}: a {type(item).__name__}, not an object with named fields")
    return item


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; a byte order mark is dropped."""
    number = 0
    with path.open("rb") as file:
        while raw := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(raw) > LINE_LIMIT:
                raise InputError(f"{path}:{number}: longer than {LINE_LIMIT // 1_000_000} MB; is a line end missing?")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line; convert the file"
                ) from None
            yield number, text.removeprefix("\ufeff") if number == 1 else text
