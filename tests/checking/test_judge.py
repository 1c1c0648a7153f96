"""The judge passes what is sound and fails what is not, with the right reason; streamed and loaded agree."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from moeprune.checking import judge, masking, preview, subject
from moeprune.checking.case import find
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.errors import InputError
from moeprune.metadata import write_json
from moeprune.settings import Settings
from tests.checking import pairs
from tests.checking.conftest import DEMO, HELD_OUT, ROOT


def _swap_rows(model):
    rows = model.model.layers[1].mlp.gate.weight
    rows[[3, 7]] = rows[[7, 3]].clone()


def _zero_expert(model):
    model.model.layers[2].mlp.experts.down_proj[5] = 0


def _double_scale(model):
    model.model.layers[0].mlp.experts.gate_up_proj[9] *= 2


def _break_attention(model):
    model.model.layers[3].self_attn.o_proj.weight *= 1.5


def _not_a_number(model):
    model.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] = float("nan")


CASES = {
    "good": (None, None),
    "swapped router rows": (_swap_rows, r"layer 1: router row of expert 3 .* is the row of .* rows were swapped"),
    "zeroed expert": (_zero_expert, r"layer 2: expert 5 .* its down_proj is all zeros"),
    "doubled scale": (_double_scale, r"layer 0: expert 9 .* its gate_up_proj is scaled by 2"),
    "other weights": (_break_attention, r"layer 3: what reaches the experts differs"),
    "not a number": (_not_a_number, r"layer 1: expert 0 .* not all numbers"),
}


def _judged(folder, output, **changes):
    values = {"output_path": output, "pruned_output_path": str(folder), "evaluation_path": str(HELD_OUT)}
    values |= {"device": "cpu", "evaluation_samples": 100, "generations": 20, "max_new_tokens": 24}
    settings = Settings(**(values | changes))
    return judge.judge(find(settings), settings, "key")


def _failed(report):
    return {check["name"]: check["reason"] for check in report["checks"] if check["status"] == "fail"}


@pytest.mark.parametrize("name", CASES)
def test_cuts_of_the_demo_model(name, tmp_path, good_keep):
    spoil, reason = CASES[name]
    report = _judged(pairs.cut(DEMO, tmp_path / "cut", good_keep, spoil), tmp_path)
    write_json(tmp_path / "report.json", report)  # NaN and infinity would be refused
    if spoil is None:
        assert report["verdict"] == "pass"
        assert any("KL" in warning for warning in report["warnings"])  # half of the experts are not for free
        assert "not tested" in {check["status"] for check in report["checks"] if check["name"] == "loops"}
    else:
        assert report["verdict"] == "fail"
        found = report["structure"]["findings"]
        assert len(found) == (2 if spoil is _swap_rows else 1), found
        assert re.search(reason, _failed(report)["structure"]), _failed(report)


def test_drawn_experts_fail_for_their_quality_alone(tmp_path):
    generator = random.Random(5)
    keep = {layer: sorted(generator.sample(range(32), 16)) for layer in range(4)}
    report = _judged(pairs.cut(DEMO, tmp_path / "cut", keep), tmp_path)
    assert "better than chance" in _failed(report)
    assert "structure" not in _failed(report)


def test_an_untouched_copy_passes_without_a_warning_but_for_the_sample(tmp_path):
    report = _judged(pairs.cut(DEMO, tmp_path / "cut", {layer: range(32) for layer in range(4)}), tmp_path)
    assert report["verdict"] == "pass"
    assert report["fidelity"]["overall"]["kl"] < 1e-6
    assert [warning.partition(":")[0] for warning in report["warnings"]] == ["loops"]


def test_preview_equals_the_cut_to_float_tolerance(tmp_path, scored, good_keep):
    shared = {"dtype": "float32", "evaluation_samples": 100, "device": "cpu", "evaluation_path": str(HELD_OUT)}
    settings = Settings(model_path=str(DEMO), output_path=scored, ratios="0.5,0.9375", **shared)
    checkpoint = open_checkpoint(DEMO)
    layout = understand(checkpoint)
    found = preview.measure(settings, checkpoint, preview.variants(settings, checkpoint, layout), layout, "key")
    folder = pairs.cut(DEMO, tmp_path / "cut", good_keep)
    real = _judged(folder, tmp_path, **shared)["fidelity"]
    shown = found["variants"][1]
    assert (found["variants"][0]["kept"], shown["kept"]) == (2, 16)
    for name, value in shown["fidelity"]["overall"].items():
        assert real["overall"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert shown["bytes"] == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.01)
    assert found["smallest_within_bounds"]["kept"] == 16


def test_streamed_and_loaded_say_the_same(tmp_path):
    keep = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6), 2: (0, 2, 4, 5)}
    folder = pairs.cut(pairs.parent(tmp_path / "parent"), tmp_path / "cut", keep)
    shared = {"evaluation_path": "", "evaluation_samples": 24, "max_kl": 100.0, "generations": 3}
    loaded = _judged(folder, tmp_path, **shared)
    streamed = _judged(folder, tmp_path, judge_memory=1, **shared)
    assert "streamed" in streamed["not_tested"]["generation"]
    assert streamed["masked"]["kl"] < 1e-8
    for name, value in loaded["fidelity"]["overall"].items():
        assert streamed["fidelity"]["overall"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_what_counts_is_the_memory_of_loaded_models(tmp_path):
    """The files would fit, the numbers that are computed with would not."""
    folder = pairs.cut(pairs.parent(tmp_path / "parent"), tmp_path / "cut", dict.fromkeys(range(3), (0, 1, 2, 3)))
    for place in (tmp_path / "parent", folder):
        halved = {name: t.bfloat16() for name, t in load_file(place / "model.safetensors").items()}
        save_file(halved, place / "model.safetensors", {"format": "pt"})
    stored = sum((place / "model.safetensors").stat().st_size for place in (tmp_path / "parent", folder))
    few = {"evaluation_path": "", "evaluation_samples": 8, "generations": 2, "max_kl": 100.0, "dtype": "float32"}
    found = _judged(folder, tmp_path, judge_memory=2 * stored, **few)
    assert re.match(r"loaded weights take .* are free: streamed", found["not_tested"]["generation"])


def test_the_command_leaves_with_5_and_knows_what_is_current(tmp_path):
    keep = dict.fromkeys(range(3), (0, 1, 2, 3))
    pruned = pairs.cut(pairs.parent(tmp_path / "parent"), tmp_path / "out" / "cut", keep, _zero_expert_small)
    small = ["--evaluation-samples", "8", "--generations", "4", "--max-new-tokens", "8", "--device", "cpu"]
    command = [sys.executable, str(ROOT / "test_pruned_model.py"), "--output-path", str(tmp_path / "out"), *small]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 5, first.stderr
    assert first.stdout == f"{tmp_path}/out/test_report.json\n"
    assert "all zeros" in first.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert "fail" in (pruned / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "test_report.json").read_text())
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (5, first.stdout)
    assert "is current" in again.stderr
    assert json.loads((tmp_path / "out" / "test_report.json").read_text()) == report


def _zero_expert_small(model):
    model.model.layers[1].mlp.experts.down_proj[2] = 0


def test_without_a_parent_the_text_is_still_judged(tmp_path):
    folder = pairs.parent(tmp_path / "lonely")
    report = _judged(folder, tmp_path, evaluation_samples=4, generations=4, evaluation_path="")
    statuses = {check["name"]: check["status"] for check in report["checks"]}
    assert statuses["KL"] == statuses["structure"] == "not tested"
    assert statuses["generated text"] in {"pass", "fail"}


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    folder = pairs.parent(tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate\.weight"):
        _judged(folder, tmp_path, evaluation_path="")


def test_a_format_that_cannot_be_loaded_here_is_streamed(tmp_path, monkeypatch):
    keep = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6), 2: (0, 2, 4, 5)}
    folder = pairs.cut(pairs.parent(tmp_path / "parent"), tmp_path / "cut", keep)
    monkeypatch.setattr(subject, "_model_class", NeedsMore)
    report = _judged(folder, tmp_path, evaluation_path="", evaluation_samples=8, max_kl=100.0)
    assert "a package that is not here" in report["not_tested"]["generation"]
    assert report["structure"]["status"] == "pass"


class NeedsMore:
    def __init__(self, folder):
        pass

    def from_pretrained(self, *_args, **_kwargs):
        raise ImportError("this format needs a package that is not here")


def test_experts_that_cannot_be_masked_leave_the_rest_tested(tmp_path, monkeypatch):
    def refuse(model):
        raise masking.CannotMask("no router with experts was found")

    keep = {0: (0, 3, 4, 7), 1: (1, 2, 5, 6), 2: (0, 2, 4, 5)}
    folder = pairs.cut(pairs.parent(tmp_path / "parent"), tmp_path / "cut", keep)
    monkeypatch.setattr(masking, "routed_blocks", refuse)
    report = _judged(folder, tmp_path, evaluation_path="", evaluation_samples=8, max_kl=100.0)
    found = {check["name"]: (check["status"], check["reason"]) for check in report["checks"]}
    for name in ("structure", "better than chance"):
        assert found[name] == ("not tested", "no router with experts was found")
    assert found["KL"][0] == "pass"
