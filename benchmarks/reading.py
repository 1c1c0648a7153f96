#!/usr/bin/env python3
"""Does reading calibration data take the same memory whatever the size of the file?

    python benchmarks/reading.py [--size 2GB] [--kinds jsonl csv parquet] [--folder FOLDER]

Writes a file of each kind of about this size, reads it in a process of its own as a run does, and draws 512 samples.
A table goes to stderr, one JSON line to stdout. The files are removed.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moeprune.values import amount  # noqa: E402

GROUP = 20_000  # rows of a group of a parquet file
READ = """
import json, re, sys, time
from pathlib import Path
from moeprune.scoring.calibration.selection import choose
from moeprune.scoring.calibration.sources import parse_sources
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before, begun = peak(), time.process_time()
choice = choose(parse_sources(sys.argv[1])[0], 512, 42, {}, 65_536)
cpu_s = round(time.process_time() - begun, 1)
print(json.dumps({"rows": choice.seen, "before_bytes": before, "peak_bytes": peak(), "cpu_s": cpu_s}))
"""


def rows(size: int) -> Iterator[dict[str, str]]:
    """Texts of five domains, of together about this many bytes."""
    rng, written = Random(1), 0
    words = [f"word{number}" for number in range(500)]
    texts = [" ".join(rng.choices(words, k=rng.randint(150, 400))) for _ in range(2000)]
    while written < size:
        text = rng.choice(texts)
        written += len(text) + 30
        yield {"text": text, "domain": "abcde"[len(text) % 5]}


def write_jsonl(path: Path, size: int) -> None:
    """One object in each line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(size))


def write_csv(path: Path, size: int) -> None:
    """The columns in the first line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "domain"))
        writer.writeheader()
        writer.writerows(rows(size))


def write_parquet(path: Path, size: int) -> None:
    """Groups of rows, nothing compressed."""
    import pyarrow
    import pyarrow.parquet

    schema, group = pyarrow.schema({"text": pyarrow.string(), "domain": pyarrow.string()}), []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for row in rows(size):
            group.append(row)
            if len(group) == GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group = []
        writer.write_table(pyarrow.Table.from_pylist(group, schema))


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


def measure(kind: str, folder: Path, size: int) -> dict[str, float]:
    """What reading a file of this kind takes."""
    path = folder / f"reading.{kind}"
    try:
        WRITERS[kind](path, size)
        done = subprocess.run([sys.executable, "-c", READ, path], cwd=ROOT, capture_output=True, text=True, check=True)
        return {"file_bytes": path.stat().st_size, **json.loads(done.stdout)}
    finally:
        path.unlink(missing_ok=True)


def main() -> None:
    """Measure, show, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=amount, default=amount("2GB"), help="of each file")
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room for a file"
    )
    arguments = parser.parse_args()
    found = {kind: measure(kind, arguments.folder, arguments.size) for kind in arguments.kinds}
    for kind, result in found.items():
        sizes = " ".join(f"{name} {result[f'{name}_bytes'] / 1e6:,.0f} MB " for name in ("file", "before", "peak"))
        print(f"{kind:<8} {result['rows']:>10,} rows  {sizes} {result['cpu_s']:.0f} s", file=sys.stderr)
    print(json.dumps({"benchmark": "reading", "kinds": found}))


if __name__ == "__main__":
    main()
