"""The README says what was proven, and no more."""

from __future__ import annotations

from moeprune.checkpoint.formats import FORMATS
from tests.contracts import documents
from tests.pruning import proven


def test_readme_lists_what_the_tests_run_over() -> None:
    readme = (documents.ROOT / "README.md").read_text(encoding="utf-8")
    assert documents.between(readme, *proven.MARKS)[1] == proven.table(), "run: python -m tests.pruning.proven"


def test_every_proof_is_of_a_known_format() -> None:
    assert proven.HOW.keys() - {entry.name for entry in FORMATS} == {"bf16, fp16, fp32", "gguf"}


def test_every_format_is_proven_somehow() -> None:
    wrote = proven.by_libraries()
    assert [entry.name for entry in FORMATS if not proven.how(entry.name, wrote)] == []
